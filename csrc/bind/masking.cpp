// Bindings: mask_steps, masked_copies, order_by_step, advance_copies.
#include <algorithm>
#include <limits>
#include <vector>

#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();

// Of [B, C, H, W] or [B, H, W, C], whose axis of channels is given.
bool has_one_pixel(const TensorView& view, int channels) {
    const int height = channels == 1 ? 2 : 1;
    return view.product(height, height + 2) == 1;
}

void mask_steps(py::handle scores_, const std::vector<std::int64_t>& ks, bool descending, py::handle out_,
                int threads) {
    const TensorView scores(scores_, "scores"), out(out_, "out", Elements::int32);
    if (scores.ndim() != 2) fail(scores.describe() + " must be [B, N]");
    out.same_shape(scores);
    if (scores.size(1) > kLargest || static_cast<std::int64_t>(ks.size()) > kLargest)
        fail(scores.describe() + ": indices and steps are int32");
    if (!std::is_sorted(ks.begin(), ks.end())) fail("ks must be in ascending order");
    MaskStepsArgs args{};
    args.batch = scores.size(0);
    args.count = scores.size(1);
    args.steps = static_cast<std::int64_t>(ks.size());
    args.descending = descending;
    args.ks = ks.data();
    args.scores = scores.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(mask_steps, args);
}

void masked_copies(py::handle images_, py::handle steps_, py::handle baseline_, std::int64_t first,
                   std::int64_t last, bool reveal, bool channels_last, py::handle out_, int threads) {
    const TensorView images(images_, "images"), steps(steps_, "steps", Elements::int32);
    const TensorView baseline(baseline_, "baseline"), out(out_, "out");
    if (images.ndim() != 4 || steps.ndim() != 4 || baseline.ndim() != 4 || out.ndim() != 5)
        fail("images, steps and baseline must be [B, C, H, W], or [B, H, W, C] with channels_last: " +
             images.describe() + ", " + steps.describe() + ", " + baseline.describe() + ", " +
             out.describe());
    if (first < 0 || last < first || last > kLargest)
        fail("steps " + std::to_string(first) + " to " + std::to_string(last) + " are no range of steps");
    const int channels = channels_last ? 3 : 1, height = channels_last ? 1 : 2;
    MaskedCopiesArgs args{};
    args.batch = images.size(0);
    args.channels = images.size(channels);
    args.pixels = images.product(height, height + 2);
    args.first = first;
    args.last = last;
    args.shared = steps.size(channels) == 1;
    if (!args.shared) steps.matches(channels, images, channels, 1);
    steps.matches(0, images, 0, 1).matches(height, images, height, 2);
    args.shared_baseline = baseline.size(0) == 1;
    if (!args.shared_baseline) baseline.matches(0, images, 0, 1);
    args.uniform_baseline = has_one_pixel(baseline, channels) && args.pixels != 1;
    baseline.matches(channels, images, channels, 1);
    if (!args.uniform_baseline) baseline.matches(1, images, 1, 3);
    out.matches(1, images, 0, 4);
    if (out.size(0) != last - first)
        fail(out.describe() + " must hold " + std::to_string(last - first) + " steps");
    if (baseline.dtype() != images.dtype() || out.dtype() != images.dtype())
        fail("images, baseline and out must have one dtype");
    args.channels_last = channels_last;
    args.reveal = reveal;
    args.images = images.contiguous().operand();
    args.masked = steps.contiguous().operand();
    args.baseline = baseline.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(masked_copies, args);
}

void order_by_step(py::handle steps_, py::handle order_, py::handle begins_, int threads) {
    const TensorView steps(steps_, "steps", Elements::int32), order(order_, "order", Elements::int32);
    const TensorView begins(begins_, "begins", Elements::int32);
    if (steps.ndim() != 2) fail(steps.describe() + " must be [B, N]");
    if (steps.size(1) > kLargest) fail(steps.describe() + ": indices are int32");
    order.same_shape(steps);
    if (begins.ndim() != 2 || begins.size(1) < 1 || begins.size(1) > kLargest)
        fail(begins.describe() + " must be [B, steps + 1]");
    begins.matches(0, steps, 0, 1);
    OrderByStepArgs args{};
    args.batch = steps.size(0);
    args.count = steps.size(1);
    args.steps = begins.size(1) - 1;
    args.masked = steps.contiguous().operand();
    args.order = order.contiguous().operand();
    args.begins = begins.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(order_by_step, args);
}

void advance_copies(py::handle source_, py::handle order_, py::handle begins_, std::int64_t first,
                    std::int64_t by, bool channels_last, py::handle out_, int threads) {
    const TensorView source(source_, "source"), out(out_, "out");
    const TensorView order(order_, "order", Elements::int32), begins(begins_, "begins", Elements::int32);
    if (source.ndim() != 4 || out.ndim() != 5)
        fail(
            "source must be [B or 1, C, H, W] or [B or 1, C, 1, 1], out [K, B, C, H, W], with channels_last "
            "C behind W: " +
            source.describe() + ", " + out.describe());
    if (order.ndim() != 2 || begins.ndim() != 2)
        fail(order.describe() + " must be [B, entries], " + begins.describe() + " [B, steps + 1]");
    const int channels = channels_last ? 4 : 2, height = channels_last ? 2 : 3;
    AdvanceCopiesArgs args{};
    args.copies = out.size(0);
    args.batch = out.size(1);
    args.channels = out.size(channels);
    args.pixels = out.product(height, height + 2);
    args.first = first;
    args.by = by;
    args.steps = begins.size(1) - 1;
    if (first < 0 || by < 0 || first > args.steps || by > args.steps || first + args.copies + by > args.steps)
        fail(std::to_string(args.copies) + " copies from step " + std::to_string(first) + " on cannot go " +
             std::to_string(by) + " of " + std::to_string(args.steps) + " steps further");
    args.shared_source = source.size(0) == 1;
    if (!args.shared_source) source.matches(0, out, 1, 1);
    args.uniform_source = has_one_pixel(source, channels - 1) && args.pixels != 1;
    source.matches(channels - 1, out, channels, 1);
    if (!args.uniform_source) source.matches(1, out, 2, 3);
    if (source.dtype() != out.dtype()) fail("source and out must have one dtype");
    order.matches(0, out, 1, 1);
    begins.matches(0, out, 1, 1);
    args.shared = order.size(1) == args.pixels;
    if (!args.shared && order.size(1) != args.channels * args.pixels)
        fail(order.describe() + " must have an entry for every pixel or for every channel of them");
    args.channels_last = channels_last;
    args.source = source.contiguous().operand();
    args.order = order.contiguous().operand();
    args.begins = begins.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(advance_copies, args);
}

}  // namespace

void register_masking(py::module_& m) {
    m.def("mask_steps", &mask_steps);
    m.def("masked_copies", &masked_copies);
    m.def("order_by_step", &order_by_step);
    m.def("advance_copies", &advance_copies);
}

}  // namespace rf
