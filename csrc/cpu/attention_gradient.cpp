// The gradient of softmax(scale Q K^T) V in one pass over blocks of query rows, as attention.cpp goes: one
// task is one head of one sample, products have operands of bfloat16 where the coefficients are and the
// processor multiplies bfloat16, and scores, softmax and its Jacobian are float (double).
#include "cpu/attention.h"
#include "cpu/softmax_row.h"

namespace rf::RF_ISA {
namespace {

struct Job {
    const AttentionGradientArgs& args;
    bool scores;       // whether Q and K have a share
    int64_t depth;     // D padded to whole vectors (tiles)
    int64_t keys;      // M padded to whole vectors and tiles
    int64_t key_rows;  // M padded to whole tiles
    int64_t block;     // query rows of one block
};

template <class P>
Job plan(const AttentionGradientArgs& args) {
    Job job{args, args.score_share != 0, 0, 0, 0, 0};
    job.depth = round_up(args.width, P::align);
    job.key_rows = round_up(args.keys, P::rows);
    job.keys = round_up(job.key_rows, P::align);
    job.block = rows_of_a_block<P>(args.queries, job.keys);
    return job;
}

// Scratch of one task, at `base`; only `bytes` is meaningful without one.
template <class P>
struct Scratch : Layout {
    using F = typename P::Sum;
    using E = typename P::Element;
    F* keys_t;     // [D, keys]             K^T
    E* values_t;   // [depth / pack, keys]  V^T
    E* key_pairs;  // [keys / pack, depth]  K
    F* rows;       // [rows, depth]         rows being prepared
    F* query;      // [rows, depth]         scale q
    E* along;      // [rows, depth / pack]  rows of V, or of c, along rows
    F* weights;    // [rows, keys]          S, then A
    F* c_a;        // [rows, keys]          c_A, then c_S
    E* c_s;        // [rows, keys / pack]   along rows
    F* c_query;    // [rows, depth]
    F* buffer;     // [depth]               a row on its way from or to another dtype
    // Blocks of query rows, elements across rows.
    E* a_block;    // [block / pack, keys]
    E* c_s_block;  // [T, block / pack, keys]
    E* c_block;    // [T, block / pack, depth]
    E* q_block;    // [block / pack, depth]  scale Q
    F* sum_v;      // [T, key_rows, depth]
    F* sum_k;      // [T, key_rows, depth]
    // On tile registers, whose left operands have elements along rows.
    E* transposed;  // [depth, block / pack]
    F* sum_v_t;     // [T, depth, keys]  c_V^T
    F* sum_k_t;     // [T, depth, keys]  c_K^T

