// LayerNorm's pull-back. Below a linear layer it is part of that layer's step (linear.cpp).
#include "cpu/row_statistics.h"

namespace rf::RF_ISA {
namespace {

struct Norm {
    const NormArgs& args;
    int64_t rows_per_chunk;
    const void* weight;  // [width] as F
};

template <class F>
void norm_chunk(int64_t index, const void* context, void* scratch) {
    const Norm& job = *static_cast<const Norm*>(context);
    const NormArgs& args = job.args;
    const int64_t width = args.width, rows = args.batch * args.rows;
    F* buffers = static_cast<F*>(scratch);  // [4, width]
    F *x_buffer = buffers, *factor = buffers + width, *in = buffers + 2 * width,
      *out_buffer = buffers + 3 * width;
    for (int64_t row = index * job.rows_per_chunk; row < min64((index + 1) * job.rows_per_chunk, rows);
         ++row) {
        const F* __restrict x = load(args.x, row * width, width, x_buffer);
        row_factor(x, static_cast<const F*>(job.weight), row_statistics(x, width, args.eps), width, factor);
        for (int64_t t = 0; t < args.rhs; ++t) {
            const int64_t offset = (t * rows + row) * width;
            const F* __restrict c = load(args.c, offset, width, in);
            F* __restrict out = target(args.out, offset, out_buffer);
            RF_SIMD
            for (int64_t i = 0; i < width; ++i) out[i] = factor[i] * c[i];
            commit(args.out, offset, width, out_buffer);
        }
    }
}

template <class F>
void run(const NormArgs& args) {
    const int64_t rows = args.batch * args.rows;
    const int64_t rows_per_chunk = args.width >= kChunk ? 1 : kChunk / (args.width > 0 ? args.width : 1);
    Partials parameters(args.width);
    F* weight = reinterpret_cast<F*>(parameters.data());
    for (int64_t i = 0; i < args.width; ++i)
        weight[i] = args.weight.data ? load_one<F>(args.weight, i) : F(1);
    const Norm job{args, rows_per_chunk, weight};
    parallel_for(ceil_div(rows, rows_per_chunk), args.rhs * rows * args.width, args.threads, norm_chunk<F>,
                 &job, 4 * static_cast<std::size_t>(args.width) * sizeof(F));
}

}  // namespace

void norm_pullback(const NormArgs& args) {
    if (args.c.dtype == DType::f64 || args.x.dtype == DType::f64)
        run<double>(args);
    else
        run<float>(args);
}

}  // namespace rf::RF_ISA
