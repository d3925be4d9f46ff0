// The pull-back of a linear layer whose input has both signs, for all right-hand sides:
//   out[r, i] = sum_k c[r, k] max(s W[k, i], 0),  s = sign of the input x[r, i]
// W+ and W- are never both multiplied: before a vector of weights meets a row, each lane takes the half that
// the row's input asks for. That is one blend for the products of two right-hand sides, in execution units
// that the products leave idle, instead of a second product.
//
// Weights lie in panels of kLinearColumns columns, [panel, step, column, pack]: a step is one row of W, or
// where the elements are bfloat16 two rows whose numbers sit side by side. A sum runs over the steps in
// order, whatever tile it is in.
#include "cpu/mass.h"
#include "cpu/row_statistics.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include "cpu/tiles.h"
#endif

namespace rf::RF_ISA {
namespace {

// Accumulators of two right-hand sides, the halves of the weights, a blend and two broadcasts fill the vector
// registers; with AVX-512, masks the mask registers.
#if defined(__AVX512F__)
constexpr int kRows = 3, kVectors = 2;
#else
constexpr int kRows = 2, kVectors = 2;
#endif

// Rows of one task, whole tiles: 3072 coefficients for each and two right-hand sides stay in a 1 MB L2 cache.
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

// Sums of `rows` rows of `sides` right-hand sides over kVectors vectors of columns of a panel.
// c points at a row of the first side, gates are [rows, kLinearColumns], sums [sides, kRows, kLinearColumns].
template <class P, int sides, int rows>
RF_INLINE void tile(const typename P::Coefficient* c, int64_t side, int64_t depth,
                    const typename P::Element* weights, const typename P::Sum* gates,
                    typename P::Sum* __restrict sums) {
    constexpr int64_t sums_side = kRows * kLinearColumns;
    typename P::SumVector sum[sides][rows][kVectors];
    typename P::Mask mask[rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            mask[r][v] = P::mask(gates + r * kLinearColumns + v * P::lanes);
#pragma GCC unroll 8
            for (int s = 0; s < sides; ++s) sum[s][r][v] = typename P::SumVector{};
        }
    }
    const auto step = [&](int64_t k, auto element_of) __attribute__((always_inline)) {
        typename P::Halves w[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) w[v] = P::halves(weights + k * kLinearColumns + v * P::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            typename P::Element element[sides];
#pragma GCC unroll 8
            for (int s = 0; s < sides; ++s) element[s] = element_of(c + s * side + r * depth, k);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                const auto chosen = P::select(mask[r][v], w[v]);
#pragma GCC unroll 8
                for (int s = 0; s < sides; ++s) P::multiply_add(sum[s][r][v], chosen, element[s]);
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
    for (int s = 0; s < sides; ++s) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                __builtin_memcpy(sums + s * sums_side + r * kLinearColumns + v * P::lanes, &sum[s][r][v],
                                 sizeof(sum[s][r][v]));
        }
    }
}

template <class P, int sides, int rows>
__attribute__((noinline)) void panel(const typename P::Coefficient* c, int64_t side, int64_t depth,
                                     const typename P::Element* weights, const typename P::Sum* gates,
                                     typename P::Sum* sums) {
    constexpr int64_t width = kVectors * P::lanes;
    static_assert(kLinearColumns % width == 0, "tiles fill a panel");
    for (int64_t i = 0; i < kLinearColumns; i += width)
        tile<P, sides, rows>(c, side, depth, weights + i, gates + i, sums + i);
}

// The same for 1 to kRows rows and one or two right-hand sides.
template <class P, int rows = kRows>
RF_INLINE void panel_of(int64_t sides, int64_t count, const typename P::Coefficient* c, int64_t side,
                        int64_t depth, const typename P::Element* weights, const typename P::Sum* gates,
                        typename P::Sum* sums) {
    if constexpr (rows > 1) {
        if (count < rows) return panel_of<P, rows - 1>(sides, count, c, side, depth, weights, gates, sums);
    }
    (sides == 2 ? panel<P, 2, rows> : panel<P, 1, rows>)(c, side, depth, weights, gates, sums);
}

template <class F>
struct Linear {
    const LinearArgs& args;
    int64_t panels, chunks;  // chunks: groups of rows of one sample
    int64_t chunk_rows;
    int64_t task_panels;
    int64_t groups, sides;      // right-hand sides t and t + groups go together
    Statistics<F>* statistics;  // [B, rows], of the LayerNorm's input
    F *weight, *bias;           // [width], of the LayerNorm
    double* partials;           // [B, chunks, panels, T]
    const char* left;           // of the kernel on tiles: [T, B, groups of rows] left tiles; null: c itself
};

// The signs that select, and what the sums are multiplied by, for `n` columns of a row of x.
template <class F>
RF_INLINE void prepare_row(const Linear<F>& job, const F* __restrict x, int64_t row, int64_t column,
                           int64_t n, F* __restrict gate, F* __restrict factor) {
    for (int64_t i = n; i < kLinearColumns; ++i) gate[i] = F(0);
    if (job.args.norm) {
        const F* __restrict weight = job.weight + column, * __restrict bias = job.bias + column;
        const Statistics<F> s = job.statistics[row];
        row_factor(x, weight, s, n, factor);
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) gate[i] = (x[i] - s.mean) * s.inverse * weight[i] + bias[i];
    } else {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            gate[i] = x[i];
            factor[i] = F(1);
        }
    }
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) factor[i] = gate[i] > 0 || gate[i] < 0 ? factor[i] : F(0);
}

