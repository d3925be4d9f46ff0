// BatchNorm y = g x + h, channels innermost, pulled back from its output: the factor of an element is
// |g| (1 + sign(x)), and x has the sign of y - h, times that of g, which cancels.
#pragma once

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

// |g| and h for kBlock elements from any channel on.
template <class F>
struct Channels {
    const F *size, *shift;
    int64_t count;

    // Of element `offset` of an array whose innermost axis are the channels.
    int64_t at(int64_t offset) const { return offset % count; }
};

// How many numbers `fill` writes.
constexpr int64_t channel_numbers(int64_t channels) {
    return 2 * (channels + kBlock);
}

template <class F>
Channels<F> fill(const Operand& gain, const Operand& shift, int64_t channels, F* numbers) {
    F *size = numbers, *offset = numbers + channels + kBlock;
    for (int64_t i = 0; i < channels + kBlock && channels > 0; ++i) {
        size[i] = absolute(load_one<F>(gain, i % channels));
        offset[i] = load_one<F>(shift, i % channels);
    }
    return {size, offset, channels};
}

template <class F>
RF_INLINE F affine_factor_of(F y, F size, F shift) {
    return y > shift ? size + size : (y == shift ? size : F(0));
}

// The factors of n elements, with `gate` those behind a ReLU.
template <class F>
RF_INLINE void affine_factors(const F* __restrict y, const F* __restrict size, const F* __restrict shift,
                              int64_t n, bool gate, F* __restrict out) {
    if (gate) {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            const F factor = affine_factor_of(y[i], size[i], shift[i]);
            out[i] = y[i] > F(0) ? factor + factor : F(0);
        }
    } else {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = affine_factor_of(y[i], size[i], shift[i]);
    }
}

}  // namespace
}  // namespace rf::RF_ISA
