// Softmax of one row of scores, and of their absolute values.
#pragma once

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

// Whether every score is -inf; NaN is not.
template <class F>
RF_INLINE bool masked_whole(const F* __restrict s, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (s[i] != -static_cast<F>(__builtin_inf())) return false;
    return true;
}

// weight = softmax(s), factor = sign(s) softmax(s) + softmax(|s|) over the scores that are not -inf; 0 there.
// With `masked_rows` a row may have no other scores and is 0 then; without, it is NaN.
template <bool masked_rows, class F>
RF_INLINE void softmax_row(const F* __restrict s, int64_t n, F* __restrict weight, F* __restrict factor) {
    const F masked = -static_cast<F>(__builtin_inf());
    F largest = masked, largest_absolute = 0;
    RF_SIMD_MAX(largest, largest_absolute)
    for (int64_t i = 0; i < n; ++i) {
        const F magnitude = s[i] == masked ? F(0) : absolute(s[i]);
        largest = s[i] > largest ? s[i] : largest;
        largest_absolute = magnitude > largest_absolute ? magnitude : largest_absolute;
    }
    if (masked_rows && largest == masked && masked_whole(s, n)) {
        for (int64_t i = 0; i < n; ++i) weight[i] = factor[i] = 0;
        return;
    }
    double sum = 0, sum_absolute = 0;
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = min64(start + kBlock, n);
        F part = 0, part_absolute = 0;
        RF_SIMD_SUM(part, part_absolute)
        for (int64_t i = start; i < end; ++i) {
            const F e = exponential(s[i] - largest);
            const F kept = s[i] == masked ? masked : absolute(s[i]);
            const F ea = exponential(kept - largest_absolute);
            weight[i] = e;
            factor[i] = ea;
            part += e;
            part_absolute += ea;
        }
        sum += static_cast<double>(part);
        sum_absolute += static_cast<double>(part_absolute);
    }
    const F inverse = static_cast<F>(1 / sum), inverse_absolute = static_cast<F>(1 / sum_absolute);
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F a = weight[i] * inverse;
        const F upper = s[i] > 0 ? a : F(0);
        const F lower = s[i] < 0 ? a : F(0);
        weight[i] = a;
        factor[i] = upper - lower + factor[i] * inverse_absolute;
    }
}

// In place: softmax(s). With `masked_rows` a row may have no scores that are not -inf and is 0 then; without,
// it is NaN.
template <bool masked_rows, class F>
RF_INLINE void softmax_weights(F* __restrict s, int64_t n) {
    const F masked = -static_cast<F>(__builtin_inf());
    F largest = masked;
    RF_SIMD_MAX(largest)
    for (int64_t i = 0; i < n; ++i) largest = s[i] > largest ? s[i] : largest;
    if (masked_rows && largest == masked && masked_whole(s, n)) {
        for (int64_t i = 0; i < n; ++i) s[i] = 0;
        return;
    }
    double sum = 0;
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = min64(start + kBlock, n);
        F part = 0;
        RF_SIMD_SUM(part)
        for (int64_t i = start; i < end; ++i) {
            const F e = exponential(s[i] - largest);
            s[i] = e;
            part += e;
        }
        sum += static_cast<double>(part);
    }
    const F inverse = static_cast<F>(1 / sum);
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) s[i] *= inverse;
}

}  // namespace
}  // namespace rf::RF_ISA
