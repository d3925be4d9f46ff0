// The gradient of softmax(scale Q K^T) V in one pass over blocks of query rows, as attention.cpp goes: one
// task is one head of one sample, products have operands of bfloat16 where the coefficients are and the
// processor multiplies bfloat16, and scores, softmax and its Jacobian are float (double).
#include "cpu/attention.h"
#include "cpu/softmax_row.h"

namespace rf::RF_ISA {
namespace {

struct Job : Sizes {
    const AttentionGradientArgs& args;
    bool scores;  // whether Q and K have a share
    bool biased;
};

template <class P>
struct Scratch : HeadScratch<P> {
    using F = typename P::Sum;
    F* rows;    // [rows, depth]  rows being prepared
    F* buffer;  // [depth]        a row on its way from or to another dtype
    F* bias;    // [keys]         likewise

    Scratch(char* base, const Job& job) : HeadScratch<P>(base, job) {
        this->take(base, rows, P::rows * job.depth);
        this->take(base, buffer, job.depth);
        this->take(base, bias, job.biased ? job.keys : 0);
    }
};

template <class F>
RF_INLINE void store_row(const StridedOperand& out, int64_t width, int64_t t, int64_t b, int64_t h, int64_t n,
                         F factor, const F* __restrict sums, F* __restrict buffer) {
    const int64_t to = offset(out, t, b, h, n);
    F* __restrict result = target(out.operand, to, buffer);
    RF_SIMD
    for (int64_t i = 0; i < width; ++i) result[i] = factor * sums[i];
    commit(out.operand, to, width, result);
}

RF_INLINE void fetch_query(const AttentionGradientArgs& args, int64_t b, int64_t h, int64_t n) {
    fetch_row(args.q, args.width, args.queries, 0, b, h, n);
    for (int64_t t = 0; t < args.num_maps; ++t) fetch_row(args.c, args.width, args.queries, t, b, h, n);
}

template <class P>
void prepare_keys(const Job& job, const Scratch<P>& at, int64_t b, int64_t h) {
    using F = typename P::Sum;
    const AttentionGradientArgs& args = job.args;
    const int64_t depth = job.depth, pairs = job.depth / P::pack;
    for (int64_t start = 0; start < job.keys; start += P::rows) {
        const int64_t padded = min64(P::rows, job.keys - start);
        for (int64_t r = 0; r < padded; ++r) {
            fetch_row(args.k, args.width, args.keys, 0, b, h, start + P::rows + r);
            fetch_row(args.v, args.width, args.keys, 0, b, h, start + P::rows + r);
            if (start == 0) fetch_query(args, b, h, r);
        }
        load_rows(args.k, args.width, args.keys, 0, b, h, start, padded, F(1), depth, at.rows, at.buffer);
        transpose(at.rows, padded, depth, args.width, at.keys_t + start, job.keys);
        if (!job.scores) continue;
        across_rows<P>(at.rows, padded, depth, at.key_parts + start / P::pack * depth);
        load_rows(args.v, args.width, args.keys, 0, b, h, start, padded, F(1), depth, at.rows, at.buffer);
        along_rows<P>(at.rows, padded, depth, at.along);
        transpose(at.along, padded, pairs, pairs, at.values_t + start, job.keys);
    }
}

// In place: c_A -> c_S = A (c_A - sum A c_A)
template <class F>
RF_INLINE void jacobian_row(const F* __restrict weight, int64_t n, F* __restrict c) {
    double total = 0;
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = min64(start + kBlock, n);
        F part = 0;
        RF_SIMD_SUM(part)
        for (int64_t i = start; i < end; ++i) part += weight[i] * c[i];
        total += static_cast<double>(part);
    }
    const F sum = static_cast<F>(total);
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) c[i] = weight[i] * (c[i] - sum);
}