// Some rows of a sample, the columns of a panel.
struct Place {
    int64_t sample, begin, end;
    int64_t panel, column, columns;
    double* masses;  // [T]
};

template <class F>
RF_INLINE Place place_of(const Linear<F>& job, int64_t sample, int64_t chunk, int64_t panel) {
    Place at;
    at.sample = sample;
    at.begin = chunk * job.chunk_rows;
    at.end = min64(at.begin + job.chunk_rows, job.args.rows);
    at.panel = panel;
    at.column = panel * kLinearColumns;
    at.columns = min64(kLinearColumns, job.args.width - at.column);
    at.masses = job.partials + ((sample * job.chunks + chunk) * job.panels + panel) * job.args.rhs;
    for (int64_t t = 0; t < job.args.rhs; ++t) at.masses[t] = 0;
    return at;
}

// Scales and stores a row of sums of group t, and adds its masses.
template <class F>
RF_INLINE void finish_row(const Linear<F>& job, int64_t row, const Place& at, const F* x,
                          const F* __restrict factor, F* __restrict first, F* __restrict second,
                          F* __restrict buffer, double* mass) {
    const LinearArgs& args = job.args;
    const int64_t n = at.columns, side_rows = job.groups * args.batch * args.rows;
    for (int64_t s = 0; s < job.sides; ++s) {
        const int64_t offset = (row + s * side_rows) * args.width + at.column;
        F* __restrict sum = s == 0 ? first : second;
        F* __restrict out = target(args.out, offset, buffer);
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = sum[i] *= factor[i];
        commit(args.out, offset, n, out);
    }
    if (args.mass.data == nullptr) return;
    double* second_mass = mass + job.groups;
    if (args.contrast) {
        add_mass<F, true>(x, first, second, n, mass, second_mass);
    } else {
        add_mass<F, false>(x, first, nullptr, n, mass, nullptr);
        if (job.sides == 2) add_mass<F, false>(x, second, nullptr, n, second_mass, nullptr);
    }
}