    Scratch(char* base, const Job& job) {
        const int64_t num_maps = job.args.num_maps, block = job.block / P::pack;
        take(base, keys_t, job.args.width * job.keys);
        take(base, values_t, job.depth / P::pack * job.keys);
        take(base, key_pairs, job.keys / P::pack * job.depth);
        take(base, rows, P::rows * job.depth);
        take(base, query, P::rows * job.depth);
        take(base, along, P::rows * job.depth / P::pack);
        take(base, weights, P::rows * job.keys);
        take(base, c_a, P::rows * job.keys);
        take(base, c_s, P::rows * job.keys / P::pack);
        take(base, c_query, P::rows * job.depth);
        take(base, buffer, job.depth);
        take(base, a_block, block * job.keys);
        take(base, c_s_block, num_maps * block * job.keys);
        take(base, c_block, num_maps * block * job.depth);
        take(base, q_block, block * job.depth);
        take(base, sum_v, num_maps * job.key_rows * job.depth);
        take(base, sum_k, num_maps * job.key_rows * job.depth);
        take(base, transposed, P::tiled ? job.depth * block : 0);
        take(base, sum_v_t, P::tiled ? num_maps * job.depth * job.keys : 0);
        take(base, sum_k_t, P::tiled ? num_maps * job.depth * job.keys : 0);
    }
};

// to [count, depth] = factor times rows [first, first + count) of x, 0 beyond its `rows` rows and columns.
template <class F>
RF_INLINE void load_rows(const StridedOperand& x, int64_t width, int64_t rows, int64_t t, int64_t b,
                         int64_t h, int64_t first, int64_t count, F factor, int64_t depth, F* __restrict to,
                         F* __restrict buffer) {
    clear(to, count * depth);
    for (int64_t r = 0; r < count && first + r < rows; ++r) {
        const F* from = load(x.operand, offset(x, t, b, h, first + r), width, buffer);
        RF_SIMD
        for (int64_t i = 0; i < width; ++i) to[r * depth + i] = factor * from[i];
    }
}

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
        for (int64_t r = 0; r + P::pack <= padded; r += P::pack)
            P::across_rows(at.rows + r * depth, depth, depth, at.key_pairs + (start + r) / P::pack * depth);
        load_rows(args.v, args.width, args.keys, 0, b, h, start, padded, F(1), depth, at.rows, at.buffer);
        for (int64_t r = 0; r < padded; ++r) P::along_row(at.rows + r * depth, depth, at.along + r * pairs);
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
    using E = typename P::Element;
    const AttentionGradientArgs& args = job.args;
    const int64_t count = min64(P::rows, args.queries - first);
    const int64_t depth = job.depth, keys = job.keys, pairs = job.depth / P::pack;
    const F scale = static_cast<F>(args.scale), share = static_cast<F>(args.score_share * args.scale);
    load_rows(args.q, args.width, args.queries, 0, b, h, first, P::rows, scale, depth, at.query, at.buffer);
    for (int64_t r = 0; r < P::rows; r += P::pack)
        P::across_rows(at.query + r * depth, depth, depth, at.q_block + (row + r) / P::pack * depth);

    product<Single<F>, false>(P::rows, keys, args.width, {at.query, depth, 1}, at.keys_t, keys, at.weights,
                              keys);
    for (int64_t r = 0; r < P::rows; ++r) {
        F* const weight = at.weights + r * keys;
        fetch_query(args, b, h, first + P::rows + r);
        if (r < count) {
            for (int64_t i = args.keys; i < keys; ++i) weight[i] = -static_cast<F>(__builtin_inf());
            softmax_weights(weight, keys);
        } else {
            clear(weight, keys);
        }
    }
    for (int64_t r = 0; r < P::rows; r += P::pack)
        P::across_rows(at.weights + r * keys, keys, keys, at.a_block + (row + r) / P::pack * keys);