// P::rows rows of queries from `first` on: scores, their coefficients, c_Q, and the operands that c_K and c_V
// need, at `row` of the block.
template <class P>
void query_rows(const Job& job, const Scratch<P>& at, int64_t b, int64_t h, int64_t first, int64_t row) {
    using F = typename P::Sum;
    const AttentionGradientArgs& args = job.args;
    const int64_t count = min64(P::rows, args.queries - first);
    const int64_t depth = job.depth, keys = job.keys, pairs = job.depth / P::pack;
    const F scale = static_cast<F>(args.scale), share = static_cast<F>(args.score_share * args.scale);
    load_rows(args.q, args.width, args.queries, 0, b, h, first, P::rows, scale, depth, at.query, at.buffer);
    across_rows<P>(at.query, P::rows, depth, at.q_block + row / P::pack * depth);

    product<Single<F>, false>(P::rows, keys, args.width, {at.query, depth, 1}, at.keys_t, keys, at.weights,
                              keys);
    for (int64_t r = 0; r < P::rows; ++r) {
        F* const weight = at.weights + r * keys;
        fetch_query(args, b, h, first + P::rows + r);
        if (job.scores) fetch_result(args.c_q, args.num_maps, args.width, args.queries, b, h, first + r);
        if (r < count) {
            for (int64_t i = args.keys; i < keys; ++i) weight[i] = -static_cast<F>(__builtin_inf());
            if (job.biased) {
                const F* __restrict bias = load_bias(args, b, h, first + r, at.bias);
                RF_SIMD
                for (int64_t i = 0; i < args.keys; ++i) weight[i] += bias[i];
                softmax_weights<true>(weight, keys);
            } else {
                softmax_weights<false>(weight, keys);
            }
        } else {
            clear(weight, keys);
        }
    }
    across_rows<P>(at.weights, P::rows, keys, at.a_block + row / P::pack * keys);

    for (int64_t t = 0; t < args.num_maps; ++t) {
        load_rows(args.c, args.width, args.queries, t, b, h, first, P::rows, F(1), depth, at.rows, at.buffer);
        across_rows<P>(at.rows, P::rows, depth, at.c_block + (t * job.block + row) / P::pack * depth);
        if (!job.scores) continue;
        along_rows<P>(at.rows, P::rows, depth, at.along);
        product<P, false>(P::rows, keys, pairs, {at.along, pairs, 1}, at.values_t, keys, at.c_a, keys);
        for (int64_t r = 0; r < count; ++r) jacobian_row(at.weights + r * keys, keys, at.c_a + r * keys);
        times_keys(job, at, at.c_a, at.c_s_block + (t * job.block + row) / P::pack * keys, at.c_query);
        for (int64_t r = 0; r < count; ++r)
            store_row(args.c_q, args.width, t, b, h, first + r, share, at.c_query + r * depth, at.buffer);
    }
}

template <class P>
void head(int64_t index, const void* context, void* scratch) {
    using F = typename P::Sum;
    const Job& job = *static_cast<const Job*>(context);
    const AttentionGradientArgs& args = job.args;
    const Scratch<P> at(static_cast<char*>(scratch), job);
    const int64_t b = index / args.heads, h = index % args.heads;

    [[maybe_unused]] const typename P::Registers registers;
    prepare_keys(job, at, b, h);
    clear_sums_of(job, at);
    for (int64_t start = 0; start < args.queries; start += job.block) {
        const int64_t rows = round_up(min64(job.block, args.queries - start), P::rows);
        for (int64_t row = 0; row < rows; row += P::rows) query_rows<P>(job, at, b, h, start + row, row);
        for (int64_t r = 0; r < P::rows; ++r) fetch_key_results(args, b, h, r);
        add_block<P>(job, at, rows, at.a_block, false, at.c_block, true, job.depth, at.sum_v, at.sum_v_t);
        if (job.scores)
            add_block<P>(job, at, rows, at.c_s_block, true, at.q_block, false, job.parts, at.sum_k,
                         at.sum_k_t);
    }
    turn_sums(job, at);
    const F value_share = static_cast<F>(args.value_share), score_share = static_cast<F>(args.score_share);
    for (int64_t t = 0; t < args.num_maps; ++t) {
        for (int64_t j = 0; j < args.keys; ++j) {
            if (t == 0) fetch_keys(args, index, j, P::rows);
            const int64_t sums = (t * job.key_rows + j) * job.depth;
            store_row(args.c_v, args.width, t, b, h, j, value_share, at.sum_v + sums, at.buffer);
            store_row(args.c_k, args.width, t, b, h, j, score_share, at.sum_k + sums, at.buffer);
        }
        if (job.scores) continue;
        clear(at.c_query, job.depth);
        for (int64_t n = 0; n < args.queries; ++n)
            store_row(args.c_q, args.width, t, b, h, n, F(0), at.c_query, at.buffer);
    }
}

template <class P>
void run(const AttentionGradientArgs& args) {
    const int64_t heads = args.batch * args.heads;
    const Job job{sizes_of<P>(args, 1, 1), args, args.score_share != 0, args.bias.operand.data != nullptr};
    parallel_for(heads, heads * args.num_maps * (args.queries + args.width) * args.keys, args.threads,
                 head<P>, &job, Scratch<P>(nullptr, job).bytes);
}

}  // namespace

void attention_gradient(const AttentionGradientArgs& args) {
    const bool wide =
        any_double(args.q.operand, args.k.operand, args.v.operand, args.c.operand, args.bias.operand);
    with_elements(wide, args.c.operand.dtype, [&](auto elements) { run<decltype(elements)>(args); });
}

}  // namespace rf::RF_ISA
