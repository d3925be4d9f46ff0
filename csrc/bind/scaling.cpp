// Bindings: mass, rescale, rescale_parts, merge, scale_by, ratio, gate, affine_pullback, centring.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

MergeArgs prepare(const TensorView& first, bool contrast, int threads) {
    check_coefficient(first, contrast);
    MergeArgs args{};
    set_sizes(args, first);
    args.parts = 1;
    args.part_width = args.inner;
    args.contrast = contrast;
    args.first = first.operand();
    args.threads = threads;
    return args;
}

void run(const MergeArgs& args) {
    py::gil_scoped_release release;
    RF_CALL(merge, args);
}

void mass(py::handle x_, py::handle c_, bool contrast, py::handle mass_, int threads) {
    const TensorView x(x_, "x"), c(c_, "c"), mass(mass_, "mass");
    MergeArgs args = prepare(c, contrast, threads);
    check_samples(x, c);
    check_mass(mass, c);
    args.a = x.operand();
    args.mass = mass.operand();
    run(args);
}

void rescale(py::handle c_, py::handle scale_, bool contrast, py::handle out_, int threads) {
    const TensorView c(c_, "c"), scale(scale_, "scale"), out(out_, "out");
    MergeArgs args = prepare(c, contrast, threads);
    c.same_layout(1, out, 1);
    check_output(out, c);
    check_per_sample(scale, c);
    args.first_scale = scale.operand();
    args.out = out.operand();
    run(args);
}

void rescale_parts(py::handle c_, py::handle scale_, bool contrast, py::handle out_, int threads) {
    const TensorView c(c_, "c"), scale(scale_, "scale"), out(out_, "out");
    MergeArgs args = prepare(c, contrast, threads);
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

void merge(py::handle first_, py::handle first_scale_, py::handle second_, py::handle second_scale_,
           bool contrast, py::handle out_, int threads) {
    const TensorView first(first_, "first"), first_scale(first_scale_, "first_scale");
    const TensorView second(second_, "second"), second_scale(second_scale_, "second_scale"), out(out_, "out");
    MergeArgs args = prepare(first, contrast, threads);
    check_readers(first, first_scale, second, second_scale);
    args.first_scale = first_scale.operand();
    args.second = second.operand();
    args.second_scale = second_scale.operand();
    check_output(out, first);
    args.out = out.operand();
    run(args);
}

// Checks the gain and shift of c's channels, the innermost axis; both or none are given.
void check_channels(const std::optional<TensorView>& gain, const std::optional<TensorView>& shift,
                    const TensorView& c) {
    if (gain.has_value() != shift.has_value()) fail("gain and shift belong together");
    if (gain) check_channels(*gain, *shift, c);
}

void multiply(const TensorView& c, const TensorView& factor, py::handle n_scale_,
              const std::optional<TensorView>& gain, const std::optional<TensorView>& shift, bool gate,
              const TensorView& out, int threads) {
    const auto n_scale = optional_view(n_scale_, "n_scale");
    check_coefficient(c, n_scale.has_value());
    if (n_scale) n_scale->shaped({c.size(0) / 2, c.size(1)}).contiguous();
    check_channels(gain, shift, c);
    check_samples(factor, c);
    check_output(out, c);
    ScaleArgs args{};
    set_sizes(args, c);
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

void scale_by(py::handle c, py::handle factor, py::handle n_scale, py::handle out, int threads) {
    multiply({c, "c"}, {factor, "factor"}, n_scale, {}, {}, false, {out, "out"}, threads);
}

void ratio(py::handle c_, py::handle z_, py::handle d_, double stabilizer, int side, py::handle out_,
           int threads) {
    const TensorView c(c_, "c"), z(z_, "z"), d(d_, "d"), out(out_, "out");
    check_coefficient(c, false);
    check_samples(z, c);
    check_samples(d, c);
    check_output(out, c);
    if (side < -1 || side > 1) fail("side must be -1, 0 or 1");
    RatioArgs args{};
    set_sizes(args, c);
    args.stabilizer = stabilizer;
    args.side = side;
    args.c = c.operand();
    args.z = z.operand();
    args.d = d.operand();
    args.out = out.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(ratio, args);
}

void gate(py::handle c, py::handle x, py::handle n_scale, py::handle out, int threads) {
    multiply({c, "c"}, {x, "x"}, n_scale, {}, {}, true, {out, "out"}, threads);
}

void affine_pullback(py::handle c, py::handle y, py::handle gain, py::handle shift, bool relu,
                     py::handle n_scale, py::handle out, int threads) {
    multiply({c, "c"}, {y, "y"}, n_scale, TensorView(gain, "gain"), TensorView(shift, "shift"), relu,
             {out, "out"}, threads);
}

void centring(py::handle c_, py::handle factor_, py::handle gain_, py::handle shift_, bool gate,
              std::int64_t runs, std::int64_t step, py::handle out_, int threads) {
    const TensorView c(c_, "c"), out(out_, "out");
    const auto factor = optional_view(factor_, "factor");
    const auto gain = optional_view(gain_, "gain"), shift = optional_view(shift_, "shift");
    check_coefficient(c, true);
    c.same_layout(1, c, 1);
    if (factor) check_samples(*factor, c);
    if (gain && !factor) fail("gain and shift belong to a factor");
    check_channels(gain, shift, c);
    out.shaped({c.size(0) / 2, c.size(1)}).contiguous();
    if (out.dtype() == DType::bf16) fail(out.describe() + " must be float32 or float64");
    CentringArgs args{};
    set_sizes(args, c);
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

}  // namespace

void register_scaling(py::module_& m) {
    m.def("mass", &mass);
    m.def("rescale", &rescale);
    m.def("rescale_parts", &rescale_parts);
    m.def("merge", &merge);
    m.def("scale_by", &scale_by);
    m.def("ratio", &ratio);
    m.def("gate", &gate);
    m.def("affine_pullback", &affine_pullback);
    m.def("centring", &centring);
}

}  // namespace rf
