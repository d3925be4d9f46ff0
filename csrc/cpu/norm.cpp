// LayerNorm's pull-back, and its gradient with a constant deviation. The pull-back of a LayerNorm that feeds
// a linear layer is part of the layer's step (linear.cpp).
#include "cpu/lanes.h"
#include "cpu/row_statistics.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kTask = 8 * kChunk;  // elements of one task at most

struct Norm {
    const NormArgs& args;
    int64_t rows_per_chunk;
    const void* weight;  // [width] as F
};

// Elements [begin, end) of a row `x`, for `maps` maps in `type`; `offset` is that of the row in the first of
// them.
template <class V, int maps, DType type, class F>
RF_INLINE void pull_span(const NormArgs& args, const F* x, const F* weight, const Statistics<F>& s,
                         int64_t offset, int64_t begin, int64_t end) {
    const int64_t map_stride = args.batch * args.rows * args.width;
    const Operand c{args.c.data, type}, out{args.out.data, type};
    const V zero{};
    for (int64_t i = begin; i < end; i += static_cast<int64_t>(sizeof(V) / sizeof(F))) {
        const V at = *reinterpret_cast<const V*>(x + i), w = *reinterpret_cast<const V*>(weight + i);
        const V signed_part = w * s.inverse;
        const V upper = at > zero ? signed_part : zero, lower = at < zero ? signed_part : zero;
        const V factor = upper - lower + magnitude<V>(w) * s.inverse_absolute;
        for (int64_t t = 0; t < maps; ++t) {
            const int64_t index = offset + t * map_stride + i;
            write<V>(out, index, factor * read<V>(c, index), false);
        }
    }
}

template <int maps, DType type, class F>
RF_INLINE void pull_row(const NormArgs& args, const F* x, const F* weight, const Statistics<F>& s,
                        int64_t offset) {
    // Floats by vectors, except for the tail.
    const int64_t whole = sizeof(F) == sizeof(float) ? args.width / kLanes * kLanes : 0;
    if constexpr (sizeof(F) == sizeof(float))
        pull_span<Lanes, maps, type>(args, x, weight, s, offset, 0, whole);
    pull_span<F, maps, type>(args, x, weight, s, offset, whole, args.width);
}

template <DType type, class F>
void norm_chunk(int64_t index, const void* context, void* scratch) {
    const Norm& job = *static_cast<const Norm*>(context);
    const NormArgs args = job.args;  // a copy, which nothing that is written here can change
    const int64_t width = args.width, rows = args.batch * args.rows;
    const F* const weight = static_cast<const F*>(job.weight);
    for (int64_t row = index * job.rows_per_chunk; row < min64((index + 1) * job.rows_per_chunk, rows);
         ++row) {
        const F* const x = load(args.x, row * width, width, static_cast<F*>(scratch));
        // Coefficients are prefetched while the statistics are summed.
        const auto fetch_map = [&](int64_t t) {
            const char* from =
                static_cast<const char*>(args.c.data) + (t * rows + row) * width * item_size(type);
            return [from](int64_t i) { __builtin_prefetch(from + i * item_size(type)); };
        };
        const Statistics<F> statistics =
            row_statistics(x, width, args.eps, fetch_map(0), fetch_map(args.num_maps > 1));
        int64_t t = 0;
        for (; t + 2 <= args.num_maps; t += 2)
            pull_row<2, type>(args, x, weight, statistics, (t * rows + row) * width);
        if (t < args.num_maps) pull_row<1, type>(args, x, weight, statistics, (t * rows + row) * width);
    }
}

// Elements [begin, end) of a row: own = w c.
template <class V, DType type, class F>
RF_INLINE void weigh_span(const Operand& c, int64_t offset, const F* weight, int64_t begin, int64_t end,
                          F* own) {
    for (int64_t i = begin; i < end; i += static_cast<int64_t>(sizeof(V) / sizeof(F)))
        *reinterpret_cast<V*>(own + i) =
            *reinterpret_cast<const V*>(weight + i) * read<V>({c.data, type}, offset + i);
}

