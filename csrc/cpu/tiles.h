// Products of bfloat16 on tile registers (AMX): one micro-kernel, and float32 operands as three bfloat16
// parts.
//
// x = high + middle + low, each the rest rounded to bfloat16, is exact. Of the nine products of parts of two
// numbers the three smallest, together below 2^-25 of the whole, are left out; the six others are summed in
// float32.
//
// The sums are those of a float32 product within float32's own rounding. Numbers below 2^-126 count as zero.
#pragma once

#include <immintrin.h>

#include "cpu/block.h"
#include "cpu/in_turn.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kTileRows = 16;     // of sums and of the left operand
constexpr int64_t kTileColumns = 16;  // of sums and of the right operand
constexpr int64_t kTileDepth = 32;    // summed in one step
constexpr int64_t kTileBytes = 1024;

template <int parts>
constexpr int64_t kStepBytes = parts * kTileBytes;

// Left tiles of one group of up to 16 rows: rows `stride` bytes apart, part p of step s at
// data + s step + p kTileBytes.
struct LeftTiles {
    const char* data;
    int64_t stride, step;
};

// Right tiles of two groups of 16 columns, 64 bytes a row: part p of group g of step s at
// data + ((s parts + p) 2 + g) kTileBytes.
struct RightTiles {
    const char* data;
};

// The tile registers while a task runs: 0 to 3 sums [left group][right group], 4 and 5 left, 6 and 7 right.
class TileRegisters {
  public:
    TileRegisters() { set(kTileRows, kTileRows); }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;

    // Rows of the two left groups, 0 to 16.
    void set(int64_t first, int64_t second) {
        if (first == rows_[0] && second == rows_[1]) return;
        rows_[0] = first;
        rows_[1] = second;
        alignas(64) unsigned char config[64] = {1};
        const int64_t rows[8] = {first, first, second, second, first, second, kTileRows, kTileRows};
        for (int i = 0; i < 8; ++i) {
            config[16 + 2 * i] = 64;  // bytes of a row
            config[48 + i] = static_cast<unsigned char>(rows[i] > 0 ? rows[i] : 1);
        }
        _tile_loadconfig(config);
    }

  private:
    int64_t rows_[2] = {-1, -1};
};

template <bool both, int part>
RF_INLINE void load_left(const LeftTiles& first, const LeftTiles& second, int64_t s) {
    _tile_loadd(4, first.data + s * first.step + part * kTileBytes, first.stride);
    if (both) _tile_loadd(5, second.data + s * second.step + part * kTileBytes, second.stride);
}

template <int parts, int part>
RF_INLINE void load_right(const RightTiles& right, int64_t s) {
    const char* at = right.data + (s * parts + part) * 2 * kTileBytes;
    _tile_loadd(6, at, 64);
    _tile_loadd(7, at + kTileBytes, 64);
}

template <bool both>
RF_INLINE void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Memory to fetch into the L2 cache while products run: share `index` of `count` of rows `stride` bytes
// apart. Reading a line from further away takes as long as a few products, and nothing else hides it: tiles
// are read from several places at a time.
class Ahead {
  public:
    Ahead() = default;
    Ahead(const char* data, int64_t rows, int64_t row_bytes, int64_t stride, int64_t index, int64_t count)
        : row_(ceil_div(row_bytes, 64)), skip_(stride - 64 * row_) {
        const int64_t lines = rows * row_, first = lines * index / count;
        left_ = lines * (index + 1) / count - first;
        if (left_ == 0) return;
        in_row_ = row_ - first % row_;
        at_ = data + first / row_ * stride + first % row_ * 64;
    }
    int64_t lines() const { return left_; }
    void fetch(int64_t lines) {
        for (int64_t n = min64(lines, left_); n > 0; --n) {
            _mm_prefetch(at_, _MM_HINT_T1);
            at_ += 64;
            --left_;
            if (--in_row_ == 0) {
                at_ += skip_;
                in_row_ = row_;
            }
        }
    }

  private:
    const char* at_ = nullptr;
    int64_t row_ = 0, skip_ = 0, left_ = 0, in_row_ = 0;
};

// Products of four tiles in a step.
template <int parts>
constexpr int64_t kSlots = parts == 3 ? 6 : 1;

// Adds the products of `steps` steps to the sums; `both` groups of rows, or the first. `beside` is called in
// every slot: what it does there runs in units that the products leave idle, a little at a time.
template <int parts, bool both, class Beside>
RF_INLINE void add_products(const LeftTiles& first, const LeftTiles& second, const RightTiles& right,
                            int64_t steps, const Beside& beside) {
    static_assert(parts == 1 || parts == 3);
    const auto multiply = [&] {
        multiply_tiles<both>();
        beside();
    };
    for (int64_t s = 0; s < steps; ++s) {
        if constexpr (parts == 3) {
            load_left<both, 2>(first, second, s);
            load_right<3, 0>(right, s);
            multiply();
            load_left<both, 1>(first, second, s);
            multiply();
            load_right<3, 1>(right, s);
            multiply();
            load_left<both, 0>(first, second, s);
            multiply();
            load_right<3, 2>(right, s);
            multiply();
            load_right<3, 0>(right, s);
            multiply();
        } else {
            load_left<both, 0>(first, second, s);
            load_right<1, 0>(right, s);
            multiply();
        }
    }
}

RF_INLINE void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

RF_INLINE __m512 widen(__m256i numbers) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}

// The parts of 16 numbers. What rounds to infinity, and NaN, has no other parts.
RF_INLINE void split_float(__m512 x, __m256i parts[3]) {
    constexpr int infinite = 0x08 | 0x10 | 0x01 | 0x80;  // infinities and NaN
    parts[0] = (__m256i)_mm512_cvtneps_pbh(x);
    const __m512 high = widen(parts[0]);
    const __m512 rest = _mm512_maskz_sub_ps(_mm512_knot(_mm512_fpclass_ps_mask(high, infinite)), x, high);
    parts[1] = (__m256i)_mm512_cvtneps_pbh(rest);
    parts[2] = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(rest, widen(parts[1])));
}

RF_INLINE __m512i join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Two rows of a right tile as one, which has their numbers in turn.
RF_INLINE __m512i pair_rows(__m256i first, __m256i second) {
    return in_turn(join(first, second));
}

// Left tiles of `count` <= 16 rows from row `first` of data [rows, depth] on, zero where there is no number:
// bfloat16, or with three parts float.
template <int parts>
void pack_left(const void* data, int64_t first, int64_t count, int64_t depth, char* to) {
    const int64_t steps = ceil_div(depth, kTileDepth);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t at = (first + r) * depth + s * kTileDepth;
            const auto mask = static_cast<std::uint32_t>(
                (std::uint64_t{1} << min64(depth - s * kTileDepth, kTileDepth)) - 1);
            char* row = to + s * kStepBytes<parts> + r * 64;
            if constexpr (parts == 1) {
                const auto* from = static_cast<const std::uint16_t*>(data) + at;
                _mm512_storeu_si512(row, _mm512_maskz_loadu_epi16(mask, from));
            } else {
                const float* from = static_cast<const float*>(data) + at;
                __m256i low[3], high[3];
                split_float(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from), low);
                split_float(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16), high);
                for (int p = 0; p < 3; ++p) _mm512_storeu_si512(row + p * kTileBytes, join(low[p], high[p]));
            }
        }
}

}  // namespace
}  // namespace rf::RF_ISA
