// Products of small matrices that lie in the caches, on register tiles of kRows x kVectors vectors or on tile
// registers. An operand element is one number, or where the processor multiplies bfloat16 a pair of numbers
// along the summed axis.
#pragma once

#include "cpu/block.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __AVX512BF16__
#include "cpu/interleave.h"
#endif
#ifdef __AMX_BF16__
#include "cpu/tiles.h"
#endif

namespace rf::RF_ISA {
namespace {

// Accumulators, one row of the right operand and a broadcast fill the vector registers.
#if defined(__AMX_BF16__)
constexpr int kRows = 8, kVectors = 3;  // as many rows as divide those of TilePair
#elif defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

template <class F>
struct Single {
    using Sum = F;
    using Element = F;
    typedef F SumVector __attribute__((vector_size(kVectorBytes), may_alias));
    using ElementVector = SumVector;
    static constexpr int64_t lanes = kVectorBytes / sizeof(F);
    static constexpr int64_t pack = 1;
    static constexpr int64_t rows = kRows;   // of queries at a time
    static constexpr int64_t align = lanes;  // of depths and widths
    static constexpr bool tiled = false;
    struct Registers {};

    static RF_INLINE void multiply_add(SumVector& sum, Element a, ElementVector b) { sum += b * a; }
    // Elements along a row of n numbers.
    static RF_INLINE void along_row(const F* __restrict row, int64_t n, Element* __restrict out) {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = row[i];
    }
    // Elements across `pack` rows.
    static RF_INLINE void across_rows(const F* __restrict rows, int64_t, int64_t n, Element* __restrict out) {
        along_row(rows, n, out);
    }
};

#ifdef __AVX512BF16__
struct Pair {
    using Sum = float;
    using Element = std::uint32_t;
    typedef float SumVector __attribute__((vector_size(kVectorBytes), may_alias));
    typedef std::uint32_t ElementVector __attribute__((vector_size(kVectorBytes), may_alias));
    static constexpr int64_t lanes = kVectorBytes / 4;
    static constexpr int64_t pack = 2;
    static constexpr int64_t rows = kRows;
    static constexpr int64_t align = lanes;
    static constexpr bool tiled = false;
    struct Registers {};

    static RF_INLINE void multiply_add(SumVector& sum, Element a, ElementVector b) {
        sum = (SumVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                          (__m512bh)b);
    }
    typedef std::uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2), may_alias));
    static RF_INLINE HalfVector rounded(const float* row) {
        return (HalfVector)_mm512_cvtneps_pbh(_mm512_load_ps(row));
    }
    static RF_INLINE void along_row(const float* __restrict row, int64_t n, Element* __restrict out) {
        for (int64_t i = 0; i < n; i += lanes) *reinterpret_cast<HalfVector*>(out + i / 2) = rounded(row + i);
    }
    static RF_INLINE void across_rows(const float* __restrict rows, int64_t stride, int64_t n,
                                      Element* __restrict out) {
        for (int64_t i = 0; i < n; i += lanes) {
            const __m512i both =
                (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(rows + stride + i), _mm512_load_ps(rows + i));
            _mm512_store_si512(out + i, interleave(both));
        }
    }
};
#endif

#ifdef __AMX_BF16__
struct TilePair : Pair {
    static constexpr int64_t rows = 2 * kTileRows;
    static constexpr int64_t align = kTileDepth;
    static constexpr bool tiled = true;
    using Registers = TileRegisters;
};

// out [rows, width] = or += left [rows, pairs] right [pairs, width] on tile registers. Rows, width and twice
// the pairs are multiples of 32.
template <bool add>
void tile_product(int64_t rows, int64_t width, int64_t pairs, const std::uint32_t* left, int64_t left_stride,
                  const std::uint32_t* right, int64_t stride, float* out, int64_t out_stride) {
    const int64_t out_bytes = 4 * out_stride, left_bytes = 4 * left_stride, bytes = 4 * stride;
    compiler_barrier();
    for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
        for (int64_t j = 0; j < width; j += 2 * kTileColumns) {
            float* to = out + r * out_stride + j;
            float* below = to + kTileRows * out_stride;
            if (add) {
                _tile_loadd(0, to, out_bytes);
                _tile_loadd(1, to + kTileColumns, out_bytes);
                _tile_loadd(2, below, out_bytes);
                _tile_loadd(3, below + kTileColumns, out_bytes);
            } else {
                clear_sums();
            }
            for (int64_t k = 0; k < pairs; k += kTileRows) {
                const std::uint32_t* a = left + r * left_stride + k;
                const std::uint32_t* b = right + k * stride + j;
                _tile_loadd(4, a, left_bytes);
                _tile_loadd(5, a + kTileRows * left_stride, left_bytes);
                _tile_loadd(6, b, bytes);
                _tile_loadd(7, b + kTileColumns, bytes);
                multiply_tiles<true>();
            }
            _tile_stored(0, to, out_bytes);
            _tile_stored(1, to + kTileColumns, out_bytes);
            _tile_stored(2, below, out_bytes);
            _tile_stored(3, below + kTileColumns, out_bytes);
        }
    }
}
#endif

// Element k of row r, along the summed axis, is data[r row + k step].
template <class P>
struct Left {
    const typename P::Element* data;
    int64_t row, step;
};

template <class P, int vectors, bool add>
__attribute__((noinline)) void tile(Left<P> left, const typename P::Element* right, int64_t stride,
                                    int64_t depth, typename P::Sum* out, int64_t out_stride) {
    using SumVector = typename P::SumVector;
    using ElementVector = typename P::ElementVector;
    SumVector sum[kRows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            if (add)
                sum[r][v] = *reinterpret_cast<const SumVector*>(out + r * out_stride + v * P::lanes);
            else
                sum[r][v] = SumVector{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        ElementVector b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            b[v] = *reinterpret_cast<const ElementVector*>(right + k * stride + v * P::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const typename P::Element a = left.data[r * left.row + k * left.step];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) P::multiply_add(sum[r][v], a, b[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            *reinterpret_cast<SumVector*>(out + r * out_stride + v * P::lanes) = sum[r][v];
    }
}

// out [rows, width] = or += left [rows, depth] right [depth, width]; rows in groups of kRows, width in lanes.
template <class P, bool add>
void product(int64_t rows, int64_t width, int64_t depth, Left<P> left, const typename P::Element* right,
             int64_t stride, typename P::Sum* out, int64_t out_stride) {
#ifdef __AMX_BF16__
    if constexpr (P::tiled)
        return tile_product<add>(rows, width, depth, left.data, left.row, right, stride, out, out_stride);
#endif
    for (int64_t r = 0; r < rows; r += kRows) {
        const Left<P> group{left.data + r * left.row, left.row, left.step};
        typename P::Sum* to = out + r * out_stride;
        for (int64_t j = 0; j < width; j += kVectors * P::lanes) {
            const int64_t vectors = min64(kVectors, (width - j) / P::lanes);
            if (vectors == kVectors)
                tile<P, kVectors, add>(group, right + j, stride, depth, to + j, out_stride);
            else if (kVectors > 3 && vectors == 3)
                tile<P, 3, add>(group, right + j, stride, depth, to + j, out_stride);
            else if (kVectors > 2 && vectors == 2)
                tile<P, 2, add>(group, right + j, stride, depth, to + j, out_stride);
            else
                tile<P, 1, add>(group, right + j, stride, depth, to + j, out_stride);
        }
    }
}

}  // namespace
}  // namespace rf::RF_ISA
