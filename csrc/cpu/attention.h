// What both pull-backs of attention have in common: rows of strided operands, transposes, scratch.
#pragma once

#include "cpu/small_products.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace rf::RF_ISA {
namespace {

// Scores of one block of query rows, about: the block's operands stay in a 1 MB L2 cache.
constexpr int64_t kBlockScores = 24576;

RF_INLINE int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

// Query rows of one block.
template <class P>
int64_t rows_of_a_block(int64_t queries, int64_t keys) {
    const int64_t rows = kBlockScores / (keys > 0 ? keys : 1);
    const int64_t blocks = ceil_div(queries, rows > 4 * P::rows ? rows : 4 * P::rows);
    return round_up(ceil_div(queries, blocks > 0 ? blocks : 1), P::rows);
}

// Parts of the scratch one after another; without a base only `bytes` is meaningful.
struct Layout {
    std::size_t bytes = 0;

  protected:
    template <class T>
    void take(char* base, T*& pointer, int64_t count) {
        pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
        const std::size_t end = bytes + static_cast<std::size_t>(count) * sizeof(T);
        bytes = (end + kGuard + 63) / 64 * 64;
        if (kGuard > 0 && base != nullptr) guard(base + end, base + bytes);
    }
};

RF_INLINE int64_t offset(const StridedOperand& x, int64_t t, int64_t b, int64_t h, int64_t n) {
    return t * x.strides[0] + b * x.strides[1] + h * x.strides[2] + n * x.strides[3];
}

template <class T>
RF_INLINE void clear(T* data, int64_t n) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) data[i] = T(0);
}

#ifdef __AVX512F__
// The transpose of 16 x 16 elements of 32 bits: pairs of rows, then fours, then quarters of vectors.
inline void transpose_16(const void* in, int64_t stride, void* out, int64_t out_stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = _mm512_loadu_si512(static_cast<const std::uint32_t*>(in) + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        std::uint32_t* to = static_cast<std::uint32_t*>(out) + i * out_stride;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + 4 * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + 8 * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + 12 * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

// out [columns, out_stride] = the transpose of columns of in [count, stride]
template <class E>
RF_INLINE void transpose(const E* __restrict in, int64_t count, int64_t stride, int64_t columns,
                         E* __restrict out, int64_t out_stride) {
#ifdef __AVX512F__
    if constexpr (sizeof(E) == 4) {
        if (count % 16 == 0 && columns % 16 == 0) {
            for (int64_t c = 0; c < columns; c += 16)
                for (int64_t r = 0; r < count; r += 16)
                    transpose_16(in + r * stride + c, stride, out + c * out_stride + r, out_stride);
            return;
        }
    }
#endif
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < count; ++r) out[c * out_stride + r] = in[r * stride + c];
}

// Fetches row n, if there is one, into the L2 cache: rows of a head are far apart, which no hardware
// prefetcher predicts.
RF_INLINE void fetch_row(const StridedOperand& x, int64_t width, int64_t rows, int64_t t, int64_t b,
                         int64_t h, int64_t n) {
    if (n >= rows) return;
    const int64_t element = x.operand.dtype == DType::bf16 ? 2 : x.operand.dtype == DType::f32 ? 4 : 8;
    const char* row = static_cast<const char*>(x.operand.data) + offset(x, t, b, h, n) * element;
    for (int64_t at = 0; at < width * element; at += 64) __builtin_prefetch(row + at, 0, 2);
}

}  // namespace
}  // namespace rf::RF_ISA
