// The pull-back of softmax, for attention whose scores are in memory.
#include "cpu/softmax_row.h"

namespace rf::RF_ISA {
namespace {

struct Softmax {
    const SoftmaxArgs& args;
    int64_t rows_per_chunk;
};

template <class F>
void softmax_chunk(int64_t index, const void* context, void* scratch) {
    const Softmax& job = *static_cast<const Softmax*>(context);
    const SoftmaxArgs& args = job.args;
    const int64_t width = args.width;
    const int64_t end = min64((index + 1) * job.rows_per_chunk, args.rows);
    F* weight = static_cast<F*>(scratch);  // [4, width]
    F *factor = weight + width, *in = weight + 2 * width, *out_buffer = weight + 3 * width;
    for (int64_t row = index * job.rows_per_chunk; row < end; ++row) {
        softmax_row<true>(load(args.scores, row * width, width, in), width, weight, factor);
        for (int64_t t = 0; t < args.num_maps; ++t) {
            const int64_t offset = (t * args.rows + row) * width;
            const F* __restrict c = load(args.c, offset, width, in);
            F* __restrict out = target(args.out, offset, out_buffer);
            RF_SIMD
            for (int64_t i = 0; i < width; ++i) out[i] = factor[i] == 0 ? F(0) : factor[i] * c[i];
            commit(args.out, offset, width, out_buffer);
        }
    }
}

}  // namespace

void softmax_pullback(const SoftmaxArgs& args) {
    const bool wide = args.scores.dtype == DType::f64 || args.c.dtype == DType::f64;
    const int64_t rows = rows_of_task(args.width);
    const Softmax job{args, rows};
    parallel_for(ceil_div(args.rows, rows), args.num_maps * args.rows * args.width, args.threads,
                 wide ? softmax_chunk<double> : softmax_chunk<float>, &job,
                 4 * static_cast<std::size_t>(args.width) * (wide ? sizeof(double) : sizeof(float)));
}

}  // namespace rf::RF_ISA
