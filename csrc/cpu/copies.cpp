// Masked copies of images: written as a whole, or advanced in place by some steps.
#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

using std::int32_t;
using std::uint32_t;

// Elements of one image that are copied for all steps while they are in the L1 cache.
constexpr int64_t kSpan = 2048;

template <class Word>
struct SignedOf;
template <>
struct SignedOf<std::uint16_t> {
    using type = std::int16_t;
};
template <>
struct SignedOf<std::uint32_t> {
    using type = std::int32_t;
};
template <>
struct SignedOf<std::uint64_t> {
    using type = std::int64_t;
};

// Steps at a time: what fits into the narrowest Step.
constexpr int32_t kMostSteps = 32766;

// Steps relative to `first`, cut to [0, kMostSteps], which no step of the range reaches.
template <class Step>
RF_INLINE void relative_steps(const int32_t* __restrict steps, int64_t n, int32_t first,
                              Step* __restrict out) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const int32_t after = (steps[i] > first ? steps[i] : first) - first;
        out[i] = static_cast<Step>(after < kMostSteps ? after : kMostSteps);
    }
}

// Elements [start, start + n) of an image whose channels have one value each.
template <class Word>
RF_INLINE void fill_span(const Word* of_channels, int64_t channels, int64_t pixels, bool channels_last,
                         int64_t start, int64_t n, Word* __restrict out) {
    if (channels_last) {
        for (int64_t i = 0; i < n; ++i) out[i] = of_channels[(start + i) % channels];
        return;
    }
    for (int64_t i = 0, run; i < n; i += run) {  // up to the end of a plane
        const Word value = of_channels[(start + i) / pixels];
        run = min64(n - i, pixels - (start + i) % pixels);
        for (int64_t j = 0; j < run; ++j) out[i + j] = value;
    }
}

// One span of one image. Words are the bits of the elements, which are moved and never computed with; steps
// are compared in the width of the words.
template <class Word>
void copies_of_span(int64_t index, const void* context, void*) {
    using Step = typename SignedOf<Word>::type;
    const MaskedCopiesArgs& args = *static_cast<const MaskedCopiesArgs*>(context);
    const int64_t size = args.channels * args.pixels, spans = ceil_div(size, kSpan);
    const int64_t b = index / spans, start = index % spans * kSpan, n = min64(kSpan, size - start);
    const Word* image = static_cast<const Word*>(args.images.data) + b * size + start;
    const Word* baseline = static_cast<const Word*>(args.baseline.data);
    Word values[kSpan];
    if (args.uniform_baseline) {
        const Word* of_channels = baseline + (args.shared_baseline ? 0 : b * args.channels);
        fill_span(of_channels, args.channels, args.pixels, args.channels_last, start, n, values);
        baseline = values;
    } else {
        baseline += (args.shared_baseline ? 0 : b * size) + start;
    }
    const Word* __restrict masked = args.reveal ? image : baseline;
    const Word* __restrict kept = args.reveal ? baseline : image;
    const int32_t* steps =
        static_cast<const int32_t*>(args.masked.data) + b * (args.shared ? args.pixels : size);
    Step relative[kSpan];
    for (int64_t first = args.first; first < args.last; first += kMostSteps) {
        const int32_t from = static_cast<int32_t>(first);
        if (!args.shared || args.channels == 1) {
            relative_steps(steps + start, n, from, relative);
        } else if (args.channels_last) {
            int64_t pixel = start / args.channels, channel = start % args.channels;
            for (int64_t i = 0; i < n; ++pixel, channel = 0) {
                Step step;
                relative_steps(steps + pixel, 1, from, &step);
                for (; channel < args.channels && i < n; ++channel) relative[i++] = step;
            }
        } else {
            for (int64_t i = 0, run; i < n; i += run) {  // up to the end of a plane
                const int64_t pixel = (start + i) % args.pixels;
                run = min64(n - i, args.pixels - pixel);
                relative_steps(steps + pixel, run, from, relative + i);
            }
        }
        const int64_t last = min64(args.last, first + kMostSteps);
        for (int64_t s = first; s < last; ++s) {
            Word* __restrict out =
                static_cast<Word*>(args.out.data) + ((s - args.first) * args.batch + b) * size + start;
            const Step step = static_cast<Step>(s - first);
            RF_SIMD
            for (int64_t i = 0; i < n; ++i) out[i] = relative[i] <= step ? masked[i] : kept[i];
        }
    }
}

// Parts of an image that are ordered in the same loop, with counters of their own: neighbours mostly have the
// same step, and with one counter each would wait for the increment before it.
constexpr int64_t kParts = 8;

