// Bindings: norm_pullback, norm_gradient.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

NormArgs arguments(py::handle c_, py::handle x_, py::handle weight_, double eps, py::handle out_,
                   int threads) {
    const TensorView c(c_, "c"), x(x_, "x"), out(out_, "out");
    const auto weight = optional_view(weight_, "weight");
    check_coefficient(c, false);
    if (x.ndim() < 2 || c.ndim() != x.ndim() + 1)
        fail("x must be [B, ..., K] and c one axis more: " + x.describe() + ", " + c.describe());
    x.matches(0, c, 1, x.ndim());
    if (out.ndim() != c.ndim())
        fail("the shapes of " + out.describe() + " and " + c.describe() + " do not fit together");
    out.matches(0, c, 0, c.ndim());
    if (out.dtype() != c.dtype()) fail(c.describe() + " and " + out.describe() + " must have the same dtype");
    if (weight) weight->shaped({x.size(-1)}).contiguous();

    NormArgs args{};
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.rows = x.product(1, x.ndim() - 1);
    args.width = x.size(-1);
    args.eps = eps;
    args.c = c.contiguous().operand();
    args.x = x.contiguous().operand();
    args.weight = operand_or_null(weight);
    args.out = out.contiguous().operand();
    args.threads = threads;
    return args;
}

void norm_pullback(py::handle c, py::handle x, py::handle weight, double eps, py::handle out, int threads) {
    const NormArgs args = arguments(c, x, weight, eps, out, threads);
    py::gil_scoped_release release;
    RF_CALL_ROUNDING(norm_pullback, args);
}

void norm_gradient(py::handle c, py::handle x, py::handle weight, double eps, py::handle out, int threads) {
    const NormArgs args = arguments(c, x, weight, eps, out, threads);
    py::gil_scoped_release release;
    RF_CALL_ROUNDING(norm_gradient, args);
}

}  // namespace

void register_norm(py::module_& m) {
    m.def("norm_pullback", &norm_pullback);
    m.def("norm_gradient", &norm_gradient);
}

}  // namespace rf
