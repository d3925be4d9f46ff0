// Bindings: junction, merge_junction, residual_pullback.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

// The arguments that the pull-backs of sums share. `second` and the scales are given together, or none.
JunctionArgs prepare(const TensorView& first, const std::optional<TensorView>& first_scale,
                     const std::optional<TensorView>& second, const std::optional<TensorView>& second_scale,
                     bool contrast, int threads) {
    check_coefficient(first, contrast);
    if (first_scale.has_value() != second.has_value() || second_scale.has_value() != second.has_value())
        fail("second and the scales belong together");
    if (second) check_readers(first, *first_scale, *second, *second_scale);
    JunctionArgs args{};
    set_sizes(args, first);
    args.contrast = contrast;
    args.first = first.operand();
    args.second = operand_or_null(second);
    args.first_scale = operand_or_null(first_scale);
    args.second_scale = operand_or_null(second_scale);
    args.threads = threads;
    return args;
}

void run(JunctionArgs& args, const TensorView& c, py::handle a_, py::handle b_, py::handle c_a_,
         py::handle c_b_, py::handle mass_a_, py::handle mass_b_) {
    const TensorView a(a_, "a"), b(b_, "b"), c_a(c_a_, "c_a"), c_b(c_b_, "c_b");
    const TensorView mass_a(mass_a_, "mass_a"), mass_b(mass_b_, "mass_b");
    check_samples(a, c);
    check_samples(b, c);
    check_output(c_a, c);
    check_output(c_b, c);
    check_mass(mass_a, c);
    check_mass(mass_b, c);
    args.a = a.operand();
    args.b = b.operand();
    args.c_a = c_a.operand();
    args.c_b = c_b.operand();
    args.mass_a = mass_a.operand();
    args.mass_b = mass_b.operand();
    py::gil_scoped_release release;
    RF_CALL_ROUNDING(junction, args);
}

void junction(py::handle c_, py::handle a, py::handle b, bool contrast, bool relu, py::handle c_a,
              py::handle c_b, py::handle mass_a, py::handle mass_b, int threads) {
    const TensorView c(c_, "c");
    JunctionArgs args = prepare(c, std::nullopt, std::nullopt, std::nullopt, contrast, threads);
    args.relu = relu;
    run(args, c, a, b, c_a, c_b, mass_a, mass_b);
}

void merge_junction(py::handle first_, py::handle first_scale_, py::handle second_, py::handle second_scale_,
                    py::handle a, py::handle b, bool contrast, bool relu, py::handle c_a, py::handle c_b,
                    py::handle mass_a, py::handle mass_b, int threads) {
    const TensorView first(first_, "first"), second(second_, "second");
    const TensorView first_scale(first_scale_, "first_scale"), second_scale(second_scale_, "second_scale");
    JunctionArgs args = prepare(first, first_scale, second, second_scale, contrast, threads);
    args.relu = relu;
    run(args, first, a, b, c_a, c_b, mass_a, mass_b);
}

void residual_pullback(py::handle first_, py::handle first_scale_, py::handle second_,
                       py::handle second_scale_, py::handle z, py::handle b, py::handle gain_,
                       py::handle shift_, bool contrast, py::handle c_x, py::handle c_b, py::handle mass_y,
                       py::handle mass_b, int threads) {
    const TensorView first(first_, "first"), gain(gain_, "gain"), shift(shift_, "shift");
    JunctionArgs args =
        prepare(first, optional_view(first_scale_, "first_scale"), optional_view(second_, "second"),
                optional_view(second_scale_, "second_scale"), contrast, threads);
    check_channels(gain, shift, first);
    args.channels = gain.size(0);
    args.gain = gain.operand();
    args.shift = shift.operand();
    run(args, first, z, b, c_x, c_b, mass_y, mass_b);
}

}  // namespace

void register_junction(py::module_& m) {
    m.def("junction", &junction);
    m.def("merge_junction", &merge_junction);
    m.def("residual_pullback", &residual_pullback);
}

}  // namespace rf
