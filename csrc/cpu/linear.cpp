// The pull-back of a linear layer whose input has both signs, for all maps:
//   out[r, i] = sum_k c[r, k] max(s W[k, i], 0),  s = sign of the input x[r, i]
// W+ and W- are never both multiplied: before a vector of weights meets a row, each lane takes the half that
// the row's input asks for. That is one blend for the products of two maps, in execution units
// that the products leave idle, instead of a second product.
//
// Weights lie in panels of kLinearColumns columns, [panel, step, column, pack]: a step is one row of W, or
// where the elements are bfloat16 two rows whose numbers are neighbours. A sum runs over the steps in
// order, whatever tile it is in.
#include "cpu/linear.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace rf::RF_ISA {
namespace {

// Accumulators of two maps, the halves of the weights, a blend and two broadcasts fill the vector
// registers; with AVX-512, masks the mask registers.
#if defined(__AVX512F__)
constexpr int kRows = 3, kVectors = 2;
#else
constexpr int kRows = 2, kVectors = 2;
#endif

// Rows of one task, whole tiles: 3072 coefficients for each and two maps stay in a 1 MB L2 cache.
template <class P>
constexpr int64_t kTaskRows = 44 / static_cast<int64_t>(sizeof(typename P::Coefficient)) * kRows;

// The larger of 0 and x; NaN stays. (Compilers make a comparison and an `and` of the choice.)
template <class Vector>
RF_INLINE Vector not_negative(Vector x) {
#ifdef __AVX2__
    if constexpr (sizeof(x) == 32 && sizeof(x[0]) == 4) return (Vector)_mm256_max_ps(__m256{}, (__m256)x);
    if constexpr (sizeof(x) == 32 && sizeof(x[0]) == 8) return (Vector)_mm256_max_pd(__m256d{}, (__m256d)x);
#endif
    return 0 > x ? Vector{} : x;
}

// One number per element: float or double.
template <class F>
struct Number {
    using Sum = F;
    using Element = F;
    using Coefficient = F;
    static constexpr int64_t lanes = kVectorBytes / sizeof(F);
    static constexpr int64_t pack = 1;
    typedef F Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(F)), may_alias));
    using SumVector = Vector;
    // Without mask registers a sign and a maximum are faster than the two halves and blends.
    using Halves = Vector;
    static RF_INLINE Halves halves(const Element* weights) {
        return *reinterpret_cast<const Vector*>(weights);
    }
    static RF_INLINE Element element(const Coefficient* row, int64_t step) { return row[step]; }
    static RF_INLINE void multiply_add(SumVector& sum, Vector w, Element c) { sum += w * c; }

    using Mask = decltype(Vector{} > 0);  // the sign bit where the negative half is wanted
    static RF_INLINE Mask mask(const F* gate) {
        const Mask sign = (Mask)-Vector{};
        return *reinterpret_cast<const Vector*>(gate) > 0 ? Mask{} : sign;
    }
    static RF_INLINE Vector select(Mask mask, Vector w) { return not_negative((Vector)((Mask)w ^ mask)); }
};

RF_INLINE std::uint32_t pair(const std::uint16_t* row, int64_t step) {
    std::uint32_t both;
    __builtin_memcpy(&both, row + 2 * step, sizeof(both));
    return both;
}

// Two bfloat16 per element, widened to float where the processor does not multiply them.
struct WidenedPair {
    using Sum = float;
    using Element = std::uint32_t;
    using Coefficient = std::uint16_t;
    static constexpr int64_t lanes = kVectorBytes / 4;
    static constexpr int64_t pack = 2;
    typedef float SumVector __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    struct Vector {
        SumVector low, high;
    };
    struct Halves {
        Vector positive, negative;
    };
    static RF_INLINE SumVector positive(SumVector w) { return w < 0 ? SumVector{} : w; }
    static RF_INLINE Halves halves(const Element* weights) {
        const Bits bits = *reinterpret_cast<const Bits*>(weights);
        const SumVector low = (SumVector)(bits << 16), high = (SumVector)(bits & 0xffff0000u);
        return {{positive(low), positive(high)}, {positive(-low), positive(-high)}};
    }
    static RF_INLINE Element element(const Coefficient* row, int64_t step) { return pair(row, step); }
    static RF_INLINE void multiply_add(SumVector& sum, const Vector& w, Element c) {
        sum += w.low * bits_of<float>(c << 16);
        sum += w.high * bits_of<float>(c & 0xffff0000u);
    }
    using Mask = decltype(SumVector{} > 0);
    static RF_INLINE Mask mask(const float* gate) { return *reinterpret_cast<const SumVector*>(gate) > 0; }
    static RF_INLINE Vector select(Mask mask, const Halves& w) {
        return {mask ? w.positive.low : w.negative.low, mask ? w.positive.high : w.negative.high};
    }
};

