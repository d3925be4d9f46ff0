// Tile registers (AMX): their configuration, what runs beside their products, and the product of bfloat16.
#pragma once

#include <immintrin.h>

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kTileRows = 16;     // of sums and of the left operand
constexpr int64_t kTileColumns = 16;  // of sums and of the right operand
constexpr int64_t kTileDepth = 32;    // numbers of bfloat16 summed in one step
constexpr int64_t kTileBytes = 1024;

// Left tiles of one group of up to 16 rows: rows `stride` bytes apart, step s at data + s step.
struct LeftTiles {
    const char* data;
    int64_t stride, step;
};

// Right tiles of two groups of 16 columns, 64 bytes a row: group g of step s at data + (2 s + g) kTileBytes.
struct RightTiles {
    const char* data;
};

// Before tiles are loaded. The intrinsics do not say what memory they read (GCC 12), so a compiler could keep
// a number in a register, or drop its store.
RF_INLINE void compiler_barrier() {
    __asm__ volatile("" ::: "memory");
}

// The tile registers while a task runs.
class TileRegisters {
  public:
    TileRegisters() { set(kTileRows, kTileRows); }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;

    // For 0 to 3 as sums [left group][right group], 4 and 5 left and 6 and 7 right, with 0 to 16 rows in
    // either left group.
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
        compiler_barrier();
        _tile_loadconfig(config);
    }

  private:
    int64_t rows_[2] = {-1, -1};
};

template <bool both>
RF_INLINE void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Memory to prefetch into the L2 cache while products run: share `index` of `count` of rows `stride` bytes
// apart. Reading a line from further away takes as long as a few products, and the hardware does not hide it:
// tiles are read from several addresses at a time.
class Prefetch {
  public:
    Prefetch() = default;
    Prefetch(const char* data, int64_t rows, int64_t row_bytes, int64_t stride, int64_t index, int64_t count)
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

// Adds the products of `steps` steps to the sums; `both` groups of rows, or the first. `beside` is called in
// every step: what it does there runs in execution units that the products leave idle, a little at a time.
template <bool both, class Beside>
RF_INLINE void add_products(const LeftTiles& first, const LeftTiles& second, const RightTiles& right,
                            int64_t steps, const Beside& beside) {
    for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(4, first.data + s * first.step, first.stride);
        if (both) _tile_loadd(5, second.data + s * second.step, second.stride);
        _tile_loadd(6, right.data + 2 * s * kTileBytes, 64);
        _tile_loadd(7, right.data + (2 * s + 1) * kTileBytes, 64);
        multiply_tiles<both>();
        beside();
    }
}

RF_INLINE void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Left tiles of `count` <= 16 rows of bfloat16 from row `first` of data [rows, depth] on, zero where there is
// no number.
RF_INLINE void pack_left(const std::uint16_t* data, int64_t first, int64_t count, int64_t depth, char* to) {
    const int64_t steps = ceil_div(depth, kTileDepth);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t s = 0; s < steps; ++s) {
            const auto mask = static_cast<std::uint32_t>(
                (std::uint64_t{1} << min64(depth - s * kTileDepth, kTileDepth)) - 1);
            _mm512_store_si512(to + s * kTileBytes + r * 64,
                               _mm512_maskz_loadu_epi16(mask, data + (first + r) * depth + s * kTileDepth));
        }
}

}  // namespace
}  // namespace rf::RF_ISA
