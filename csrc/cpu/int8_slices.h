// Products of float on tile registers in int8 slices (the Ozaki scheme): tile registers multiply 8-bit
// integers twice as fast as bfloat16 and sum them exactly.
//
// The numbers of a row of one operand and of a column of the other are scaled so that the largest magnitude
// is kLargest (kLargestUnsigned), and rounded to integers 2^16 d0 + 2^8 d1 + d2 of three slices of 8 bits. Of
// the nine products of slices the smallest, d2 d2, is left out: it is below 2^-32 of that of the largest
// numbers. The eight others belong to four powers of two, each with a sum of its own.
//
// Rounding loses at most 2^-24 of the largest number of the row or column, for every number. Sums are exact,
// so nothing depends on their order. After Ootomo, Ozaki and Yokota, "DGEMM on integer matrix multiplication
// unit", 2024.
#pragma once

#include "cpu/tiles.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kSlices = 3;
constexpr int64_t kSliceSums = 4;                     // of products of slices, times 2^32, 2^24, 2^16, 2^8
constexpr int64_t kInt8TileDepth = 64;                // summed in one step
constexpr int64_t kSliceStep = kSlices * kTileBytes;  // bytes of a group of 16 rows or columns
// A little less than slices of -128 to 127 and of 0 to 255 hold, for the rounding of the scale.
constexpr float kLargest = 8355000.0f, kLargestUnsigned = 16770000.0f;
// The scale of smaller numbers would not be finite: they keep fewer bits.
constexpr float kSmallest = 1e-30f;

// From numbers to integers, and back.
struct Scale {
    float to, from;
};

// For numbers whose magnitudes are at most that of the bits `most`; NaN where that is infinite or NaN.
RF_INLINE Scale scale_of(std::uint32_t most, float largest) {
    if (most > 0x7f7fffffu) return {__builtin_nanf(""), __builtin_nanf("")};
    const float bounded = bits_of<float>(most) < kSmallest ? kSmallest : bits_of<float>(most);
    return {largest / bounded, bounded / largest};
}

RF_INLINE __m512i magnitude_bits(__m512 x) {
    return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff));
}

// The slices, from -128 to 127, of 16 numbers.
RF_INLINE void slices_of(__m512 x, __m512 scale, __m128i slices[kSlices]) {
    // With 128 added to each, slices are bytes.
    const __m512i q =
        _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, scale)), _mm512_set1_epi32(0x808080));
    const __m128i centre = _mm_set1_epi8(-128);
    slices[0] = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 16)), centre);
    slices[1] = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)), centre);
    slices[2] = _mm_xor_si128(_mm512_cvtepi32_epi8(q), centre);
}

// Left tiles [step, slice, 16, 64] of `count` <= 16 rows from row `first` of data [rows, depth] on, and 2^16
// times the scales of the rows. Rows beyond `count` are not written.
RF_INLINE void pack_slices(const float* data, int64_t first, int64_t count, int64_t depth, char* to,
                           float* scales) {
    const auto load = [&](const float* row, int64_t k) {
        const int64_t n = min64(depth - k, 16);
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0), row + k);
    };
    for (int64_t r = 0; r < count; ++r) {
        const float* row = data + (first + r) * depth;
        __m512i most = _mm512_setzero_si512();
        for (int64_t k = 0; k < depth; k += 16) most = _mm512_max_epu32(most, magnitude_bits(load(row, k)));
        const Scale scale = scale_of(_mm512_reduce_max_epu32(most), kLargest);
        scales[r] = scale.from * 0x1p16f;
        for (int64_t k = 0; k < ceil_div(depth, kInt8TileDepth) * kInt8TileDepth; k += 16) {
            __m128i slices[kSlices];
            slices_of(load(row, k), _mm512_set1_ps(scale.to), slices);
            char* at = to + k / kInt8TileDepth * kSliceStep + r * 64 + k % kInt8TileDepth;
            for (int64_t d = 0; d < kSlices; ++d)
                _mm_store_si128(reinterpret_cast<__m128i*>(at + d * kTileBytes), slices[d]);
        }
    }
}

using SliceSums = std::int32_t[kSliceSums][kTileRows][kTileColumns];

// A row of the four sums added up, over 2^16.
RF_INLINE __m512 combined(const std::int32_t* row) {
    constexpr int64_t stride = kTileRows * kTileColumns;
    const auto sum = [&](int64_t p) { return _mm512_cvtepi32_ps(_mm512_load_si512(row + p * stride)); };
    const __m512 low = _mm512_fmadd_ps(sum(3), _mm512_set1_ps(0x1p-8f), sum(2));
    return _mm512_fmadd_ps(sum(0), _mm512_set1_ps(0x1p16f),
                           _mm512_fmadd_ps(sum(1), _mm512_set1_ps(0x1p8f), low));
}

// The intrinsics' registers must be literals.
#define RF_MULTIPLY_SLICES(sum, right)   \
    do {                                 \
        if constexpr (is_unsigned)       \
            _tile_dpbsud(sum, 4, right); \
        else                             \
            _tile_dpbssd(sum, 4, right); \
    } while (0)

// Calls of `beside` in a step of sum_slices.
constexpr int64_t kSliceSlots = 2;

// The sums of 16 rows and columns over `steps` steps of left and right tiles [slice, 16, 64], which are
// `stride` bytes apart; the slices on the right are unsigned or not. Registers 0 to 3 have one power of two
// each.
template <bool is_unsigned, class Beside>
RF_INLINE void sum_slices(const char* left, const char* right, int64_t steps, int64_t stride, SliceSums& to,
                          const Beside& beside) {
    compiler_barrier();
    clear_sums();
    for (int64_t s = 0; s < steps; ++s, left += stride, right += stride) {
        _tile_loadd(5, right, 64);
        _tile_loadd(4, left, 64);
        RF_MULTIPLY_SLICES(0, 5);
        _tile_loadd(6, right + kTileBytes, 64);
        RF_MULTIPLY_SLICES(1, 6);
        _tile_loadd(7, right + 2 * kTileBytes, 64);
        RF_MULTIPLY_SLICES(2, 7);
        _tile_loadd(4, left + kTileBytes, 64);
        RF_MULTIPLY_SLICES(3, 7);
        beside();
        RF_MULTIPLY_SLICES(1, 5);
        RF_MULTIPLY_SLICES(2, 6);
        _tile_loadd(4, left + 2 * kTileBytes, 64);
        RF_MULTIPLY_SLICES(3, 6);
        RF_MULTIPLY_SLICES(2, 5);
        beside();
    }
    _tile_stored(0, to[0], 64);
    _tile_stored(1, to[1], 64);
    _tile_stored(2, to[2], 64);
    _tile_stored(3, to[3], 64);
}
#undef RF_MULTIPLY_SLICES

}  // namespace
}  // namespace rf::RF_ISA
