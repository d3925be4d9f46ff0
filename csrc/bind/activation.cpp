// Bindings: scale_by, centring, gelu_factor, affine_factor.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

// Checks the gain and shift of c's channels, the innermost axis; both or none are given.
void check_channels(const std::optional<TensorView>& gain, const std::optional<TensorView>& shift,
                    const TensorView& c) {
    if (gain.has_value() != shift.has_value()) fail("gain and shift belong together");
    if (gain) check_channels(*gain, *shift, c);
}

void scale_by(py::handle c_, py::handle factor_, py::handle n_scale_, py::handle gain_, py::handle shift_,
              py::handle out_, bool gate, int threads) {
    const TensorView c(c_, "c"), factor(factor_, "factor"), out(out_, "out");
    const auto n_scale = optional_view(n_scale_, "n_scale");
    const auto gain = optional_view(gain_, "gain"), shift = optional_view(shift_, "shift");
    check_coefficient(c, n_scale.has_value());
    if (n_scale) n_scale->shaped({c.size(0) / 2, c.size(1)}).contiguous();
    check_channels(gain, shift, c);
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
    args.channels = gain ? gain->size(0) : 0;
    args.gain = operand_or_null(gain);
    args.shift = operand_or_null(shift);
    args.out = out.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(scale_by, args);
}

void centring(py::handle c_, py::handle factor_, py::handle gain_, py::handle shift_, bool gate,
              std::int64_t runs, std::int64_t step, py::handle out_, int threads) {
    const TensorView c(c_, "c"), out(out_, "out");
    const auto factor = optional_view(factor_, "factor");
    const auto gain = optional_view(gain_, "gain"), shift = optional_view(shift_, "shift");
    check_coefficient(c, true);
    c.same_layout(1, c, 1);
    if (factor) {
        c.same_layout(1, *factor, 0);
        factor->same_layout(0, c, 1);
    }
    if (gain && !factor) fail("gain and shift belong to a factor");
    check_channels(gain, shift, c);
    out.shaped({c.size(0) / 2, c.size(1)}).contiguous();
    if (out.dtype() == DType::bf16) fail(out.describe() + " must be float32 or float64");
    CentringArgs args{};
    args.rhs = c.size(0);
    args.batch = c.size(1);
    args.inner = c.product(2, c.ndim());
    if (runs < 0 || (runs > 0 && (step < kCentringRun || args.inner < kCentringRun ||
                                  runs - 1 > (args.inner - kCentringRun) / step)))
        fail(std::to_string(runs) + " runs, " + std::to_string(step) + " apart, do not fit " + c.describe());
    args.runs = runs;
    args.step = step;
    args.gate = gate;
    args.c = c.operand();
    args.factor = operand_or_null(factor);
    args.channels = gain ? gain->size(0) : 0;
    args.gain = operand_or_null(gain);
    args.shift = operand_or_null(shift);
    args.out = out.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(centring, args);
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
    m.def("centring", &centring);
    m.def("gelu_factor", &gelu_factor);
    m.def("affine_factor", &affine_factor);
}

}  // namespace rf
