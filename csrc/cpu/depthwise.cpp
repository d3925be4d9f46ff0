// Depthwise convolutions and their transposes, channels innermost: every output is a short sum over its
// window, for many channels at once. Both maps of a pair are computed together, from one read of the weights.
#include "cpu/lanes.h"

namespace rf::RF_ISA {
namespace {

// Which entries of the source an output coordinate has in its window along one axis.
struct Taps {
    int64_t count, source[kMostTaps], weight[kMostTaps];
};

RF_INLINE void find_taps(const DepthwiseArgs& args, int axis, int64_t out, Taps& taps) {
    const int64_t stride = args.stride[axis], size = args.in_size[axis];
    taps.count = 0;
    for (int64_t k = 0; k < args.kernel[axis]; ++k) {
        const int64_t reach = k * args.dilation[axis] - args.padding[axis];
        int64_t source = out * stride + reach;
        if (args.transposed) {
            if (out - reach < 0 || (out - reach) % stride) continue;
            source = (out - reach) / stride;
        }
        if (source < 0 || source >= size) continue;
        taps.source[taps.count] = source;
        taps.weight[taps.count++] = k;
    }
}

// One pixel of the output: where its window is.
struct Pixel {
    const DepthwiseArgs& args;
    const Taps &rows, &columns;
    int64_t b, out;  // sample, and number of the pixel within it
};

// Which half of the weights counts: there is one; by the sign of the output's x; by that of the source.
enum class Half { only, by_x, by_source };

// `count` vectors of channels from `channel` on, of `maps` maps from `map` on.
template <class V, DType dtype, int count, int maps, Half by>
RF_INLINE void convolve(const Pixel& pixel, int64_t map, int64_t channel) {
    constexpr int64_t lanes = sizeof(V) / sizeof(float);
    const DepthwiseArgs& args = pixel.args;
    const int64_t channels = args.channels, line = args.in_size[1] * channels;
    const int64_t image = args.in_size[0] * line;
    const Operand source{args.source.data, dtype}, weight{args.weight.data, DType::f32};
    const int64_t half = args.kernel[0] * args.kernel[1] * channels;
    V sums[maps][count], x[count];
    for (int i = 0; i < count; ++i) {
        if constexpr (by == Half::by_x)
            x[i] = read<V>(args.x, (pixel.b * args.out_size[0] * args.out_size[1] + pixel.out) * channels +
                                       channel + i * lanes);
        for (int t = 0; t < maps; ++t) sums[t][i] = V{};
    }
    const int64_t first = (map * args.batch + pixel.b) * image + channel;
    for (int64_t r = 0; r < pixel.rows.count; ++r) {
        const int64_t from_line = first + pixel.rows.source[r] * line;
        const int64_t weight_line = pixel.rows.weight[r] * args.kernel[1];
        for (int64_t s = 0; s < pixel.columns.count; ++s) {
            const int64_t from = from_line + pixel.columns.source[s] * channels;
            const int64_t tap = (weight_line + pixel.columns.weight[s]) * channels + channel;
            for (int i = 0; i < count; ++i) {
                V w = read<V>(weight, tap + i * lanes), other{};
                if constexpr (by != Half::only) other = read<V>(weight, half + tap + i * lanes);
                if constexpr (by == Half::by_x) w = x[i] > 0.0f ? w : other;
                for (int t = 0; t < maps; ++t) {
                    const V value = read<V>(source, from + t * args.batch * image + i * lanes);
                    if constexpr (by == Half::by_source)
                        sums[t][i] += (value > 0.0f ? w : other) * value;
                    else
                        sums[t][i] += w * value;
                }
            }
        }
    }
    const int64_t out_image = args.out_size[0] * args.out_size[1] * channels;
    for (int t = 0; t < maps; ++t) {
        const int64_t to = ((map + t) * args.batch + pixel.b) * out_image + pixel.out * channels + channel;
        for (int i = 0; i < count; ++i) {
            V y = sums[t][i];
            if constexpr (by == Half::by_x) y = x[i] == x[i] ? (x[i] != 0.0f ? y : V{}) : V{};
            if (args.bias.data) y += read<V>(args.bias, channel + i * lanes);
            if (args.relu) y = y < 0.0f ? V{} : y;  // NaN stays
            write<V>(args.out, to + i * lanes, y, false);
        }
    }
}

// All channels of a pixel. Where the last vector would be a part of one, it begins earlier.
template <DType dtype, int maps, Half by>
RF_INLINE void all_channels(const Pixel& pixel, int64_t map) {
    const int64_t channels = pixel.args.channels;
    if (channels < kLanes) {
        for (int64_t c = 0; c < channels; ++c) convolve<float, dtype, 1, maps, by>(pixel, map, c);
        return;
    }
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) convolve<Lanes, dtype, 4, maps, by>(pixel, map, c);
    for (; c < channels; c += kLanes)
        convolve<Lanes, dtype, 1, maps, by>(pixel, map, min64(c, channels - kLanes));
}

// One line of the output of one sample.
template <DType dtype, Half by>
void convolve_line(int64_t index, const void* context, void*) {
    const DepthwiseArgs& args = *static_cast<const DepthwiseArgs*>(context);
    const int64_t b = index / args.out_size[0], y = index % args.out_size[0];
    Taps rows, columns;
    find_taps(args, 0, y, rows);
    for (int64_t x = 0; x < args.out_size[1]; ++x) {
        find_taps(args, 1, x, columns);
        const Pixel pixel{args, rows, columns, b, y * args.out_size[1] + x};
        int64_t map = 0;
        for (; map + 2 <= args.num_maps; map += 2) all_channels<dtype, 2, by>(pixel, map);
        if (map < args.num_maps) all_channels<dtype, 1, by>(pixel, map);
    }
}

template <Half by>
Task task_for(DType source) {
    return source == DType::bf16 ? convolve_line<DType::bf16, by> : convolve_line<DType::f32, by>;
}

}  // namespace

void depthwise(const DepthwiseArgs& args) {
    const DType dtype = args.source.dtype;
    const Task task = args.x.data      ? task_for<Half::by_x>(dtype)
                      : args.by_source ? task_for<Half::by_source>(dtype)
                                       : task_for<Half::only>(dtype);
    const int64_t outputs = args.num_maps * args.batch * args.out_size[0] * args.out_size[1] * args.channels;
    parallel_for(args.batch * args.out_size[0], outputs * args.kernel[0] * args.kernel[1], args.threads, task,
                 &args, 0);
}

}  // namespace rf::RF_ISA