// Entries of one image by their step, those of one step in ascending order.
template <int64_t parts>
void order_image(int64_t b, const void* context, void* memory) {
    const OrderByStepArgs& args = *static_cast<const OrderByStepArgs*>(context);
    const int32_t* __restrict steps = static_cast<const int32_t*>(args.masked.data) + b * args.count;
    int32_t* __restrict order = static_cast<int32_t*>(args.order.data) + b * args.count;
    int32_t* begins = static_cast<int32_t*>(args.begins.data) + b * (args.steps + 1);
    int32_t* __restrict next = static_cast<int32_t*>(memory);  // [steps + 1, parts]
    const int32_t last = static_cast<int32_t>(args.steps);
    const int64_t size = args.count / parts;
    // visit(entry, its counter), the entries of a part in ascending order
    const auto for_each = [=](const auto& visit) {
        const auto counter = [=](int64_t entry, int64_t part) {
            const int32_t step = steps[entry], bucket = step < 0 ? 0 : step > last ? last : step;
            return next + bucket * parts + part;
        };
        for (int64_t i = 0; i < size; ++i)
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t entry = part * size + i;
                visit(entry, counter(entry, part));
            }
        for (int64_t entry = parts * size; entry < args.count; ++entry)
            visit(entry, counter(entry, parts - 1));
    };
    for (int64_t i = 0; i < (last + 1) * parts; ++i) next[i] = 0;
    for_each([](int64_t, int32_t* count) { ++*count; });
    int32_t before = 0;
    for (int64_t i = 0; i < (last + 1) * parts; ++i) {
        const int32_t here = next[i];
        if (i % parts == 0) begins[i / parts] = before;
        next[i] = before;
        before += here;
    }
    for_each([=](int64_t entry, int32_t* place) { order[(*place)++] = static_cast<int32_t>(entry); });
}

// How many entries ahead are prefetched: they are scattered over the image, but their addresses are known.
constexpr int32_t kAhead = 24;

// One copy of one image. The order comes from the caller: entries that are not of the image are left out.
template <class Word>
void advance_copy(int64_t index, const void* context, void*) {
    const AdvanceCopiesArgs& args = *static_cast<const AdvanceCopiesArgs*>(context);
    const int64_t size = args.channels * args.pixels, entries = args.shared ? args.pixels : size;
    const int64_t copy = index / args.batch, b = index % args.batch;
    const int32_t* order = static_cast<const int32_t*>(args.order.data) + b * entries;
    const int32_t* begins = static_cast<const int32_t*>(args.begins.data) + b * (args.steps + 1);
    const Word* source = static_cast<const Word*>(args.source.data);
    if (!args.shared_source) source += b * (args.uniform_source ? args.channels : size);
    Word* __restrict out = static_cast<Word*>(args.out.data) + index * size;
    const auto within = [=](int32_t place) {
        return place < 0 ? 0 : place > entries ? static_cast<int32_t>(entries) : place;
    };
    const int64_t held = args.first + copy + 1;  // entries of steps before this one are masked already
    const int32_t begin = within(begins[held]), end = within(begins[held + args.by]);
    const int64_t repeats = args.shared ? args.channels : 1;
    const int64_t stride = args.channels_last ? 1 : args.pixels;
    const int64_t scale = args.shared && args.channels_last ? args.channels : 1;
    const uint32_t channels = static_cast<uint32_t>(args.channels);
    const uint32_t pixels = static_cast<uint32_t>(args.pixels);
    // Its plane, mostly that of the entry before it: a division takes as long as all the rest.
    uint32_t plane = 0, plane_begin = 0;
    const auto channel_of = [&](uint32_t entry) {
        if (args.channels_last) return channels == 3 ? entry % 3 : entry % channels;
        if (entry - plane_begin >= pixels) {
            plane = entry / pixels;
            plane_begin = plane * pixels;
        }
        return plane;
    };
    // write(entry, where its first element lies)
    const auto for_each = [=](const Word* also_read, const auto& write) {
        for (int32_t i = begin; i < end; ++i) {
            if (i + kAhead < end) {
                const int64_t next = order[i + kAhead] * scale;
                __builtin_prefetch(out + next, 1);
                if (also_read != nullptr) __builtin_prefetch(also_read + next, 0);
            }
            const uint32_t entry = static_cast<uint32_t>(order[i]);
            if (entry < entries) write(entry, entry * scale);
        }
    };
    if (!args.uniform_source)
        for_each(source, [=](uint32_t, int64_t at) {
            for (int64_t c = 0; c < repeats; ++c) out[at + c * stride] = source[at + c * stride];
        });
    else if (args.shared)
        for_each(nullptr, [=](uint32_t, int64_t at) {
            for (int64_t c = 0; c < repeats; ++c) out[at + c * stride] = source[c];
        });
    else
        for_each(nullptr, [&](uint32_t entry, int64_t at) { out[at] = source[channel_of(entry)]; });
}

}  // namespace

void masked_copies(const MaskedCopiesArgs& args) {
    const int64_t size = args.channels * args.pixels;
    const Task task = args.images.dtype == DType::f64   ? copies_of_span<std::uint64_t>
                      : args.images.dtype == DType::f32 ? copies_of_span<uint32_t>
                                                        : copies_of_span<std::uint16_t>;
    parallel_for(args.batch * ceil_div(size, kSpan), args.batch * size * (args.last - args.first),
                 args.threads, task, &args, 0);
}

void order_by_step(const OrderByStepArgs& args) {
    const bool few = (args.steps + 1) * kParts <= args.count;  // counters would take longer than entries
    parallel_for(args.batch, args.batch * args.count, args.threads,
                 few ? order_image<kParts> : order_image<1>, &args,
                 (args.steps + 1) * (few ? kParts : 1) * sizeof(int32_t));
}

void advance_copies(const AdvanceCopiesArgs& args) {
    const int64_t size = args.channels * args.pixels;
    const Task task = args.out.dtype == DType::f64   ? advance_copy<std::uint64_t>
                      : args.out.dtype == DType::f32 ? advance_copy<uint32_t>
                                                     : advance_copy<std::uint16_t>;
    // estimated as if all steps masked equally many entries
    const int64_t work = args.steps == 0 ? 0 : args.copies * args.batch * size * args.by / args.steps;
    parallel_for(args.copies * args.batch, work, args.threads, task, &args, 0);
}

}  // namespace rf::RF_ISA
