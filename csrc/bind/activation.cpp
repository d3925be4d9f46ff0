// Bindings: scale_by, gelu_factor, affine_factor.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void scale_by(py::handle c_, py::handle factor_, py::handle n_scale_, py::handle out_, bool gate,
              int threads) {
    const TensorView c(c_, "c"), factor(factor_, "factor"), out(out_, "out");
    const auto n_scale = optional_view(n_scale_, "n_scale");
    check_coefficient(c, n_scale.has_value());
    if (n_scale) n_scale->shaped({c.size(0) / 2, c.size(1)}).contiguous();
    c.same_layout(1, factor, 0);
    factor.same_layout(0, c, 1);
    out.same_layout(1, c, 1).matches(0, c, 0, 1);
    ScaleArgs args{};
    args.rhs = c.size(0);
    args.batch = c.size(1);
    args.inner = c.product(2, c.ndim());
    args.n_scale = operand_or_null(n_scale);
    args.gate = gate;
    args.c = c.operand();
    args.factor = factor.operand();
    args.out = out.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(scale_by, args);
}

void gelu_factor(py::handle x_, bool tanh_approx, py::handle y_, py::handle factor_, int threads) {
    const TensorView x(x_, "x"), y(y_, "y"), factor(factor_, "factor");
    if (x.dtype() == DType::f64) fail("gelu_factor computes in float32: x must be float32 or bfloat16");
    GeluArgs args{};
    y.same_shape(x);
    factor.same_shape(x);
    args.inner = x.numel();
    args.tanh_approx = tanh_approx;
    args.x = x.contiguous().operand();
    args.y = y.contiguous().operand();
    args.factor = factor.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(gelu_factor, args);
}

void affine_factor(py::handle x_, py::handle gain_, py::handle shift_, bool relu, double cap, py::handle y_,
                   py::handle factor_, bool channels_last, int threads) {
    const TensorView x(x_, "x"), gain(gain_, "gain"), shift(shift_, "shift"), y(y_, "y"),
        factor(factor_, "factor");
    if (x.ndim() < 2) fail(x.describe() + " must be [B, C, ...]");
    if (x.dtype() == DType::f64) fail("affine_factor computes in float32: x must be float32 or bfloat16");
    if (gain.dtype() != DType::f32 || shift.dtype() != DType::f32) fail("gain and shift must be float32");
    gain.contiguous().shaped({x.size(channels_last ? -1 : 1)});
    shift.contiguous().shaped({gain.size(0)});
    y.contiguous().same_shape(x.contiguous());
    factor.contiguous().same_shape(x);
    AffineArgs args{};
    args.channels = gain.size(0);
    args.outer = channels_last ? x.product(0, x.ndim() - 1) : x.size(0);
    args.inner = channels_last ? 1 : x.product(2, x.ndim());
    args.relu = relu;
    args.cap = static_cast<float>(cap);
    args.x = x.operand();
    args.y = y.operand();
    args.factor = factor.operand();
    args.gain = gain.operand();
    args.shift = shift.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(affine_factor, args);
}

}  // namespace

void register_activation(py::module_& m) {
    m.def("scale_by", &scale_by);
    m.def("gelu_factor", &gelu_factor);
    m.def("affine_factor", &affine_factor);
}

}  // namespace rf