template <class P>
void linear_task(int64_t index, const void* context, void*) {
    using F = typename P::Sum;
    using Coefficient = typename P::Coefficient;
    const Linear<F>& job = *static_cast<const Linear<F>*>(context);
    const LinearArgs& args = job.args;
    const Place at =
        place_of(job, index / job.panels / job.chunks, index / job.panels % job.chunks, index % job.panels);
    const int64_t side_rows = job.groups * args.batch * args.rows;
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
            panel_of<P>(job.sides, count, c + first * args.depth, side_rows * args.depth, args.depth, weights,
                        gate[0], sums[0][0]);
            for (int64_t r = 0; r < count; ++r)
                finish_row(job, first + r, at, x[r], factor[r], sums[0][r], sums[1][r], buffer,
                           at.masses + t);
        }
    }
}

#ifdef __AMX_BF16__
// The same on tile registers, which multiply by both halves sooner than a vector could choose one. The sums
// of both right-hand sides over both halves of 16 columns are four tiles. Coefficients and weights are
// bfloat16, or float in three parts. The depth is taken in blocks: right tiles of a block lie in the L1
// cache, its left tiles stay in the L2 cache beside the sums while the panels of a task pass by.
constexpr int64_t kTaskGroups = 16;  // of rows
constexpr int64_t kTaskPanels = 4;

template <int parts>
constexpr int64_t kBlockSteps = parts == 1 ? 16 : 10;

using TileSums = float[2][2][kTileRows][kLinearColumns];  // [side, W+ | W-, row, column]

template <int parts>
RF_INLINE void store_halves(char* to, const __m512i (&w)[parts]) {
    // The highest part has the sign. A negative bfloat16 is a negative 16-bit integer.
    const __mmask32 positive = _mm512_cmpgt_epi16_mask(w[0], _mm512_setzero_si512());
    const __mmask32 negative = _mm512_movepi16_mask(w[0]);
    for (int p = 0; p < parts; ++p) {
        const __m512i flipped = _mm512_xor_si512(w[p], _mm512_set1_epi32(static_cast<int>(0x80008000u)));
        _mm512_store_si512(to + 2 * p * kTileBytes, _mm512_maskz_mov_epi16(positive, w[p]));
        _mm512_store_si512(to + (2 * p + 1) * kTileBytes, _mm512_maskz_mov_epi16(negative, flipped));
    }
}

// Right tiles of 16 columns of W+ and W- for steps [begin, end): [step, part, W+ | W-]. `panel` points at the
// first of the columns.
template <int parts>
void split_panel(const float* panel, int64_t depth, int64_t begin, int64_t end, char* to) {
    for (int64_t pair = begin * kTileRows; pair < end * kTileRows; ++pair) {
        __m512i w[parts] = {};
        if constexpr (parts == 1) {
            if (2 * pair < depth) w[0] = _mm512_loadu_si512(panel + pair * kLinearColumns);
        } else if (2 * pair < depth) {
            const float* row = panel + 2 * pair * kLinearColumns;
            const bool last = 2 * pair + 1 == depth;
            __m256i first[3], second[3];
            split_float(_mm512_loadu_ps(row), first);
            split_float(last ? _mm512_setzero_ps() : _mm512_loadu_ps(row + kLinearColumns), second);
            for (int p = 0; p < 3; ++p) w[p] = pair_rows(first[p], second[p]);
        }
        const int64_t step = pair / kTileRows - begin;
        store_halves<parts>(to + step * 2 * kStepBytes<parts> + pair % kTileRows * 64, w);
    }
}

// What comes next and is fetched meanwhile: a share of the left tiles of steps [begin, end), and all weights
// of a panel from a step on.
struct Next {
    int64_t begin, end, index, count;
    int64_t panel, panel_begin;
};

