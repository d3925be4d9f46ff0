// Bindings: max_pool_pullback, unpool.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void max_pool_pullback(py::handle c_, py::handle x_, std::int64_t kernel_height, std::int64_t kernel_width,
                       bool divided, py::handle out_, int threads) {
    const TensorView c(c_, "c"), x(x_, "x"), out(out_, "out");
    check_coefficient(c, false);
    if (x.ndim() != 4 || c.ndim() != 5)
        fail("x must be [B, H, W, C] and c [T, B, h, w, C]: " + x.describe() + ", " + c.describe());
    x.matches(0, c, 1, 1).matches(3, c, 4, 1);
    if (out.ndim() != 5) fail(out.describe() + " must be [T, B, H, W, C]");
    out.matches(0, c, 0, 1).matches(1, x, 0, 4);
    if (kernel_height < 1 || kernel_width < 1 || c.size(2) != x.size(1) / kernel_height ||
        c.size(3) != x.size(2) / kernel_width)
        fail("windows of " + std::to_string(kernel_height) + " x " + std::to_string(kernel_width) + " in " +
             x.describe() + " do not fit " + c.describe());
    MaxPoolArgs args{};
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.height = x.size(1);
    args.width = x.size(2);
    args.channels = x.size(3);
    args.kernel_height = kernel_height;
    args.kernel_width = kernel_width;
    args.divided = divided;
    args.c = c.contiguous().operand();
    args.x = x.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(max_pool_pullback, args);
}

using Pair = std::pair<std::int64_t, std::int64_t>;

void unpool(py::handle c_, py::handle indices_, std::int64_t height, std::int64_t width, Pair kernel,
            Pair stride, Pair padding, py::handle out_, int threads) {
    const TensorView c(c_, "c"), indices(indices_, "indices", Elements::int32), out(out_, "out");
    check_coefficient(c, false);
    if (indices.ndim() != 4 || c.ndim() != 5 || out.ndim() != 5)
        fail("indices must be [B, h, w, C], c [T, B, h, w, C] and out [T, B, H, W, C]: " +
             indices.describe() + ", " + c.describe() + ", " + out.describe());
    indices.matches(0, c, 1, 4);
    out.shaped({c.size(0), c.size(1), height, width, c.size(4)});
    UnpoolArgs args{};
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.rows = c.size(2);
    args.columns = c.size(3);
    args.channels = c.size(4);
    args.height = height;
    args.width = width;
    const std::int64_t numbers[3][2] = {
        {kernel.first, kernel.second}, {stride.first, stride.second}, {padding.first, padding.second}};
    for (int axis = 0; axis < 2; ++axis) {
        args.kernel[axis] = numbers[0][axis];
        args.stride[axis] = numbers[1][axis];
        args.padding[axis] = numbers[2][axis];
        if (args.kernel[axis] < 1 || args.stride[axis] < 1 || args.padding[axis] < 0)
            fail("windows need a positive size and stride, and padding that is not negative");
    }
    args.c = c.contiguous().operand();
    args.indices = indices.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(unpool, args);
}

}  // namespace

void register_max_pool(py::module_& m) {
    m.def("max_pool_pullback", &max_pool_pullback);
    m.def("unpool", &unpool);
}

}  // namespace rf
