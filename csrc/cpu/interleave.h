// Pairs of bfloat16 from two rows.
#pragma once

#include <immintrin.h>

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

// Alternately a number of the low half and one of the high half, 16 each.
RF_INLINE __m512i interleave(__m512i halves) {
    alignas(64) static constexpr std::uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}

}  // namespace
}  // namespace rf::RF_ISA
