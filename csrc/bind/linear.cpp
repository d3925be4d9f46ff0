// Bindings: linear_pullback, linear_norm_pullback.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

LinearArgs arguments(const TensorView& c, const TensorView& panels, const TensorView& x,
                     const TensorView& out, int threads) {
    if (x.ndim() < 2 || c.ndim() != x.ndim() + 1)
        fail("x must be [B, ..., I] and c [T, B, ..., K]: " + x.describe() + ", " + c.describe());
    x.matches(0, c, 1, x.ndim() - 1);
    if (out.ndim() != c.ndim())
        fail("the shapes of " + out.describe() + " and " + c.describe() + " do not fit together");
    out.matches(0, c, 0, 1);
    out.matches(1, x, 0, x.ndim());
    if (c.dtype() != panels.dtype())
        fail(c.describe() + " and " + panels.describe() + " must have the same dtype");
    LinearArgs args{};
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.rows = x.product(1, x.ndim() - 1);
    args.depth = c.size(-1);
    args.width = x.size(-1);
    const std::int64_t pack = panels.dtype() == DType::bf16 ? 2 : 1;
    panels.shaped({(args.width + kLinearColumns - 1) / kLinearColumns, (args.depth + pack - 1) / pack,
                   kLinearColumns, pack});
    args.c = c.contiguous().operand();
    args.panels = panels.contiguous().operand();
    args.x = x.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    return args;
}

void linear_pullback(py::handle c_, py::handle panels_, py::handle x_, py::handle out_, int threads) {
    const TensorView c(c_, "c"), panels(panels_, "panels"), x(x_, "x"), out(out_, "out");
    check_coefficient(c, false);
    const LinearArgs args = arguments(c, panels, x, out, threads);
    py::gil_scoped_release release;
    RF_CALL_BF16(linear_pullback, args);
}

void linear_norm_pullback(py::handle c_, py::handle panels_, py::handle x_, py::handle weight_,
                          py::handle bias_, double eps, bool contrast, py::handle out_, py::handle mass_,
                          int threads) {
    const TensorView c(c_, "c"), panels(panels_, "panels"), x(x_, "x"), out(out_, "out"), mass(mass_, "mass");
    const auto weight = optional_view(weight_, "weight"), bias = optional_view(bias_, "bias");
    check_coefficient(c, contrast);
    check_mass(mass, c);
    LinearArgs args = arguments(c, panels, x, out, threads);
    if (weight) weight->shaped({args.width}).contiguous();
    if (bias) bias->shaped({args.width}).contiguous();
    args.norm = true;
    args.contrast = contrast;
    args.eps = eps;
    args.weight = operand_or_null(weight);
    args.bias = operand_or_null(bias);
    args.mass = mass.operand();
    py::gil_scoped_release release;
    RF_CALL_BF16(linear_pullback, args);
}

}  // namespace

void register_linear(py::module_& m) {
    m.def("linear_pullback", &linear_pullback);
    m.def("linear_norm_pullback", &linear_norm_pullback);
}

}  // namespace rf
