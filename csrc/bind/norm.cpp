// Bindings: norm_pullback, select_norm_pullback.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void run(py::handle c_, py::handle x_, py::handle weight_, py::handle bias_, double eps, py::handle out_,
         py::handle mass_, bool select, bool contrast, int threads) {
    const TensorView c(c_, "c"), x(x_, "x"), out(out_, "out");
    const auto weight = optional_view(weight_, "weight"), bias = optional_view(bias_, "bias");
    const auto mass = optional_view(mass_, "mass");
    check_coefficient(c, contrast);
    if (x.ndim() < 2 || c.ndim() != x.ndim() + 1)
        fail("x must be [B, ..., K] and c one axis more: " + x.describe() + ", " + c.describe());
    x.matches(0, c, 1, x.ndim() - 1);
    if (c.size(-1) != (select ? 2 : 1) * x.size(-1))
        fail(c.describe() + " must end in " + (select ? "twice " : "") + "the last axis of " + x.describe());
    out.matches(0, c, 0, c.ndim() - 1);
    out.matches(out.ndim() - 1, x, x.ndim() - 1, 1);
    if (out.ndim() != c.ndim())
        fail("the shapes of " + out.describe() + " and " + c.describe() + " do not fit together");
    if (weight) weight->shaped({x.size(-1)}).contiguous();
    if (bias) bias->shaped({x.size(-1)}).contiguous();
    if (mass) check_mass(*mass, c);

    NormArgs args{};
    args.rhs = c.size(0);
    args.batch = c.size(1);
    args.rows = x.product(1, x.ndim() - 1);
    args.width = x.size(-1);
    args.contrast = contrast;
    args.select = select;
    args.eps = eps;
    args.c = c.contiguous().operand();
    args.x = x.contiguous().operand();
    args.weight = operand_or_null(weight);
    args.bias = operand_or_null(bias);
    args.out = out.contiguous().operand();
    args.mass = operand_or_null(mass);
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(norm_pullback, args);
}

void norm_pullback(py::handle c, py::handle x, py::handle weight, double eps, py::handle out, int threads) {
    run(c, x, weight, py::none(), eps, out, py::none(), false, false, threads);
}

void select_norm_pullback(py::handle acc, py::handle x, py::handle weight, py::handle bias, double eps,
                          py::handle out, py::handle mass, bool contrast, int threads) {
    run(acc, x, weight, bias, eps, out, mass, true, contrast, threads);
}

}  // namespace

void register_norm(py::module_& m) {
    m.def("norm_pullback", &norm_pullback);
    m.def("select_norm_pullback", &select_norm_pullback);
}

}  // namespace rf