// Adds steps [begin, end) to the sums of a panel, of the right-hand sides of group t.
template <int parts, bool both>
void sum_tiles(const Linear<float>& job, const Place& at, int64_t t, int64_t begin, int64_t end,
               const Next& next, TileRegisters& tiles, char* weights, TileSums* sums) {
    const LinearArgs& args = job.args;
    const int64_t steps = ceil_div(args.depth, kTileDepth), row_groups = ceil_div(args.rows, kTileRows);
    // A line of a panel is kLinearColumns numbers of 32 bits: pairs of bfloat16, or float.
    const int64_t element = parts == 1 ? 2 : 4, lines = parts == 1 ? ceil_div(args.depth, 2) : args.depth;
    const int64_t samples[2] = {t * args.batch + at.sample, (t + job.groups) * args.batch + at.sample};
    const auto left = [&](int64_t side, int64_t row, int64_t step) {
        if (job.left != nullptr) {
            const int64_t group = samples[side] * row_groups + row / kTileRows;
            return LeftTiles{job.left + (group * steps + step) * kStepBytes<parts>, 64, kStepBytes<parts>};
        }
        const char* c = static_cast<const char*>(args.c.data);
        const int64_t first = (samples[side] * args.rows + row) * args.depth + step * kTileDepth;
        return LeftTiles{c + first * element, args.depth * element, kTileDepth * element};
    };
    const float* panel = static_cast<const float*>(args.panels.data) + at.panel * lines * kLinearColumns;
    constexpr int64_t step_lines = parts == 1 ? kTileDepth / 2 : kTileDepth;
    const int64_t next_line = next.panel_begin * step_lines;
    const int64_t next_lines = min64(kBlockSteps<parts> * step_lines, lines - next_line);
    const float* next_panel =
        static_cast<const float*>(args.panels.data) + (next.panel * lines + next_line) * kLinearColumns;
    constexpr int64_t stride = kLinearColumns * sizeof(float);
    int64_t index = 0;
    for (int64_t column = 0; column < kLinearColumns; column += kTileColumns) {
        split_panel<parts>(panel + column, args.depth, begin, end, weights);
        for (int64_t row = at.begin; row < at.end; row += kTileRows) {
            const int64_t count = min64(kTileRows, at.end - row);
            TileSums& to = sums[(row - at.begin) / kTileRows];
            tiles.set(count, both ? count : 0);
            if (begin == 0) {
                clear_sums();
            } else {
                _tile_loadd(0, &to[0][0][0][column], stride);
                _tile_loadd(1, &to[0][1][0][column], stride);
                if (both) _tile_loadd(2, &to[1][0][0][column], stride);
                if (both) _tile_loadd(3, &to[1][1][0][column], stride);
            }
            // P's rows for the next block are fetched beside one half of the columns, D's beside the other.
            const LeftTiles then = left(both && column > 0 ? 1 : 0, row, next.begin);
            const bool packed = job.left != nullptr;
            Ahead ahead(then.data, packed ? 1 : count, (next.end - next.begin) * then.step, then.stride,
                        next.index, next.count);
            Ahead panel_ahead(reinterpret_cast<const char*>(next_panel), 1, next_lines * kLinearColumns * 4,
                              0, index++, 2 * ceil_div(at.end - at.begin, kTileRows));
            const int64_t slots = (end - begin) * kSlots<parts>, ahead_lines = ceil_div(ahead.lines(), slots),
                          panel_lines = ceil_div(panel_ahead.lines(), slots);
            add_products<parts, both>(left(0, row, begin), left(both ? 1 : 0, row, begin), {weights},
                                      end - begin, [&] {
                                          ahead.fetch(ahead_lines);
                                          panel_ahead.fetch(panel_lines);
                                      });
            _tile_stored(0, &to[0][0][0][column], stride);
            _tile_stored(1, &to[0][1][0][column], stride);
            if (both) _tile_stored(2, &to[1][0][0][column], stride);
            if (both) _tile_stored(3, &to[1][1][0][column], stride);
        }
    }
}