// out = (own - mean) inverse
template <class V, DType type, class F>
RF_INLINE void centre_span(const Operand& out, int64_t offset, const F* own, F mean, F inverse, int64_t begin,
                           int64_t end) {
    for (int64_t i = begin; i < end; i += static_cast<int64_t>(sizeof(V) / sizeof(F)))
        write<V>({out.data, type}, offset + i, (*reinterpret_cast<const V*>(own + i) - mean) * inverse,
                 false);
}

template <DType type, class F>
void gradient_chunk(int64_t index, const void* context, void* scratch) {
    const Norm& job = *static_cast<const Norm*>(context);
    const NormArgs args = job.args;
    const int64_t width = args.width, rows = args.batch * args.rows;
    const int64_t whole = sizeof(F) == sizeof(float) ? width / kLanes * kLanes : 0;  // by vectors
    const F* const weight = static_cast<const F*>(job.weight);
    F* const own = static_cast<F*>(scratch);
    for (int64_t row = index * job.rows_per_chunk; row < min64((index + 1) * job.rows_per_chunk, rows);
         ++row) {
        const F* const x = load(args.x, row * width, width, own);
        const Statistics<F> s = row_statistics(x, width, args.eps);
        const F inverse = s.inverse + (s.mean - s.mean);  // NaN where x is, or is not finite
        for (int64_t t = 0; t < args.num_maps; ++t) {
            const int64_t offset = (t * rows + row) * width;
            if constexpr (sizeof(F) == sizeof(float))
                weigh_span<Lanes, type>(args.c, offset, weight, 0, whole, own);
            weigh_span<F, type>(args.c, offset, weight, whole, width, own);
            double sum = 0, unused = 0;
            add_row_sums<false>(own, width, F(0), F(0), sum, unused, [](int64_t) {});
            const F mean = static_cast<F>(sum / static_cast<double>(width));
            if constexpr (sizeof(F) == sizeof(float))
                centre_span<Lanes, type>(args.out, offset, own, mean, inverse, 0, whole);
            centre_span<F, type>(args.out, offset, own, mean, inverse, whole, width);
        }
    }
}

template <template <DType, class> class Chunk, class F>
void run(const NormArgs& args) {
    const int64_t rows = args.batch * args.rows;
    // Some tasks for every thread, so that none waits long for the last one.
    const int64_t most = args.width > 0 && args.width < kTask ? kTask / args.width : 1;
    const int64_t even = ceil_div(rows, 4 * int64_t(args.threads > 1 ? args.threads : 1));
    const int64_t rows_per_chunk = even < 1 ? 1 : min64(even, most);
    Partials parameters(args.width);
    F* weight = reinterpret_cast<F*>(parameters.data());
    for (int64_t i = 0; i < args.width; ++i)
        weight[i] = args.weight.data ? load_one<F>(args.weight, i) : F(1);
    const Norm job{args, rows_per_chunk, weight};
    Task task = args.c.dtype == DType::bf16 ? Chunk<DType::bf16, F>::task : Chunk<DType::f32, F>::task;
    if constexpr (sizeof(F) == sizeof(double))
        if (args.c.dtype == DType::f64) task = Chunk<DType::f64, F>::task;
    parallel_for(ceil_div(rows, rows_per_chunk), args.num_maps * rows * args.width, args.threads, task, &job,
                 static_cast<std::size_t>(args.width) * sizeof(F));
}

template <DType type, class F>
struct Pullback {
    static constexpr Task task = norm_chunk<type, F>;
};

template <DType type, class F>
struct Gradient {
    static constexpr Task task = gradient_chunk<type, F>;
};

}  // namespace

void norm_pullback(const NormArgs& args) {
    if (any_double(args.c, args.x))
        run<Pullback, double>(args);
    else
        run<Pullback, float>(args);
}

void norm_gradient(const NormArgs& args) {
    if (any_double(args.c, args.x))
        run<Gradient, double>(args);
    else
        run<Gradient, float>(args);
}

}  // namespace rf::RF_ISA
