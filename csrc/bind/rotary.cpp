// Bindings: rotary, rotary_pullback.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

// [B, H, N, D] or, with `maps`, [T, B, H, N, D].
StridedOperand strided(const TensorView& x, bool maps) {
    if (x.size(-1) > 1 && x.stride(-1) != 1) fail(x.describe() + " must be contiguous along its last axis");
    const int first = maps ? 1 : 0;
    return {x.operand(), {maps ? x.stride(0) : 0, x.stride(first), x.stride(first + 1), x.stride(first + 2)}};
}

// Checks what both have, and sets it.
void set_map(RotaryArgs& args, const TensorView& x, const TensorView& stay, const TensorView& cross,
             int pair) {
    if (x.ndim() != 4) fail(x.describe() + " must be [B, H, N, D]");
    if (stay.ndim() != 3) fail(stay.describe() + " must be [H or 1, rows, D]");
    args.batch = x.size(0);
    args.heads = x.size(1);
    args.rows = x.size(2);
    args.width = x.size(3);
    args.weight_heads = stay.size(0);
    args.first = args.rows - stay.size(1);
    if (args.weight_heads != 1 && args.weight_heads != args.heads)
        fail(stay.describe() + " must be of one head, or of those of " + x.describe());
    if (args.first < 0 || stay.size(2) != args.width) fail(stay.describe() + " does not fit " + x.describe());
    cross.same_shape(stay).contiguous();
    stay.contiguous();
    if (pair < 1 || args.width % (2 * static_cast<std::int64_t>(pair)) != 0)
        fail("the last axis of " + x.describe() + " has no pairs " + std::to_string(pair) + " apart");
    args.pair = pair;
    args.stay = stay.operand();
    args.cross = cross.operand();
    args.x = strided(x, false);
}

void rotary(py::handle x_, py::handle stay_, py::handle cross_, int pair, py::handle y_, int threads) {
    const TensorView x(x_, "x"), stay(stay_, "stay"), cross(cross_, "cross"), y(y_, "y");
    RotaryArgs args{};
    set_map(args, x, stay, cross, pair);
    y.same_shape(x);
    args.y = strided(y, false);
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL_ROUNDING(rotary, args);
}

void rotary_pullback(py::handle c_, py::handle x_, py::handle y_, py::handle stay_, py::handle cross_,
                     int pair, py::handle target_, bool contrast, py::handle out_, py::handle mass_,
                     int threads) {
    const TensorView c(c_, "c"), x(x_, "x"), stay(stay_, "stay"), cross(cross_, "cross"),
        target(target_, "target"), out(out_, "out"), mass(mass_, "mass");
    const auto y = optional_view(y_, "y");
    RotaryArgs args{};
    set_map(args, x, stay, cross, pair);
    check_coefficient(c, contrast);
    c.shaped({c.size(0), args.batch, args.heads, args.rows, args.width});
    out.same_shape(c);
    if (y) y->same_shape(x);
    if (!y && args.first > 0) fail("rows that are not turned need y");
    check_per_sample(target, c);
    check_mass(mass, c);
    args.num_maps = c.size(0);
    args.contrast = contrast;
    if (y) args.y = strided(*y, false);
    args.c = strided(c, true);
    args.out = strided(out, true);
    args.target = target.operand();
    args.mass = mass.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL_ROUNDING(rotary_pullback, args);
}

}  // namespace

void register_rotary(py::module_& m) {
    m.def("rotary", &rotary);
    m.def("rotary_pullback", &rotary_pullback);
}

}  // namespace rf
