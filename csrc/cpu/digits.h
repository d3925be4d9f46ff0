// Products of float on tile registers, which multiply numbers of 8 bits twice as fast as bfloat16 and sum
// them exactly.
//
// The numbers of a row of one operand and of a column of the other are scaled so that the largest magnitude
// is kLargest (kLargestUnsigned), and rounded to whole numbers 2^16 d0 + 2^8 d1 + d2 of three digits of a
// byte. Of the nine products of digits the smallest, d2 d2, is left out: it is below 2^-32 of the largest
// number's. The eight others have four places, each with a sum of its own.
//
// What is lost is half a unit, 2^-24 of the largest number of the row or column, for every number. Sums being
// exact, nothing depends on their order. The idea is that of Ootomo, Ozaki and Yokota, "DGEMM on integer
// matrix multiplication unit", 2024.
#pragma once

#include "cpu/tiles.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kDigits = 3;
constexpr int64_t kPlaces = 4;                        // of products of digits: 2^32, 2^24, 2^16, 2^8
constexpr int64_t kByteDepth = 64;                    // summed in one step
constexpr int64_t kDigitStep = kDigits * kTileBytes;  // bytes of a group of 16 rows or columns
// A little less than digits of -128 to 127 and of 0 to 255 hold: rounding of the scale is to stay within.
constexpr float kLargest = 8355000.0f, kLargestUnsigned = 16770000.0f;
// Smaller numbers only keep fewer digits: the scale is to be finite.
constexpr float kSmallest = 1e-30f;

// What numbers are multiplied by, and what a unit of the result stands for.
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

// The digits, from -128 to 127, of 16 numbers.
RF_INLINE void split_number(__m512 x, __m512 scale, __m128i digits[kDigits]) {
    // With 128 added to every digit they are the bytes.
    const __m512i q =
        _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, scale)), _mm512_set1_epi32(0x808080));
    const __m128i centre = _mm_set1_epi8(-128);
    digits[0] = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 16)), centre);
    digits[1] = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)), centre);
    digits[2] = _mm_xor_si128(_mm512_cvtepi32_epi8(q), centre);
}

// Left tiles [step, digit, 16, 64] of `count` <= 16 rows from row `first` of data [rows, depth] on, and what
// 2^16 units of every row stand for. What is no row is anything.
RF_INLINE void pack_digits(const float* data, int64_t first, int64_t count, int64_t depth, char* to,
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
        for (int64_t k = 0; k < ceil_div(depth, kByteDepth) * kByteDepth; k += 16) {
            __m128i digits[kDigits];
            split_number(load(row, k), _mm512_set1_ps(scale.to), digits);
            char* at = to + k / kByteDepth * kDigitStep + r * 64 + k % kByteDepth;
            for (int64_t d = 0; d < kDigits; ++d)
                _mm_store_si128(reinterpret_cast<__m128i*>(at + d * kTileBytes), digits[d]);
        }
    }
}

using DigitSums = std::int32_t[kPlaces][kTileRows][kTileColumns];

// A row of sums in units of 2^16.
RF_INLINE __m512 whole(const std::int32_t* row) {
    constexpr int64_t place = kTileRows * kTileColumns;
    const auto sum = [&](int64_t p) { return _mm512_cvtepi32_ps(_mm512_load_si512(row + p * place)); };
    const __m512 low = _mm512_fmadd_ps(sum(3), _mm512_set1_ps(0x1p-8f), sum(2));
    return _mm512_fmadd_ps(sum(0), _mm512_set1_ps(0x1p16f),
                           _mm512_fmadd_ps(sum(1), _mm512_set1_ps(0x1p8f), low));
}

// The intrinsics' registers must be literals.
#define RF_MULTIPLY_DIGITS(sum, right)   \
    do {                                 \
        if constexpr (is_unsigned)       \
            _tile_dpbsud(sum, 4, right); \
        else                             \
            _tile_dpbssd(sum, 4, right); \
    } while (0)

// Calls of `beside` in a step of sum_digits.
constexpr int64_t kDigitSlots = 2;

// The sums of 16 rows and columns over `steps` steps of left and right tiles [digit, 16, 64], which are
// `stride` bytes apart; the digits on the right are unsigned or not. Registers 0 to 3 have one place each.
template <bool is_unsigned, class Beside>
RF_INLINE void sum_digits(const char* left, const char* right, int64_t steps, int64_t stride, DigitSums& to,
                          const Beside& beside) {
    settle();
    clear_sums();
    for (int64_t s = 0; s < steps; ++s, left += stride, right += stride) {
        _tile_loadd(5, right, 64);
        _tile_loadd(4, left, 64);
        RF_MULTIPLY_DIGITS(0, 5);
        _tile_loadd(6, right + kTileBytes, 64);
        RF_MULTIPLY_DIGITS(1, 6);
        _tile_loadd(7, right + 2 * kTileBytes, 64);
        RF_MULTIPLY_DIGITS(2, 7);
        _tile_loadd(4, left + kTileBytes, 64);
        RF_MULTIPLY_DIGITS(3, 7);
        beside();
        RF_MULTIPLY_DIGITS(1, 5);
        RF_MULTIPLY_DIGITS(2, 6);
        _tile_loadd(4, left + 2 * kTileBytes, 64);
        RF_MULTIPLY_DIGITS(3, 6);
        RF_MULTIPLY_DIGITS(2, 5);
        beside();
    }
    _tile_stored(0, to[0], 64);
    _tile_stored(1, to[1], 64);
    _tile_stored(2, to[2], 64);
    _tile_stored(3, to[3], 64);
}
#undef RF_MULTIPLY_DIGITS

}  // namespace
}  // namespace rf::RF_ISA