    for (int64_t t = 0; t < args.num_maps; ++t) {
        load_rows(args.c, args.width, args.queries, t, b, h, first, P::rows, F(1), depth, at.rows, at.buffer);
        E* const c_block = at.c_block + (t * job.block + row) / P::pack * depth;
        for (int64_t r = 0; r < P::rows; r += P::pack)
            P::across_rows(at.rows + r * depth, depth, depth, c_block + r / P::pack * depth);
        if (!job.scores) continue;
        for (int64_t r = 0; r < P::rows; ++r) P::along_row(at.rows + r * depth, depth, at.along + r * pairs);
        product<P, false>(P::rows, keys, pairs, {at.along, pairs, 1}, at.values_t, keys, at.c_a, keys);
        for (int64_t r = 0; r < count; ++r) jacobian_row(at.weights + r * keys, keys, at.c_a + r * keys);
        E* const block = at.c_s_block + (t * job.block + row) / P::pack * keys;
        for (int64_t r = 0; r < P::rows; r += P::pack)
            P::across_rows(at.c_a + r * keys, keys, keys, block + r / P::pack * keys);
        const E* left = block;
        if (P::pack > 1) {
            for (int64_t r = 0; r < P::rows; ++r)
                P::along_row(at.c_a + r * keys, keys, at.c_s + r * keys / P::pack);
            left = at.c_s;
        }
        product<P, false>(P::rows, depth, keys / P::pack, {left, keys / P::pack, 1}, at.key_pairs, depth,
                          at.c_query, depth);
        for (int64_t r = 0; r < count; ++r)
            store_row(args.c_q, args.width, t, b, h, first + r, share, at.c_query + r * depth, at.buffer);
    }
}

// The sums of a block for one of c_V and c_K: those of `left` [T or 1, keys] and `right` [T or 1, depth].
template <class P>
RF_INLINE void add_block(const Job& job, const Scratch<P>& at, int64_t rows,
                         const typename P::Element* of_keys, bool keys_by_map,
                         const typename P::Element* of_depth, bool depth_by_map, typename P::Sum* sums,
                         typename P::Sum* sums_t) {
    const int64_t pairs = job.block / P::pack;
    for (int64_t t = 0; t < job.args.num_maps; ++t) {
        const typename P::Element* const by_key = of_keys + (keys_by_map ? t * pairs * job.keys : 0);
        const typename P::Element* const by_depth = of_depth + (depth_by_map ? t * pairs * job.depth : 0);
        if constexpr (P::tiled) {
            // Transposed: A and c_S lie as right operands.
            transpose(by_depth, rows / P::pack, job.depth, job.depth, at.transposed, pairs);
            product<P, true>(job.depth, job.keys, rows / P::pack, {at.transposed, pairs, 1}, by_key, job.keys,
                             sums_t + t * job.depth * job.keys, job.keys);
        } else {
            product<P, true>(job.key_rows, job.depth, rows / P::pack, {by_key, 1, job.keys}, by_depth,
                             job.depth, sums + t * job.key_rows * job.depth, job.depth);
        }
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
    if (P::tiled) {
        clear(at.sum_v_t, args.num_maps * job.keys * job.depth);
        clear(at.sum_k_t, args.num_maps * job.keys * job.depth);
    } else {
        clear(at.sum_v, args.num_maps * job.key_rows * job.depth);
        clear(at.sum_k, args.num_maps * job.key_rows * job.depth);
    }
    for (int64_t start = 0; start < args.queries; start += job.block) {
        const int64_t rows = round_up(min64(job.block, args.queries - start), P::rows);
        for (int64_t row = 0; row < rows; row += P::rows) query_rows<P>(job, at, b, h, start + row, row);
        add_block<P>(job, at, rows, at.a_block, false, at.c_block, true, at.sum_v, at.sum_v_t);
        if (job.scores)
            add_block<P>(job, at, rows, at.c_s_block, true, at.q_block, false, at.sum_k, at.sum_k_t);
    }
    const auto turn = [&](const F* from, F* to) {
        for (int64_t t = 0; t < args.num_maps; ++t)
            transpose(from + t * job.depth * job.keys, job.depth, job.keys, job.key_rows,
                      to + t * job.key_rows * job.depth, job.depth);
    };
    if (P::tiled) {
        turn(at.sum_v_t, at.sum_v);
        turn(at.sum_k_t, at.sum_k);
    }
    const F value_share = static_cast<F>(args.value_share), score_share = static_cast<F>(args.score_share);
    for (int64_t t = 0; t < args.num_maps; ++t) {
        for (int64_t j = 0; j < args.keys; ++j) {
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
    const Job job = plan<P>(args);
    parallel_for(heads, heads * args.num_maps * (args.queries + args.width) * args.keys, args.threads,
                 head<P>, &job, Scratch<P>(nullptr, job).bytes);
}

}  // namespace

void attention_gradient(const AttentionGradientArgs& args) {
    if (any_double(args.q.operand, args.k.operand, args.v.operand, args.c.operand)) run<Single<double>>(args);
#if defined(__AMX_BF16__)
    else if (args.c.operand.dtype == DType::bf16)
        run<TilePair>(args);
#elif defined(__AVX512BF16__)
    else if (args.c.operand.dtype == DType::bf16)
        run<Pair>(args);
#endif
    else
        run<Single<float>>(args);
}

}  // namespace rf::RF_ISA