#ifdef __AVX512F__
// As Number<float>, with masks in mask registers.
struct Float512 {
    using Sum = float;
    using Element = float;
    using Coefficient = float;
    static constexpr int64_t lanes = 16;
    static constexpr int64_t pack = 1;
    using SumVector = __m512;
    struct Halves {
        __m512 positive, negative;
    };
    static RF_INLINE Halves halves(const Element* weights) {
        const __m512 w = _mm512_loadu_ps(weights), zero = _mm512_setzero_ps();
        return {_mm512_max_ps(zero, w), _mm512_max_ps(zero, _mm512_sub_ps(zero, w))};  // NaN stays
    }
    static RF_INLINE Element element(const Coefficient* row, int64_t step) { return row[step]; }
    static RF_INLINE void multiply_add(SumVector& sum, __m512 w, Element c) {
        sum = _mm512_fmadd_ps(w, _mm512_set1_ps(c), sum);
    }
    using Mask = __mmask16;
    static RF_INLINE Mask mask(const float* gate) {
        return _mm512_cmp_ps_mask(_mm512_loadu_ps(gate), _mm512_setzero_ps(), _CMP_GT_OQ);
    }
    static RF_INLINE __m512 select(Mask mask, const Halves& w) {
        return _mm512_mask_blend_ps(mask, w.negative, w.positive);
    }
};
#endif

#ifdef __AVX512BF16__
struct Pair512 {
    using Sum = float;
    using Element = std::uint32_t;
    using Coefficient = std::uint16_t;
    static constexpr int64_t lanes = 16;
    static constexpr int64_t pack = 2;
    using SumVector = __m512;
    struct Halves {
        __m512i positive, negative;
    };
    // A negative bfloat16 is a negative 16-bit integer.
    static RF_INLINE Halves halves(const Element* weights) {
        const __m512i w = _mm512_loadu_si512(weights), zero = _mm512_setzero_si512();
        const __m512i flipped = _mm512_xor_si512(w, _mm512_set1_epi32(static_cast<int>(0x80008000u)));
        return {_mm512_max_epi16(w, zero), _mm512_max_epi16(flipped, zero)};
    }
    static RF_INLINE Element element(const Coefficient* row, int64_t step) { return pair(row, step); }
    static RF_INLINE void multiply_add(SumVector& sum, __m512i w, Element c) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(c)), (__m512bh)w);
    }
    using Mask = __mmask16;
    static RF_INLINE Mask mask(const float* gate) { return Float512::mask(gate); }
    static RF_INLINE __m512i select(Mask mask, const Halves& w) {
        return _mm512_mask_blend_epi32(mask, w.negative, w.positive);
    }
};
#endif

// Sums of `rows` rows of `maps` maps over kVectors vectors of columns of a panel. c points at a row of the
// first map, gates are [rows, kLinearColumns], sums [maps, kRows, kLinearColumns].
template <class P, int maps, int rows>
RF_INLINE void tile(const typename P::Coefficient* c, int64_t map_stride, int64_t depth,
                    const typename P::Element* weights, const typename P::Sum* gates,
                    typename P::Sum* __restrict sums) {
    constexpr int64_t sums_of_map = kRows * kLinearColumns;
    typename P::SumVector sum[maps][rows][kVectors];
    typename P::Mask mask[rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            mask[r][v] = P::mask(gates + r * kLinearColumns + v * P::lanes);
#pragma GCC unroll 8
            for (int s = 0; s < maps; ++s) sum[s][r][v] = typename P::SumVector{};
        }
    }
    const auto step = [&](int64_t k, auto element_of) __attribute__((always_inline)) {
        typename P::Halves w[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) w[v] = P::halves(weights + k * kLinearColumns + v * P::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            typename P::Element element[maps];
#pragma GCC unroll 8
            for (int s = 0; s < maps; ++s) element[s] = element_of(c + s * map_stride + r * depth, k);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                const auto chosen = P::select(mask[r][v], w[v]);
#pragma GCC unroll 8
                for (int s = 0; s < maps; ++s) P::multiply_add(sum[s][r][v], chosen, element[s]);
            }
        }
    };
    const int64_t whole = depth / P::pack;
    for (int64_t k = 0; k < whole; ++k)
        step(k,
             [](const auto* row, int64_t at) __attribute__((always_inline)) { return P::element(row, at); });
    if (whole * P::pack < depth)  // half a pair is left
        step(whole, [](const auto* row, int64_t at) __attribute__((always_inline)) {
            return static_cast<typename P::Element>(row[at * P::pack]);
        });
