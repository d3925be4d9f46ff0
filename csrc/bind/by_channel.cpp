// Bindings: mul_pullback, mul_gradient, spread.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

// Checks c [T, B, rows, C] and x [B, rows, C] and sets their sizes.
template <class Args>
void set_sizes_of_rows(Args& args, const TensorView& c, const TensorView& x, bool contrast, int threads) {
    check_coefficient(c, contrast);
    if (c.ndim() != 4 || x.ndim() != 3)
        fail(c.describe() + " must be [T, B, rows, C], " + x.describe() + " [B, rows, C]");
    c.contiguous();
    x.matches(0, c, 1, 3).contiguous();
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.rows = c.size(2);
    args.channels = c.size(3);
    args.threads = threads;
}

template <class Args>
void set_rows(Args& args, const TensorView& c, const TensorView& x, bool contrast, int threads) {
    set_sizes_of_rows(args, c, x, contrast, threads);
    args.contrast = contrast;
}

void mul_pullback(py::handle c_, py::handle a_, py::handle b_, bool contrast, py::handle c_a_,
                  py::handle c_b_, py::handle mass_, int threads) {
    const TensorView c(c_, "c"), a(a_, "a"), b(b_, "b"), c_a(c_a_, "c_a"), c_b(c_b_, "c_b"),
        mass(mass_, "mass");
    MulArgs args{};
    set_rows(args, c, a, contrast, threads);
    check_output(c_a, c);
    b.contiguous().shaped({args.batch, args.channels});
    c_b.contiguous().shaped({args.num_maps, args.batch, args.channels});
    check_mass(mass, c);
    args.c = c.operand();
    args.a = a.operand();
    args.b = b.operand();
    args.c_a = c_a.operand();
    args.c_b = c_b.operand();
    args.mass = mass.operand();
    py::gil_scoped_release release;
    RF_CALL(mul_pullback, args);
}

void mul_gradient(py::handle c_, py::handle a_, py::handle b_, double share, py::handle c_a_, py::handle c_b_,
                  int threads) {
    const TensorView c(c_, "c"), a(a_, "a"), b(b_, "b"), c_a(c_a_, "c_a"), c_b(c_b_, "c_b");
    MulGradientArgs args{};
    set_sizes_of_rows(args, c, a, false, threads);
    check_output(c_a, c);
    b.contiguous().shaped({args.batch, args.channels});
    c_b.contiguous().shaped({args.num_maps, args.batch, args.channels});
    if (c_b.dtype() == DType::bf16) fail(c_b.describe() + " must be float32 or float64");
    args.share = share;
    args.c = c.operand();
    args.a = a.operand();
    args.b = b.operand();
    args.c_a = c_a.operand();
    args.c_b = c_b.operand();
    py::gil_scoped_release release;
    RF_CALL(mul_gradient, args);
}

void spread(py::handle c_, py::handle x_, bool contrast, py::handle out_, py::handle mass_, int threads) {
    const TensorView c(c_, "c"), x(x_, "x"), out(out_, "out"), mass(mass_, "mass");
    SpreadArgs args{};
    set_rows(args, out, x, contrast, threads);
    c.contiguous().shaped({args.num_maps, args.batch, args.channels});
    check_mass(mass, out);
    args.c = c.operand();
    args.x = x.operand();
    args.out = out.operand();
    args.mass = mass.operand();
    py::gil_scoped_release release;
    RF_CALL(spread, args);
}

}  // namespace

void register_by_channel(py::module_& m) {
    m.def("mul_pullback", &mul_pullback);
    m.def("mul_gradient", &mul_gradient);
    m.def("spread", &spread);
}

}  // namespace rf
