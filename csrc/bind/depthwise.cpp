// Binding: depthwise.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void depthwise(py::handle source_, py::handle weight_, py::handle bias_, py::handle x_,
               const std::array<std::int64_t, 2>& stride, const std::array<std::int64_t, 2>& padding,
               const std::array<std::int64_t, 2>& dilation, const std::array<std::int64_t, 2>& size,
               bool transposed, bool relu, py::handle out_, int threads) {
    const TensorView source(source_, "source"), weight(weight_, "weight"), out(out_, "out");
    const auto bias = optional_view(bias_, "bias"), x = optional_view(x_, "x");
    if (source.ndim() != 5 || weight.ndim() != 4 || out.ndim() != 5)
        fail("source must be [T, B, h, w, C], weight [halves, kh, kw, C] and out [T, B, H, W, C]: " +
             source.describe() + ", " + weight.describe() + ", " + out.describe());
    if (source.dtype() == DType::f64 || out.dtype() == DType::f64)
        fail("depthwise computes in float32: source and out must be float32 or bfloat16");
    out.contiguous().matches(0, source.contiguous(), 0, 2).matches(4, source, 4, 1);
    if (weight.size(0) != 2 && (x || weight.size(0) != 1))
        fail(weight.describe() + " must have one half, or two: with x, or for both signs of the source");
    weight.contiguous().shaped({weight.size(0), weight.size(1), weight.size(2), source.size(4)});
    if (weight.dtype() != DType::f32) fail(weight.describe() + " must be float32");
    DepthwiseArgs args{};
    args.num_maps = source.size(0);
    args.batch = source.size(1);
    args.channels = source.size(4);
    for (int axis = 0; axis < 2; ++axis) {
        args.in_size[axis] = source.size(2 + axis);
        args.out_size[axis] = out.size(2 + axis);
        args.kernel[axis] = weight.size(1 + axis);
        args.stride[axis] = stride[axis];
        args.padding[axis] = padding[axis];
        args.dilation[axis] = dilation[axis];
        if (out.size(2 + axis) != size[axis]) fail(out.describe() + " must have the size that is asked for");
        if (args.kernel[axis] > kMostTaps)
            fail(weight.describe() + " has more than " + std::to_string(kMostTaps) + " taps along an axis");
        if (stride[axis] < 1 || dilation[axis] < 1 || padding[axis] < 0)
            fail("stride and dilation must be positive, padding not negative");
    }
    args.transposed = transposed;
    args.relu = relu;
    args.by_source = !x && weight.size(0) == 2;
    if (bias) {
        if (bias->dtype() != DType::f32) fail(bias->describe() + " must be float32");
        bias->contiguous().shaped({args.channels});
    }
    if (x) {
        if (x->dtype() == DType::f64) fail(x->describe() + " must be float32 or bfloat16");
        x->contiguous().matches(0, out, 1, 4);
        if (x->ndim() != 4) fail(x->describe() + " must be [B, H, W, C]");
    }
    args.source = source.operand();
    args.weight = weight.operand();
    args.bias = operand_or_null(bias);
    args.x = operand_or_null(x);
    args.out = out.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(depthwise, args);
}

}  // namespace

void register_depthwise(py::module_& m) {
    m.def("depthwise", &depthwise);
}

}  // namespace rf
