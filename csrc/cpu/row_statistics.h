// One row of a LayerNorm's input: its statistics, and the factor of the pull-back.
#pragma once

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

template <class F>
struct Statistics {
    F mean;
    F inverse;           // 1 / sigma(x); 0 where sigma is 0
    F inverse_absolute;  // 1 / sigma(|x|)
};

template <class F>
RF_INLINE F inverse_sigma(double sum_of_squares, int64_t width, double eps) {
    const F sigma = square_root(static_cast<F>(sum_of_squares / static_cast<double>(width) + eps));
    return sigma > 0 ? F(1) / sigma : F(0);
}

// Two passes: means, then centred squares.
template <class F>
RF_INLINE Statistics<F> row_statistics(const F* __restrict x, int64_t width, double eps) {
    double sum = 0, sum_absolute = 0;
    for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t n = min64(kBlock, width - start);
        F s = 0, sa = 0;
        RF_SIMD_SUM(s, sa)
        for (int64_t i = 0; i < n; ++i) {
            s += x[start + i];
            sa += absolute(x[start + i]);
        }
        sum += static_cast<double>(s);
        sum_absolute += static_cast<double>(sa);
    }
    const F mean = static_cast<F>(sum / static_cast<double>(width));
    const F mean_absolute = static_cast<F>(sum_absolute / static_cast<double>(width));
    double squares = 0, squares_absolute = 0;
    for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t n = min64(kBlock, width - start);
        F s = 0, sa = 0;
        RF_SIMD_SUM(s, sa)
        for (int64_t i = 0; i < n; ++i) {
            const F centred = x[start + i] - mean;
            const F centred_absolute = absolute(x[start + i]) - mean_absolute;
            s += centred * centred;
            sa += centred_absolute * centred_absolute;
        }
        squares += static_cast<double>(s);
        squares_absolute += static_cast<double>(sa);
    }
    return {mean, inverse_sigma<F>(squares, width, eps), inverse_sigma<F>(squares_absolute, width, eps)};
}

// factor = sign(x) w / sigma(x) + |w| / sigma(|x|)
template <class F>
RF_INLINE void row_factor(const F* __restrict x, const F* __restrict weight, const Statistics<F>& s,
                          int64_t width, F* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < width; ++i) {
        const F w = weight[i];
        const F signed_part = w * s.inverse;
        const F upper = x[i] > 0 ? signed_part : F(0);
        const F lower = x[i] < 0 ? signed_part : F(0);
        factor[i] = upper - lower + absolute(w) * s.inverse_absolute;
    }
}

}  // namespace
}  // namespace rf::RF_ISA
