// Masses: sum |x| |c| of a sample, of P and with contrast of N = P - D.
#pragma once

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

// Adds the masses of n elements, summed in F, to two running sums; no more than a block, or they lose digits.
template <class F, bool contrast>
RF_INLINE void add_mass(const F* __restrict x, const F* __restrict p, const F* __restrict d, int64_t n,
                        double* mass_p, double* mass_n) {
    F sum_p = 0, sum_n = 0;
    RF_SIMD_SUM(sum_p, sum_n)
    for (int64_t i = 0; i < n; ++i) {
        const F magnitude = absolute(x[i]);
        sum_p += magnitude * absolute(p[i]);
        if (contrast) sum_n += magnitude * absolute(p[i] - d[i]);
    }
    *mass_p += static_cast<double>(sum_p);
    if (contrast) *mass_n += static_cast<double>(sum_n);
}

// mass[first + t batch + b]: the sum over the `parts` of sample b of partials[part stride + t], in order.
inline void store_masses(const Operand& mass, int64_t first, int64_t num_maps, int64_t batch,
                         const double* partials, int64_t parts, int64_t stride) {
    for (int64_t t = 0; t < num_maps; ++t)
        for (int64_t b = 0; b < batch; ++b) {
            double sum = 0;
            for (int64_t part = b * parts; part < (b + 1) * parts; ++part) sum += partials[part * stride + t];
            store_one(mass, first + t * batch + b, sum);
        }
}

}  // namespace
}  // namespace rf::RF_ISA
