// Bindings: activation_factor, activation_share, affine_factor.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void activation_factor(py::handle x_, int function, py::handle gain_, py::handle shift_, py::handle y_,
                       py::handle factor_, int threads) {
    const TensorView x(x_, "x"), y(y_, "y");
    const auto factor = optional_view(factor_, "factor");
    const auto gain = optional_view(gain_, "gain"), shift = optional_view(shift_, "shift");
    if (x.dtype() == DType::f64) fail("activation_factor computes in float32: x must be float32 or bfloat16");
    if (function < 0 || function > static_cast<int>(Activation::hardsigmoid))
        fail("there is no such function");
    if (gain.has_value() != shift.has_value()) fail("gain and shift belong together");
    FactorArgs args{};
    y.same_shape(x);
    if (factor) factor->same_shape(x).contiguous();
    if (gain) {
        if (x.ndim() < 1) fail(x.describe() + " has no channels");
        if (gain->dtype() != DType::f32 || shift->dtype() != DType::f32)
            fail("gain and shift must be float32");
        args.channels = gain->contiguous().shaped({x.size(-1)}).size(0);
        shift->contiguous().shaped({args.channels});
    }
    args.inner = x.numel();
    args.function = static_cast<Activation>(function);
    args.x = x.contiguous().operand();
    args.y = y.contiguous().operand();
    args.factor = operand_or_null(factor);
    args.gain = operand_or_null(gain);
    args.shift = operand_or_null(shift);
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(activation_factor, args);
}

void activation_share(py::handle x_, int function, py::handle y_, py::handle factor_, int threads) {
    const TensorView x(x_, "x"), y(y_, "y"), factor(factor_, "factor");
    if (x.dtype() == DType::f64) fail("activation_share computes in float32: x must be float32 or bfloat16");
    if (function < 0 || function > static_cast<int>(Activation::hardswish)) fail("there is no such function");
    y.same_shape(x);
    factor.same_shape(x);
    ShareArgs args{};
    args.inner = x.numel();
    args.function = static_cast<Activation>(function);
    args.x = x.contiguous().operand();
    args.y = y.contiguous().operand();
    args.factor = factor.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(activation_share, args);
}

void affine_factor(py::handle x_, py::handle gain_, py::handle shift_, bool relu, double cap,
                   bool channels_last, py::handle y_, py::handle factor_, int threads) {
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
    m.def("activation_factor", &activation_factor);
    m.def("activation_share", &activation_share);
    m.def("affine_factor", &affine_factor);
}

}  // namespace rf