// Chooses from the sums of a panel and finishes its rows.
RF_INLINE void finish_tiles(const Linear<float>& job, const Place& at, int64_t t, TileSums* sums) {
    const LinearArgs& args = job.args;
    float x_buffer[kLinearColumns], gate[kLinearColumns], factor[kLinearColumns], buffer[kLinearColumns];
    for (int64_t row = at.begin; row < at.end; ++row) {
        const int64_t x_row = at.sample * args.rows + row;
        const float* x = load(args.x, x_row * args.width + at.column, at.columns, x_buffer);
        prepare_row(job, x, x_row, at.column, at.columns, gate, factor);
        TileSums& of_row = sums[(row - at.begin) / kTileRows];
        const int64_t r = (row - at.begin) % kTileRows;
        for (int64_t s = 0; s < job.sides; ++s) {
            float* __restrict positive = of_row[s][0][r];
            const float* __restrict negative = of_row[s][1][r];
            RF_SIMD
            for (int64_t i = 0; i < kLinearColumns; ++i)
                positive[i] = gate[i] > 0 ? positive[i] : negative[i];
        }
        finish_row(job, (t * args.batch + at.sample) * args.rows + row, at, x, factor, of_row[0][0][r],
                   of_row[1][0][r], buffer, at.masses + t);
    }
}

// Some rows of a sample and some panels. Scratch: right tiles, then the sums of every panel.
template <int parts>
void tiles_task(int64_t index, const void* context, void* scratch) {
    const Linear<float>& job = *static_cast<const Linear<float>*>(context);
    const int64_t steps = ceil_div(job.args.depth, kTileDepth), row_groups = job.chunk_rows / kTileRows;
    const int64_t panel_groups = ceil_div(job.panels, job.task_panels);
    const int64_t chunk = index / panel_groups % job.chunks, sample = index / panel_groups / job.chunks;
    const int64_t first = index % panel_groups * job.task_panels;
    const int64_t count = min64(job.task_panels, job.panels - first);
    char* weights = static_cast<char*>(scratch);
    TileSums* sums = reinterpret_cast<TileSums*>(weights + kBlockSteps<parts> * 2 * kStepBytes<parts>);
    Place places[kTaskPanels];
    for (int64_t i = 0; i < count; ++i) places[i] = place_of(job, sample, chunk, first + i);
    constexpr int64_t block = kBlockSteps<parts>;
    for (int64_t t = 0; t < job.groups; ++t) {
        TileRegisters tiles;
        for (int64_t begin = 0; begin < steps; begin += block)
            for (int64_t i = 0; i < count; ++i) {
                const int64_t end = min64(begin + block, steps), then = end % steps;
                const bool turn = i + 1 == count;
                const Next next{then,  min64(then + block, steps), i,
                                count, first + (turn ? 0 : i + 1), turn ? then : begin};
                (job.sides == 2 ? sum_tiles<parts, true> : sum_tiles<parts, false>)(job, places[i], t, begin,
                                                                                    end, next, tiles, weights,
                                                                                    sums + i * row_groups);
            }
        for (int64_t i = 0; i < count; ++i) finish_tiles(job, places[i], t, sums + i * row_groups);
    }
}

// Left tiles of a group of rows.
template <int parts>
void left_task(int64_t index, const void* context, void*) {
    const Linear<float>& job = *static_cast<const Linear<float>*>(context);
    const LinearArgs& args = job.args;
    const int64_t groups = ceil_div(args.rows, kTileRows), group = index % groups, sample = index / groups;
    const int64_t first = sample * args.rows + group * kTileRows;
    pack_left<parts>(
        args.c.data, first, min64(kTileRows, args.rows - group * kTileRows), args.depth,
        const_cast<char*>(job.left) + index * ceil_div(args.depth, kTileDepth) * kStepBytes<parts>);
}
#endif

template <class F>
void statistics_task(int64_t row, const void* context, void* scratch) {
    const Linear<F>& job = *static_cast<const Linear<F>*>(context);
    const int64_t width = job.args.width;
    const F* x = load(job.args.x, row * width, width, static_cast<F*>(scratch));
    job.statistics[row] = row_statistics(x, width, job.args.eps);
}

// How a kernel splits the work.
struct Kernel {
    int64_t chunk_rows, task_panels;
    Task task;
    std::size_t scratch_bytes;
    Task pack;  // of left tiles, or null
    int64_t pack_tasks, left_bytes;
};

