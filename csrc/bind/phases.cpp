// Bindings: select_phases, sides.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void select_phases(py::handle acc_, py::handle x_, std::int64_t top, std::int64_t left, py::handle out_,
                   int threads) {
    const TensorView acc(acc_, "acc"), x(x_, "x"), out(out_, "out");
    if (acc.ndim() != 8 || x.ndim() != 4 || out.ndim() != 5)
        fail("acc must be [T, B, rows, columns, s, s, 2, C], x [B, H, W, C] and out [T, B, H, W, C]: " +
             acc.describe() + ", " + x.describe() + ", " + out.describe());
    out.matches(0, acc, 0, 2).matches(1, x, 0, 4);
    acc.matches(7, x, 3, 1);
    SelectPhasesArgs args{};
    args.num_maps = acc.size(0);
    args.batch = acc.size(1);
    args.rows = acc.size(2);
    args.columns = acc.size(3);
    args.stride[0] = acc.size(4);
    args.stride[1] = acc.size(5);
    args.height = x.size(1);
    args.width = x.size(2);
    args.channels = x.size(3);
    const auto fits = [](std::int64_t first, std::int64_t size, std::int64_t stride, std::int64_t cells) {
        return first >= 0 && stride > 0 && first <= cells - (size + stride - 1) / stride;
    };
    if (acc.size(6) != 2 || !fits(top, args.height, args.stride[0], args.rows) ||
        !fits(left, args.width, args.stride[1], args.columns))
        fail(x.describe() + " from cell " + std::to_string(top) + ", " + std::to_string(left) +
             " on is not in " + acc.describe());
    if (out.dtype() != acc.dtype()) fail(out.describe() + " must have the dtype of " + acc.describe());
    args.top = top;
    args.left = left;
    args.acc = acc.contiguous().operand();
    args.x = x.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(select_phases, args);
}

void sides(py::handle x_, std::int64_t groups, py::handle out_, int threads) {
    const TensorView x(x_, "x"), out(out_, "out");
    if (x.dtype() == DType::f64 || out.dtype() == DType::f64)
        fail("sides computes in float32: x and out must be float32 or bfloat16");
    if (x.ndim() < 1 || groups < 1 || x.size(-1) % groups)
        fail(x.describe() + " must have channels in " + std::to_string(groups) + " groups");
    if (out.ndim() != x.ndim() + 2) fail(out.describe() + " must be [..., groups, 2, channels in a group]");
    SidesArgs args{};
    args.width = x.size(-1) / groups;
    args.rows = x.product(0, x.ndim() - 1) * groups;
    out.matches(0, x, 0, x.ndim() - 1);
    if (out.size(-3) != groups || out.size(-2) != 2 || out.size(-1) != args.width)
        fail(out.describe() + " must be [..., groups, 2, channels in a group]");
    args.x = x.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(sides, args);
}

}  // namespace

void register_phases(py::module_& m) {
    m.def("sides", &sides);
    m.def("select_phases", &select_phases);
}

}  // namespace rf
