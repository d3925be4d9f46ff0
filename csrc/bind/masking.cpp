// Bindings: mask_steps, masked_copies.
#include <algorithm>
#include <limits>
#include <vector>

#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();

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
                   std::int64_t last, bool reveal, py::handle out_, bool channels_last, int threads) {
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
    baseline.matches(1, images, 1, 3);
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

}  // namespace

void register_masking(py::module_& m) {
    m.def("mask_steps", &mask_steps);
    m.def("masked_copies", &masked_copies);
}

}  // namespace rf
