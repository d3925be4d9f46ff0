// Bindings: mass, rescale, rescale_parts, merge, junction, merge_junction, residual_pullback.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

CombineArgs prepare(const TensorView& first, bool contrast, int threads) {
    check_coefficient(first, contrast);
    CombineArgs args{};
    args.rhs = first.size(0);
    args.batch = first.size(1);
    args.inner = first.product(2, first.ndim());
    args.parts = 1;
    args.part_width = args.inner;
    args.contrast = contrast;
    args.first = first.operand();
    args.threads = threads;
    return args;
}

void run(const CombineArgs& args) {
    py::gil_scoped_release release;
    RF_CALL(combine, args);
}

void mass(py::handle x_, py::handle c_, py::handle mass_, bool contrast, int threads) {
    const TensorView x(x_, "x"), c(c_, "c"), mass(mass_, "mass");
    CombineArgs args = prepare(c, contrast, threads);
    c.same_layout(1, x, 0);
    x.same_layout(0, c, 1);
    check_mass(mass, c);
    args.a = x.operand();
    args.mass = mass.operand();
    run(args);
}

void rescale(py::handle c_, py::handle scale_, py::handle out_, bool contrast, int threads) {
    const TensorView c(c_, "c"), scale(scale_, "scale"), out(out_, "out");
    CombineArgs args = prepare(c, contrast, threads);
    c.same_layout(1, out, 1);
    out.same_layout(1, c, 1).matches(0, c, 0, 1);
    check_per_sample(scale, c);
    args.first_scale = scale.operand();
    args.out = out.operand();
    run(args);
}

void rescale_parts(py::handle c_, py::handle scale_, py::handle out_, bool contrast, int threads) {
    const TensorView c(c_, "c"), scale(scale_, "scale"), out(out_, "out");
    CombineArgs args = prepare(c, contrast, threads);
    if (c.ndim() != 5) fail(c.describe() + " must be [T, B, rows, parts, width]");
    c.contiguous();
    out.matches(0, c, 0, 5).contiguous();
    scale.shaped({c.size(0), c.size(1), c.size(3)}).contiguous();
    args.parts = c.size(3);
    args.part_width = c.size(4);
    args.first_scale = scale.operand();
    args.out = out.operand();
    run(args);
}

void check_merge(const TensorView& first, const TensorView& first_scale, const TensorView& second,
                 const TensorView& second_scale) {
    first.same_layout(1, second, 1);
    second.same_layout(1, first, 1).matches(0, first, 0, 1);
    check_per_sample(first_scale, first);
    check_per_sample(second_scale, first);
}

void merge(py::handle first_, py::handle first_scale_, py::handle second_, py::handle second_scale_,
           py::handle out_, bool contrast, int threads) {
    const TensorView first(first_, "first"), first_scale(first_scale_, "first_scale");
    const TensorView second(second_, "second"), second_scale(second_scale_, "second_scale"), out(out_, "out");
    CombineArgs args = prepare(first, contrast, threads);
    check_merge(first, first_scale, second, second_scale);
    args.first_scale = first_scale.operand();
    args.second = second.operand();
    args.second_scale = second_scale.operand();
    out.same_layout(1, first, 1).matches(0, first, 0, 1);
    args.out = out.operand();
    run(args);
}

// The arguments that the pull-backs of sums share. `second` and the scales are given together, or none.
SplitArgs prepare_split(const TensorView& first, const std::optional<TensorView>& first_scale,
                        const std::optional<TensorView>& second,
                        const std::optional<TensorView>& second_scale, bool contrast, int threads) {
    check_coefficient(first, contrast);
    if (first_scale.has_value() != second.has_value() || second_scale.has_value() != second.has_value())
        fail("second and the scales belong together");
    if (second) check_merge(first, *first_scale, *second, *second_scale);
    SplitArgs args{};
    args.rhs = first.size(0);
    args.batch = first.size(1);
    args.inner = first.product(2, first.ndim());
    args.contrast = contrast;
    args.first = first.operand();
    args.second = operand_or_null(second);
    args.first_scale = operand_or_null(first_scale);
    args.second_scale = operand_or_null(second_scale);
    args.threads = threads;
    return args;
}

void split(SplitArgs& args, const TensorView& c, py::handle a_, py::handle b_, py::handle c_a_,
           py::handle c_b_, py::handle mass_a_, py::handle mass_b_) {
    const TensorView a(a_, "a"), b(b_, "b"), c_a(c_a_, "c_a"), c_b(c_b_, "c_b");
    const TensorView mass_a(mass_a_, "mass_a"), mass_b(mass_b_, "mass_b");
    c.same_layout(1, a, 0);
    a.same_layout(0, c, 1);
    b.same_layout(0, c, 1);
    c_a.same_layout(1, c, 1).matches(0, c, 0, 1);
    c_b.same_layout(1, c, 1).matches(0, c, 0, 1);
    check_mass(mass_a, c);
    check_mass(mass_b, c);
    args.a = a.operand();
    args.b = b.operand();
    args.c_a = c_a.operand();
    args.c_b = c_b.operand();
    args.mass_a = mass_a.operand();
    args.mass_b = mass_b.operand();
    py::gil_scoped_release release;
    RF_CALL_ROUNDING(split, args);
}

void junction(py::handle c_, py::handle a, py::handle b, py::handle c_a, py::handle c_b, py::handle mass_a,
              py::handle mass_b, bool contrast, bool relu, int threads) {
    const TensorView c(c_, "c");
    SplitArgs args = prepare_split(c, std::nullopt, std::nullopt, std::nullopt, contrast, threads);
    args.relu = relu;
    split(args, c, a, b, c_a, c_b, mass_a, mass_b);
}

void merge_junction(py::handle first_, py::handle first_scale_, py::handle second_, py::handle second_scale_,
                    py::handle a, py::handle b, py::handle c_a, py::handle c_b, py::handle mass_a,
                    py::handle mass_b, bool contrast, bool relu, int threads) {
    const TensorView first(first_, "first"), second(second_, "second");
    const TensorView first_scale(first_scale_, "first_scale"), second_scale(second_scale_, "second_scale");
    SplitArgs args = prepare_split(first, first_scale, second, second_scale, contrast, threads);
    args.relu = relu;
    split(args, first, a, b, c_a, c_b, mass_a, mass_b);
}

void residual_pullback(py::handle first_, py::handle first_scale_, py::handle second_,
                       py::handle second_scale_, py::handle z, py::handle b, py::handle gain_,
                       py::handle shift_, py::handle c_x, py::handle c_b, py::handle mass_y,
                       py::handle mass_b, bool contrast, int threads) {
    const TensorView first(first_, "first"), gain(gain_, "gain"), shift(shift_, "shift");
    SplitArgs args =
        prepare_split(first, optional_view(first_scale_, "first_scale"), optional_view(second_, "second"),
                      optional_view(second_scale_, "second_scale"), contrast, threads);
    check_channels(gain, shift, first);
    args.channels = gain.size(0);
    args.gain = gain.operand();
    args.shift = shift.operand();
    split(args, first, z, b, c_x, c_b, mass_y, mass_b);
}

}  // namespace

void register_junction(py::module_& m) {
    m.def("mass", &mass);
    m.def("rescale", &rescale);
    m.def("rescale_parts", &rescale_parts);
    m.def("merge", &merge);
    m.def("junction", &junction);
    m.def("merge_junction", &merge_junction);
    m.def("residual_pullback", &residual_pullback);
}

}  // namespace rf
