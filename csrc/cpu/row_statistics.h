// One row of a LayerNorm's input: its statistics, and the factor of the pull-back.
#pragma once

#include "cpu/lanes.h"

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

// Adds sum x and sum |x| of a row to `first` and `second`; `centred` sum (x - mean)^2 and sum (|x| -
// mean_absolute)^2.
template <bool centred, class F>
RF_INLINE void add_sums(const F* __restrict x, int64_t begin, int64_t width, F mean, F mean_absolute,
                        double& first, double& second) {
    for (int64_t start = begin; start < width; start += kBlock) {
        const int64_t n = min64(kBlock, width - start);
        F s = 0, sa = 0;
        RF_SIMD_SUM(s, sa)
        for (int64_t i = 0; i < n; ++i) {
            const F at = centred ? x[start + i] - mean : x[start + i];
            const F size = centred ? absolute(x[start + i]) - mean_absolute : absolute(x[start + i]);
            s += centred ? at * at : at;
            sa += centred ? size * size : size;
        }
        first += static_cast<double>(s);
        second += static_cast<double>(sa);
    }
}

// Floats: four vectors of sums at a time, to hide the latency of additions, reduced to one number as seldom
// as the precision of float32 allows. The tail goes as above. `pass(i)` is called for every vector, to
// prefetch something meanwhile.
template <bool centred, class Pass>
RF_INLINE void add_row_sums(const float* __restrict x, int64_t width, float mean, float mean_absolute,
                            double& first, double& second, const Pass& pass) {
    constexpr int64_t kChains = 4, kStep = kChains * kLanes;
    const int64_t whole = width / kStep * kStep;
    for (int64_t start = 0; start < whole; start += kBlock * kChains) {
        Lanes s[kChains] = {}, sa[kChains] = {};
        const int64_t end = min64(start + kBlock * kChains, whole);
        for (int64_t i = start; i < end; i += kStep)
            for (int64_t k = 0; k < kChains; ++k) {
                pass(i + k * kLanes);
                const Lanes value = *reinterpret_cast<const Lanes*>(x + i + k * kLanes);
                const Lanes at = centred ? value - mean : value;
                const Lanes size =
                    centred ? magnitude<Lanes>(value) - mean_absolute : magnitude<Lanes>(value);
                s[k] += centred ? at * at : at;
                sa[k] += centred ? size * size : size;
            }
        first += total<float, Lanes>((s[0] + s[1]) + (s[2] + s[3]));
        second += total<float, Lanes>((sa[0] + sa[1]) + (sa[2] + sa[3]));
    }
    add_sums<centred>(x, whole, width, mean, mean_absolute, first, second);
}

template <bool centred, class Pass>
RF_INLINE void add_row_sums(const double* __restrict x, int64_t width, double mean, double mean_absolute,
                            double& first, double& second, const Pass&) {
    add_sums<centred>(x, 0, width, mean, mean_absolute, first, second);
}

// Two passes: means, then centred squares; each calls what prefetches meanwhile, as for add_row_sums.
template <class F, class First, class Second>
RF_INLINE Statistics<F> row_statistics(const F* __restrict x, int64_t width, double eps,
                                       const First& during_means, const Second& during_squares) {
    double sum = 0, sum_absolute = 0, squares = 0, squares_absolute = 0;
    add_row_sums<false>(x, width, F(0), F(0), sum, sum_absolute, during_means);
    const F mean = static_cast<F>(sum / static_cast<double>(width));
    const F mean_absolute = static_cast<F>(sum_absolute / static_cast<double>(width));
    add_row_sums<true>(x, width, mean, mean_absolute, squares, squares_absolute, during_squares);
    return {mean, inverse_sigma<F>(squares, width, eps), inverse_sigma<F>(squares_absolute, width, eps)};
}

template <class F>
RF_INLINE Statistics<F> row_statistics(const F* __restrict x, int64_t width, double eps) {
    const auto nothing = [](int64_t) {};
    return row_statistics(x, width, eps, nothing, nothing);
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