template <class F>
void run(const LinearArgs& args, const Kernel& kernel) {
    const int64_t panels = ceil_div(args.width, kLinearColumns);
    const int64_t chunks = ceil_div(args.rows, kernel.chunk_rows);
    const int64_t tasks = args.batch * chunks * ceil_div(panels, kernel.task_panels);
    const int64_t rows = args.batch * args.rows;
    const bool pairs = args.rhs % 2 == 0;
    static_assert(sizeof(Statistics<F>) <= 3 * sizeof(double), "Partials holds them");
    Partials partials(args.batch * chunks * panels * args.rhs), statistics(args.norm ? 3 * rows : 0);
    Partials parameters(args.norm ? 2 * args.width : 0);
    F* weight = reinterpret_cast<F*>(parameters.data());
    const Scratch left(static_cast<std::size_t>(kernel.left_bytes));
    const Linear<F> job{args,
                        panels,
                        chunks,
                        kernel.chunk_rows,
                        kernel.task_panels,
                        pairs ? args.rhs / 2 : args.rhs,
                        pairs ? 2 : 1,
                        reinterpret_cast<Statistics<F>*>(statistics.data()),
                        weight,
                        weight + args.width,
                        partials.data(),
                        left.data()};
    if (args.norm) {
        for (int64_t i = 0; i < args.width; ++i) {
            job.weight[i] = args.weight.data ? load_one<F>(args.weight, i) : F(1);
            job.bias[i] = args.bias.data ? load_one<F>(args.bias, i) : F(0);
        }
        parallel_for(rows, rows * args.width, args.threads, statistics_task<F>, &job,
                     static_cast<std::size_t>(args.width) * sizeof(F));
    }
    if (kernel.pack != nullptr)
        parallel_for(kernel.pack_tasks, args.rhs * rows * args.depth, args.threads, kernel.pack, &job, 0);
    parallel_for(tasks, args.rhs * rows * args.width * args.depth, args.threads, kernel.task, &job,
                 kernel.scratch_bytes);
    if (args.mass.data)
        store_masses(args.mass, 0, args.rhs, args.batch, job.partials, chunks * panels, args.rhs);
}

template <class P>
void run(const LinearArgs& args) {
    run<typename P::Sum>(args, {kTaskRows<P>, 1, linear_task<P>, 0, nullptr, 0, 0});
}

#ifdef __AMX_BF16__
template <int parts>
void run_on_tiles(const LinearArgs& args) {
    if (args.rows == 0 || args.depth == 0) return run<Pair512>(args);  // nothing to multiply
    const int64_t steps = ceil_div(args.depth, kTileDepth), groups = ceil_div(args.rows, kTileRows);
    const int64_t chunk = ceil_div(groups, ceil_div(groups, kTaskGroups));
    const int64_t panels = ceil_div(args.width, kLinearColumns), chunks = ceil_div(groups, chunk);
    // As many panels as leave every thread four tasks.
    int64_t task_panels = args.batch * chunks * panels / (4 * (args.threads > 1 ? args.threads : 1));
    task_panels = task_panels < 1 ? 1 : min64(task_panels, kTaskPanels);
    const bool as_is = parts == 1 && args.depth % kTileDepth == 0;
    const int64_t scratch = kBlockSteps<parts> * 2 * kStepBytes<parts> +
                            task_panels * chunk * static_cast<int64_t>(sizeof(TileSums));
    const int64_t pack_tasks = as_is ? 0 : args.rhs * args.batch * groups;
    run<float>(args,
               {chunk * kTileRows, task_panels, tiles_task<parts>, static_cast<std::size_t>(scratch),
                as_is ? nullptr : left_task<parts>, pack_tasks, pack_tasks * steps * kStepBytes<parts>});
}
#endif

}  // namespace

void linear_pullback(const LinearArgs& args) {
    if (args.panels.dtype == DType::f64) return run<Number<double>>(args);
#ifdef __AMX_BF16__
    return args.panels.dtype == DType::bf16 ? run_on_tiles<1>(args) : run_on_tiles<3>(args);
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