#pragma GCC unroll 8
    for (int s = 0; s < maps; ++s) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                __builtin_memcpy(sums + s * sums_of_map + r * kLinearColumns + v * P::lanes, &sum[s][r][v],
                                 sizeof(sum[s][r][v]));
        }
    }
}

template <class P, int maps, int rows>
__attribute__((noinline)) void panel(const typename P::Coefficient* c, int64_t map_stride, int64_t depth,
                                     const typename P::Element* weights, const typename P::Sum* gates,
                                     typename P::Sum* sums) {
    constexpr int64_t width = kVectors * P::lanes;
    static_assert(kLinearColumns % width == 0, "tiles fill a panel");
    for (int64_t i = 0; i < kLinearColumns; i += width)
        tile<P, maps, rows>(c, map_stride, depth, weights + i, gates + i, sums + i);
}

// The same for 1 to kRows rows and one or two maps.
template <class P, int rows = kRows>
RF_INLINE void panel_of(int64_t maps, int64_t count, const typename P::Coefficient* c, int64_t map_stride,
                        int64_t depth, const typename P::Element* weights, const typename P::Sum* gates,
                        typename P::Sum* sums) {
    if constexpr (rows > 1) {
        if (count < rows)
            return panel_of<P, rows - 1>(maps, count, c, map_stride, depth, weights, gates, sums);
    }
    (maps == 2 ? panel<P, 2, rows> : panel<P, 1, rows>)(c, map_stride, depth, weights, gates, sums);
}

template <class P>
void linear_task(int64_t index, const void* context, void*) {
    using F = typename P::Sum;
    using Coefficient = typename P::Coefficient;
    const Linear<F>& job = *static_cast<const Linear<F>*>(context);
    const LinearArgs& args = job.args;
    const PanelRows at =
        panel_rows(job, index / job.panels / job.chunks, index / job.panels % job.chunks, index % job.panels);
    const int64_t map_rows = job.groups * args.batch * args.rows;
    const int64_t steps = ceil_div(args.depth, P::pack);
    const Coefficient* c = static_cast<const Coefficient*>(args.c.data);
    const typename P::Element* weights =
        static_cast<const typename P::Element*>(args.panels.data) + at.panel * steps * kLinearColumns;

    F x_buffer[kRows][kLinearColumns], factor[kRows][kLinearColumns], gate[kRows][kLinearColumns];
    F sums[2][kRows][kLinearColumns], buffer[kLinearColumns];
    for (int64_t row = at.begin; row < at.end; row += kRows) {
        const int64_t count = min64(kRows, at.end - row);
        const F* x[kRows];
        for (int64_t r = 0; r < count; ++r) {
            const int64_t x_row = at.sample * args.rows + row + r;
            x[r] = load(args.x, x_row * args.width + at.column, at.columns, x_buffer[r]);
            prepare_row(job, x[r], x_row, at.column, at.columns, gate[r], factor[r]);
        }
        for (int64_t t = 0; t < job.groups; ++t) {
            const int64_t first = (t * args.batch + at.sample) * args.rows + row;
            panel_of<P>(job.group_maps, count, c + first * args.depth, map_rows * args.depth, args.depth,
                        weights, gate[0], sums[0][0]);
            for (int64_t r = 0; r < count; ++r)
                finish_row(job, first + r, at, x[r], factor[r], sums[0][r], sums[1][r], buffer,
                           at.masses + t);
        }
    }
}

template <class P>
void run(const LinearArgs& args) {
    run<typename P::Sum>(args, {kTaskRows<P>, 1, linear_task<P>, 0, nullptr, 0, 0});
}

}  // namespace

void linear_pullback(const LinearArgs& args) {
    if (args.panels.dtype == DType::f64) return run<Number<double>>(args);
#ifdef __AMX_BF16__
    if (args.rows > 0 && args.depth > 0) return linear_pullback_tiles(args);
#endif
#ifdef __AVX512BF16__
    if (args.panels.dtype == DType::bf16) return run<Pair512>(args);
#else
    if (args.panels.dtype == DType::bf16) return run<WidenedPair>(args);
#endif
#ifdef __AVX512F__
    run<Float512>(args);
#else
    run<Number<float>>(args);
#endif
}

}  // namespace rf::RF_ISA
