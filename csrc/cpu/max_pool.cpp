// The pull-back of max-pooling, channels innermost: the largest input of a window gets the window's
// coefficient. Where windows tile the image it is found again, the first of equals (the coefficient is
// multiplied by its value if not `divided`); for others `unpool` gets the indices.
#include "cpu/lanes.h"

namespace rf::RF_ISA {
namespace {

template <class F>
void zero(const Operand& out, int64_t offset, int64_t count) {
    F buffer[kBlock];
    for (int64_t start = 0; start < count; start += kBlock) {
        const int64_t n = min64(kBlock, count - start);
        F* to = target(out, offset + start, buffer);
        for (int64_t i = 0; i < n; ++i) to[i] = F(0);
        commit(out, offset + start, n, buffer);
    }
}

// One row of windows of one sample, for all maps.
template <class F>
void pool_row(int64_t index, const void* context, void*) {
    const MaxPoolArgs& args = *static_cast<const MaxPoolArgs*>(context);
    const int64_t out_height = args.height / args.kernel_height, out_width = args.width / args.kernel_width;
    const int64_t channels = args.channels, line = args.width * channels, plane = args.height * line;
    const int64_t b = index / out_height, top = index % out_height;
    const int64_t first_line = b * plane + top * args.kernel_height * line, map_stride = args.batch * plane;
    F in[kBlock], best[kBlock], value[kBlock], out_buffer[kBlock];
    std::int32_t winner[kBlock];
    for (int64_t left = 0; left < out_width; ++left) {
        const int64_t corner = first_line + left * args.kernel_width * channels;
        for (int64_t start = 0; start < channels; start += kBlock) {
            const int64_t n = min64(kBlock, channels - start);
            for (int64_t y = 0, tap = 0; y < args.kernel_height; ++y)
                for (int64_t z = 0; z < args.kernel_width; ++z, ++tap) {
                    const F* __restrict x = load(args.x, corner + y * line + z * channels + start, n, in);
                    const std::int32_t number = static_cast<std::int32_t>(tap);
                    RF_SIMD
                    for (int64_t i = 0; i < n; ++i) {
                        const bool larger = tap == 0 || x[i] > best[i] || x[i] != x[i];
                        best[i] = larger ? x[i] : best[i];
                        winner[i] = larger ? number : winner[i];
                    }
                }
            for (int64_t t = 0; t < args.num_maps; ++t) {
                const int64_t from =
                    (((t * args.batch + b) * out_height + top) * out_width + left) * channels;
                const F* __restrict c = load(args.c, from + start, n, in);
                RF_SIMD
                for (int64_t i = 0; i < n; ++i) value[i] = args.divided ? c[i] : c[i] * best[i];
                for (int64_t y = 0, tap = 0; y < args.kernel_height; ++y)
                    for (int64_t z = 0; z < args.kernel_width; ++z, ++tap) {
                        const int64_t at = t * map_stride + corner + y * line + z * channels + start;
                        const std::int32_t number = static_cast<std::int32_t>(tap);
                        F* __restrict out = target(args.out, at, out_buffer);
                        RF_SIMD
                        for (int64_t i = 0; i < n; ++i) out[i] = winner[i] == number ? value[i] : F(0);
                        commit(args.out, at, n, out_buffer);
                    }
            }
        }
    }
    // What no window covers: the end of these lines, and below the last windows the rest of the image.
    const int64_t covered = out_width * args.kernel_width * channels;
    for (int64_t t = 0; t < args.num_maps; ++t) {
        for (int64_t y = 0; y < args.kernel_height; ++y)
            zero<F>(args.out, t * map_stride + first_line + y * line + covered, line - covered);
        const int64_t below = (out_height * args.kernel_height) * line;
        if (top + 1 == out_height) zero<F>(args.out, t * map_stride + b * plane + below, plane - below);
    }
}

using Numbers = std::int32_t __attribute__((vector_size(64), aligned(4), may_alias));

// Rows and columns of windows: [top, bottom), [left, right).
struct Windows {
    int64_t top, bottom, left, right;
};

// Channels [first, last) of pixel `here`, which lies at `at` in the result and is seen by these windows.
template <class V, class N, class F>
RF_INLINE void unpool_span(const UnpoolArgs& args, const Windows& seen, int64_t b, int64_t sample,
                           std::int32_t here, int64_t at, int64_t first, int64_t last) {
    const int64_t windows = args.rows * args.columns;
    const std::int32_t* const indices = static_cast<const std::int32_t*>(args.indices.data);
    for (int64_t i = first; i < last; i += static_cast<int64_t>(sizeof(V) / sizeof(F))) {
        V sum{};
        for (int64_t row = seen.top; row < seen.bottom; ++row)
            for (int64_t column = seen.left; column < seen.right; ++column) {
                const int64_t window = row * args.columns + column;
                const N winner =
                    *reinterpret_cast<const N*>(indices + (b * windows + window) * args.channels + i);
                const V c = read<V>(args.c, (sample * windows + window) * args.channels + i);
                sum += winner == here ? c : V{};
            }
        write<V>(args.out, at + i, sum, false);
    }
}

// One line of one sample of the input.
template <class F>
void unpool_line(int64_t index, const void* context, void*) {
    const UnpoolArgs& args = *static_cast<const UnpoolArgs*>(context);
    const int64_t channels = args.channels, b = index / args.height, y = index % args.height;
    // The windows that see coordinate `at`: [from, to).
    const auto from = [&](int axis, int64_t at) {
        const int64_t past = at + args.padding[axis] - args.kernel[axis];
        return past < 0 ? int64_t(0) : past / args.stride[axis] + 1;
    };
    const auto to = [&](int axis, int64_t at, int64_t windows) {
        return min64(windows, (at + args.padding[axis]) / args.stride[axis] + 1);
    };
    const int64_t top = from(0, y), bottom = to(0, y, args.rows);
    constexpr bool vectors = sizeof(F) == sizeof(float);
    const int64_t whole = vectors ? channels / kLanes * kLanes : 0;
    for (int64_t x = 0; x < args.width; ++x) {
        const Windows seen{top, bottom, from(1, x), to(1, x, args.columns)};
        const std::int32_t here = static_cast<std::int32_t>(y * args.width + x);
        for (int64_t t = 0; t < args.num_maps; ++t) {
            const int64_t sample = t * args.batch + b;
            const int64_t at = ((sample * args.height + y) * args.width + x) * channels;
            if constexpr (vectors) unpool_span<Lanes, Numbers, F>(args, seen, b, sample, here, at, 0, whole);
            unpool_span<F, std::int32_t, F>(args, seen, b, sample, here, at, whole, channels);
        }
    }
}

}  // namespace

void unpool(const UnpoolArgs& args) {
    parallel_for(args.batch * args.height,
                 args.num_maps * args.batch * args.height * args.width * args.channels, args.threads,
                 args.c.dtype == DType::f64 ? unpool_line<double> : unpool_line<float>, &args, 0);
}

void max_pool_pullback(const MaxPoolArgs& args) {
    const bool wide = args.c.dtype == DType::f64 || args.x.dtype == DType::f64;
    parallel_for(args.batch * (args.height / args.kernel_height),
                 args.num_maps * args.batch * args.height * args.width * args.channels, args.threads,
                 wide ? pool_row<double> : pool_row<float>, &args, 0);
}

}  // namespace rf::RF_ISA
