// The pull-back of softmax, for attention whose scores are in memory.
#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

struct Softmax {
    const SoftmaxArgs& args;
    int64_t rows_per_chunk;
};

// weight = sign(s) softmax(s) + softmax(|s|) over the scores that are not -inf; 0 there.
template <class F>
RF_INLINE void row_weight(const F* __restrict s, int64_t n, F* __restrict weight,
                          F* __restrict absolute_part) {
    const F masked = -static_cast<F>(__builtin_inf());
    F largest = masked, largest_absolute = 0;
    RF_SIMD_MAX(largest, largest_absolute)
    for (int64_t i = 0; i < n; ++i) {
        const F magnitude = s[i] == masked ? F(0) : absolute(s[i]);
        largest = s[i] > largest ? s[i] : largest;
        largest_absolute = magnitude > largest_absolute ? magnitude : largest_absolute;
    }
    if (largest == masked) {  // nothing is attended to
        for (int64_t i = 0; i < n; ++i) weight[i] = 0;
        return;
    }
    double sum = 0, sum_absolute = 0;
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = min64(start + kBlock, n);
        F block = 0, block_absolute = 0;
        RF_SIMD_SUM(block, block_absolute)
        for (int64_t i = start; i < end; ++i) {
            const F e = exponential(s[i] - largest);
            const F kept = s[i] == masked ? masked : absolute(s[i]);
            const F ea = exponential(kept - largest_absolute);
            weight[i] = e;
            absolute_part[i] = ea;
            block += e;
            block_absolute += ea;
        }
        sum += static_cast<double>(block);
        sum_absolute += static_cast<double>(block_absolute);
    }
    const F inverse = static_cast<F>(1 / sum), inverse_absolute = static_cast<F>(1 / sum_absolute);
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F a = weight[i] * inverse;
        const F upper = s[i] > 0 ? a : F(0);
        const F lower = s[i] < 0 ? a : F(0);
        weight[i] = upper - lower + absolute_part[i] * inverse_absolute;
    }
}

template <class F>
void softmax_chunk(int64_t index, const void* context, void* scratch) {
    const Softmax& job = *static_cast<const Softmax*>(context);
    const SoftmaxArgs& args = job.args;
    const int64_t width = args.width;
    const int64_t end = min64((index + 1) * job.rows_per_chunk, args.rows);
    F* weight = static_cast<F*>(scratch);  // [4, width]
    F *absolute_part = weight + width, *in = weight + 2 * width, *out_buffer = weight + 3 * width;
    for (int64_t row = index * job.rows_per_chunk; row < end; ++row) {
        row_weight(load(args.scores, row * width, width, in), width, weight, absolute_part);
        for (int64_t t = 0; t < args.rhs; ++t) {
            const int64_t offset = (t * args.rows + row) * width;
            const F* __restrict c = load(args.c, offset, width, in);
            F* __restrict out = target(args.out, offset, out_buffer);
            RF_SIMD
            for (int64_t i = 0; i < width; ++i) out[i] = weight[i] == 0 ? F(0) : weight[i] * c[i];
            commit(args.out, offset, width, out_buffer);
        }
    }
}

}  // namespace

void softmax_pullback(const SoftmaxArgs& args) {
    const bool wide = args.scores.dtype == DType::f64 || args.c.dtype == DType::f64;
    const int64_t rows = args.width >= kChunk ? 1 : kChunk / (args.width > 0 ? args.width : 1);
    const Softmax job{args, rows};
    parallel_for(ceil_div(args.rows, rows), args.rhs * args.rows * args.width, args.threads,
                 wide ? softmax_chunk<double> : softmax_chunk<float>, &job,
                 4 * static_cast<std::size_t>(args.width) * (wide ? sizeof(double) : sizeof(float)));
}

}  // namespace rf::RF_ISA
