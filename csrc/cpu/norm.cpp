// LayerNorm's pull-back. Below a linear layer it is part of that layer's step (linear.cpp).
#include "cpu/lanes.h"
#include "cpu/row_statistics.h"

namespace rf::RF_ISA {
namespace {

struct Norm {
    const NormArgs& args;
    int64_t rows_per_chunk;
    const void* weight;  // [width] as F
};

// Elements [begin, end) of a row `x`, of every right-hand side; `offset` is that of the row in the first.
template <class V, class F>
RF_INLINE void pull_span(const NormArgs& from, const F* x, const F* weight, const Statistics<F>& s,
                         int64_t offset, int64_t begin, int64_t end) {
    const NormArgs args = from;  // a copy, which nothing that is written here can change
    const int64_t side = args.batch * args.rows * args.width;
    const V zero{};
    for (int64_t i = begin; i < end; i += static_cast<int64_t>(sizeof(V) / sizeof(F))) {
        const V at = *reinterpret_cast<const V*>(x + i), w = *reinterpret_cast<const V*>(weight + i);
        const V signed_part = w * s.inverse;
        const V upper = at > zero ? signed_part : zero, lower = at < zero ? signed_part : zero;
        const V factor = upper - lower + magnitude<V>(w) * s.inverse_absolute;
        for (int64_t t = 0; t < args.rhs; ++t) {
            const int64_t index = offset + t * side + i;
            write<V>(args.out, index, factor * read<V>(args.c, index), false);
        }
    }
}

template <class F>
void norm_chunk(int64_t index, const void* context, void* scratch) {
    const Norm& job = *static_cast<const Norm*>(context);
    const NormArgs& args = job.args;
    const int64_t width = args.width, rows = args.batch * args.rows;
    // Floats, the tail apart, go by vectors.
    const int64_t whole = sizeof(F) == sizeof(float) ? width / kLanes * kLanes : 0;
    const F* const weight = static_cast<const F*>(job.weight);
    for (int64_t row = index * job.rows_per_chunk; row < min64((index + 1) * job.rows_per_chunk, rows);
         ++row) {
        const F* const x = load_ahead(args.x, row * width, width, static_cast<F*>(scratch));
        // While the statistics are summed, what they are for is on its way.
        for (int64_t t = 0; t < args.rhs; ++t) {
            fetch(args.c, (t * rows + row) * width, width);
            fetch(args.out, (t * rows + row) * width, width);
        }
        const Statistics<F> statistics = row_statistics(x, width, args.eps);
        if constexpr (sizeof(F) == sizeof(float))
            pull_span<Lanes, F>(args, x, weight, statistics, row * width, 0, whole);
        pull_span<F, F>(args, x, weight, statistics, row * width, whole, width);
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
                 &job, static_cast<std::size_t>(args.width) * sizeof(F));
}

}  // namespace

void norm_pullback(const NormArgs& args) {
    if (args.c.dtype == DType::f64 || args.x.dtype == DType::f64)
        run<double>(args);
    else
        run<float>(args);
}

}  // namespace rf::RF_ISA
