// The pull-back of softmax(scale Q K^T) V: both products and softmax in one pass over blocks of query rows;
// nothing of size N x M is in memory. One task is one head of one sample, for all maps.
//
// Products have operands of bfloat16 where the coefficients are and the processor multiplies bfloat16. Scores
// and softmax are always float (double).
#include "cpu/attention.h"

#include "cpu/mass.h"
#include "cpu/softmax_row.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kMasses = 4;  // of A, V, Q, K

struct Job {
    const AttentionArgs& args;
    int64_t maps;      // of one group: P and D, or one
    int64_t depth;     // D padded to whole vectors (tiles)
    int64_t parts;     // columns of [K+], or [K+ | K-]
    int64_t keys;      // M padded to whole vectors and tiles
    int64_t key_rows;  // M padded to whole tiles
    int64_t block;     // query rows of one block
    double* partials;  // [B, H, kMasses, T]
};

template <class P>
Job plan(const AttentionArgs& args, double* partials) {
    Job job{args, args.contrast ? 2 : 1, 0, 0, 0, 0, 0, partials};
    job.depth = round_up(args.width, P::align);
    job.parts = args.gated ? job.depth : 2 * job.depth;
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
    F* keys_t;     // [D, keys]                K^T
    E* values_t;   // [depth / pack, keys]     2 V+^T
    E* key_parts;  // [keys / pack, parts]     K+ | K-
    F* raw;        // [rows, depth]           rows as loaded
    F* rows;       // [rows, parts]           rows being prepared
    F* query;      // [rows, depth]           scale q
    E* gated;      // [rows, depth / pack]    g, along rows
    F* weights;    // [rows, keys]            S, then A
    F* factors;    // [rows, keys]            sign(S) A + softmax(|S|)
    F* c_a;        // [maps, rows, keys]
    E* c_s;        // [rows, keys / pack]     along rows
    F* c_query;    // [maps, rows, parts]
    F* out_row;    // [maps, depth]
    // Blocks of query rows, elements across rows.
    E* a_block;    // [block / pack, keys]
    E* c_s_block;  // [T, block / pack, keys]
    E* g_block;    // [T, block / pack, depth]
    E* q_block;    // [block / pack, parts]    Qs+ | Qs-
    F* sum_v;      // [T, key_rows, depth]
    F* sum_k;      // [T, key_rows, parts]
    // On tile registers, whose left operands have elements along rows.
    E* transposed;  // [parts, block / pack]
    F* sum_v_t;     // [T, depth, keys]         c_V^T
    F* sum_k_t;     // [T, parts, keys]         c_K^T

    Scratch(char* base, const Job& job) {
        const int64_t num_maps = job.args.num_maps, block = job.block / P::pack;
        take(base, keys_t, job.args.width * job.keys);
        take(base, values_t, job.depth / P::pack * job.keys);
        take(base, key_parts, job.keys / P::pack * job.parts);
        take(base, raw, P::rows * job.depth);
        take(base, rows, P::rows * job.parts);
        take(base, query, P::rows * job.depth);
        take(base, gated, P::rows * job.depth / P::pack);
        take(base, weights, P::rows * job.keys);
        take(base, factors, P::rows * job.keys);
        take(base, c_a, job.maps * P::rows * job.keys);
        take(base, c_s, P::rows * job.keys / P::pack);
        take(base, c_query, job.maps * P::rows * job.parts);
        take(base, out_row, job.maps * job.depth);
        take(base, a_block, block * job.keys);
        take(base, c_s_block, num_maps * block * job.keys);
        take(base, g_block, num_maps * block * job.depth);
        take(base, q_block, block * job.parts);
        take(base, sum_v, num_maps * job.key_rows * job.depth);
        take(base, sum_k, num_maps * job.key_rows * job.parts);
        take(base, transposed, P::tiled ? job.parts * block : 0);
        take(base, sum_v_t, P::tiled ? num_maps * job.depth * job.keys : 0);
        take(base, sum_k_t, P::tiled ? num_maps * job.parts * job.keys : 0);
    }
};

// to = factor * x+ in the first `depth` columns and, if there are more, factor * x- in the others; 0 beyond
// n.
template <class F>
RF_INLINE void split_parts(const F* __restrict x, int64_t n, F factor, int64_t depth, int64_t parts,
                           F* __restrict to) {
    clear(to, parts);
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F scaled = factor * x[i];
        to[i] = scaled > 0 ? scaled : F(0);
    }
    if (parts == depth) return;
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F scaled = factor * x[i];
        to[depth + i] = scaled < 0 ? -scaled : F(0);
    }
}

RF_INLINE void fetch_query(const Job& job, int64_t b, int64_t h, int64_t n) {
    const AttentionArgs& args = job.args;
    fetch_row(args.q, args.width, args.queries, 0, b, h, n);
    if (args.gated) fetch_row(args.o, args.width, args.queries, 0, b, h, n);
    for (int64_t t = 0; t < args.num_maps; ++t) fetch_row(args.c, args.width, args.queries, t, b, h, n);
}

template <class P>
void prepare_keys(const Job& job, const Scratch<P>& at, int64_t b, int64_t h) {
    using F = typename P::Sum;
    const AttentionArgs& args = job.args;
    for (int64_t start = 0; start < job.keys; start += P::rows) {
        const int64_t padded = min64(P::rows, job.keys - start);
        for (int64_t r = 0; r < padded; ++r) {
            F* to = at.raw + r * job.depth;
            clear(to, job.depth);
            fetch_row(args.k, args.width, args.keys, 0, b, h, start + P::rows + r);
            fetch_row(args.v, args.width, args.keys, 0, b, h, start + P::rows + r);
            if (start == 0) fetch_query(job, b, h, r);
            if (start + r >= args.keys) continue;
            const F* k = load(args.k.operand, offset(args.k, 0, b, h, start + r), args.width, to);
            if (k != to) RF_SIMD
            for (int64_t i = 0; i < args.width; ++i) to[i] = k[i];
        }
        transpose(at.raw, padded, job.depth, args.width, at.keys_t + start, job.keys);
        for (int64_t r = 0; r < padded; ++r)
            split_parts(at.raw + r * job.depth, args.width, F(1), job.depth, job.parts,
                        at.rows + r * job.parts);
        for (int64_t r = 0; r + P::pack <= padded; r += P::pack)
            P::across_rows(at.rows + r * job.parts, job.parts, job.parts,
                           at.key_parts + (start + r) / P::pack * job.parts);
        for (int64_t r = 0; r < padded; ++r) {
            clear(at.raw + r * job.depth, job.depth);
            if (start + r < args.keys) {
                const F* v = load(args.v.operand, offset(args.v, 0, b, h, start + r), args.width, at.out_row);
                split_parts(v, args.width, F(2), job.depth, job.depth, at.raw + r * job.depth);
            }
            P::along_row(at.raw + r * job.depth, job.depth, at.gated + r * job.depth / P::pack);
        }
        transpose(at.gated, padded, job.depth / P::pack, job.depth / P::pack, at.values_t + start, job.keys);
    }
}

// Masses of a row of A and, in place, c -> factor c.
template <class F, bool contrast>
RF_INLINE void scores_row(const F* __restrict weight, const F* __restrict factor, int64_t n, F* __restrict p,
                          F* __restrict d, double* mass_p, double* mass_n) {
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = min64(start + kBlock, n);
        F sum_p = 0, sum_n = 0;
        RF_SIMD_SUM(sum_p, sum_n)
        for (int64_t i = start; i < end; ++i) {
            sum_p += weight[i] * absolute(p[i]);
            if (contrast) {
                sum_n += weight[i] * absolute(p[i] - d[i]);
                d[i] *= factor[i];
            }
            p[i] *= factor[i];
        }
        *mass_p += static_cast<double>(sum_p);
        if (contrast) *mass_n += static_cast<double>(sum_n);
    }
}

// out = factor (sums where x > 0, sums of the second part (if there is one) where x < 0, else 0)
template <class F>
RF_INLINE void select_row(const F* __restrict x, const F* __restrict sums, const F* __restrict lower,
                          F factor, int64_t n, F* __restrict out) {
    if (lower == nullptr) {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            const F value = factor * sums[i];
            out[i] = x[i] > 0 ? value : F(0);
        }
        return;
    }
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F value = x[i] > 0 ? sums[i] : lower[i];
        out[i] = x[i] == 0 ? F(0) : factor * value;
    }
}

// Selects and stores one row of a result and adds its mass; sums of D are `map_stride` after those of P.
template <class F, bool contrast>
RF_INLINE void finish_row(const Job& job, const StridedOperand& out, const F* x, F sign, F factor,
                          const F* sums, int64_t map_stride, bool split, int64_t t, int64_t b, int64_t h,
                          int64_t n, F* scaled, F* buffer, double* masses) {
    const AttentionArgs& args = job.args;
    const F* gate = x;
    if (sign != F(1)) {
        for (int64_t i = 0; i < args.width; ++i) scaled[i] = sign * x[i];
        gate = scaled;
    }
    const F* results[2] = {nullptr, nullptr};
    for (int64_t of_pair = 0; of_pair < (contrast ? 2 : 1); ++of_pair) {
        const F* from = sums + of_pair * map_stride;
        const int64_t to = offset(out, t + of_pair * (args.num_maps / 2), b, h, n);
        F* result = target(out.operand, to, buffer + of_pair * job.depth);
        select_row(gate, from, split ? from + job.depth : nullptr, factor, args.width, result);
        commit(out.operand, to, args.width, result);
        results[of_pair] = result;
    }
    add_mass<F, contrast>(x, results[0], results[1], args.width, masses + t, masses + t + args.num_maps / 2);
}

// P::rows rows of queries from `first` on: scores, their coefficients, c_Q, and the operands that c_K and c_V
// need, at `row` of the block.
template <class P, bool contrast>
void query_rows(const Job& job, const Scratch<P>& at, int64_t b, int64_t h, int64_t first, int64_t row,
                double* masses) {
    using F = typename P::Sum;
    using E = typename P::Element;
    const AttentionArgs& args = job.args;
    const int64_t count = min64(P::rows, args.queries - first);
    const int64_t depth = job.depth, keys = job.keys, parts = job.parts, half = args.num_maps / 2;
    const F scale = static_cast<F>(args.scale);
    for (int64_t r = 0; r < P::rows; ++r) {
        F* query = at.query + r * depth;
        clear(query, depth);
        clear(at.rows + r * parts, parts);
        if (r >= count) continue;
        const F* q = load(args.q.operand, offset(args.q, 0, b, h, first + r), args.width, at.raw);
        RF_SIMD
        for (int64_t i = 0; i < args.width; ++i) query[i] = scale * q[i];
        split_parts(q, args.width, scale, depth, parts, at.rows + r * parts);
    }
    for (int64_t r = 0; r < P::rows; r += P::pack)
        P::across_rows(at.rows + r * parts, parts, parts, at.q_block + (row + r) / P::pack * parts);

    F* scores = at.c_a;
    product<Single<F>, false>(P::rows, keys, args.width, {at.query, depth, 1}, at.keys_t, keys, scores, keys);
    for (int64_t r = 0; r < P::rows; ++r) {
        F *weight = at.weights + r * keys, *factor = at.factors + r * keys;
        fetch_query(job, b, h, first + P::rows + r);
        if (r < count) {
            F* row_scores = scores + r * keys;
            for (int64_t i = args.keys; i < keys; ++i) row_scores[i] = -static_cast<F>(__builtin_inf());
            softmax_row<false>(row_scores, keys, weight, factor);
        } else {
            clear(weight, keys);
            clear(factor, keys);
        }
    }
    for (int64_t r = 0; r < P::rows; r += P::pack)
        P::across_rows(at.weights + r * keys, keys, keys, at.a_block + (row + r) / P::pack * keys);

    for (int64_t t = 0; t < (contrast ? half : args.num_maps); ++t) {
        for (int64_t of_pair = 0; of_pair < job.maps; ++of_pair) {
            const int64_t map = t + of_pair * half;
            for (int64_t r = 0; r < P::rows; ++r) {
                F* g = at.rows + r * depth;
                clear(g, depth);
                if (r >= count) continue;
                const F* c = load(args.c.operand, offset(args.c, map, b, h, first + r), args.width, at.raw);
                if (args.gated) {
                    const F* o =
                        load(args.o.operand, offset(args.o, 0, b, h, first + r), args.width, at.raw + depth);
                    RF_SIMD
                    for (int64_t i = 0; i < args.width; ++i) g[i] = o[i] > 0 ? c[i] : F(0);
                } else {
                    RF_SIMD
                    for (int64_t i = 0; i < args.width; ++i) g[i] = c[i];
                }
            }
            E* g_block = at.g_block + (map * job.block + row) / P::pack * depth;
            for (int64_t r = 0; r < P::rows; ++r) {
                P::along_row(at.rows + r * depth, depth, at.gated + r * depth / P::pack);
                if (r % P::pack == 0)
                    P::across_rows(at.rows + r * depth, depth, depth, g_block + r / P::pack * depth);
            }
            product<P, false>(P::rows, keys, depth / P::pack, {at.gated, depth / P::pack, 1}, at.values_t,
                              keys, at.c_a + of_pair * P::rows * keys, keys);
        }
        for (int64_t r = 0; r < count; ++r) {
            F* p = at.c_a + r * keys;
            scores_row<F, contrast>(at.weights + r * keys, at.factors + r * keys, keys, p, p + P::rows * keys,
                                    masses + t, masses + t + half);
        }
        for (int64_t of_pair = 0; of_pair < job.maps; ++of_pair) {
            const F* c_s = at.c_a + of_pair * P::rows * keys;
            E* block = at.c_s_block + ((t + of_pair * half) * job.block + row) / P::pack * keys;
            for (int64_t r = 0; r < P::rows; r += P::pack)
                P::across_rows(c_s + r * keys, keys, keys, block + r / P::pack * keys);
            const E* left = block;
            if (P::pack > 1) {
                for (int64_t r = 0; r < P::rows; ++r)
                    P::along_row(c_s + r * keys, keys, at.c_s + r * keys / P::pack);
                left = at.c_s;
            }
            product<P, false>(P::rows, parts, keys / P::pack, {left, keys / P::pack, 1}, at.key_parts, parts,
                              at.c_query + of_pair * P::rows * parts, parts);
        }
        for (int64_t r = 0; r < count; ++r) {
            const F* q = load(args.q.operand, offset(args.q, 0, b, h, first + r), args.width, at.raw);
            finish_row<F, contrast>(job, args.c_q, q, scale < 0 ? F(-1) : F(1), 2 * scale,
                                    at.c_query + r * parts, P::rows * parts, !args.gated, t, b, h, first + r,
                                    at.raw + depth, at.out_row, masses + 2 * args.num_maps);
        }
    }
}

// The sums of a block for c_V and c_K.
template <class P>
RF_INLINE void add_block(const Job& job, const Scratch<P>& at, int64_t rows) {
    const int64_t pairs = job.block / P::pack;
    if constexpr (P::tiled) {
        // c_V^T = g^T A and c_K^T = Q^T c_S: A and c_S lie as right operands.
        const auto turn = [&](const typename P::Element* block, int64_t width) {
            transpose(block, rows / P::pack, width, width, at.transposed, pairs);
            return Left<P>{at.transposed, pairs, 1};
        };
        for (int64_t t = 0; t < job.args.num_maps; ++t)
            product<P, true>(job.depth, job.keys, rows / P::pack,
                             turn(at.g_block + t * pairs * job.depth, job.depth), at.a_block, job.keys,
                             at.sum_v_t + t * job.depth * job.keys, job.keys);
        const Left<P> queries = turn(at.q_block, job.parts);
        for (int64_t t = 0; t < job.args.num_maps; ++t)
            product<P, true>(job.parts, job.keys, rows / P::pack, queries,
                             at.c_s_block + t * pairs * job.keys, job.keys,
                             at.sum_k_t + t * job.parts * job.keys, job.keys);
    } else {
        for (int64_t t = 0; t < job.args.num_maps; ++t) {
            product<P, true>(job.key_rows, job.depth, rows / P::pack, {at.a_block, 1, job.keys},
                             at.g_block + t * pairs * job.depth, job.depth,
                             at.sum_v + t * job.key_rows * job.depth, job.depth);
            product<P, true>(job.key_rows, job.parts, rows / P::pack,
                             {at.c_s_block + t * pairs * job.keys, 1, job.keys}, at.q_block, job.parts,
                             at.sum_k + t * job.key_rows * job.parts, job.parts);
        }
    }
}

template <class P, bool contrast>
void head(int64_t index, const void* context, void* scratch) {
    using F = typename P::Sum;
    const Job& job = *static_cast<const Job*>(context);
    const AttentionArgs& args = job.args;
    const Scratch<P> at(static_cast<char*>(scratch), job);
    const int64_t b = index / args.heads, h = index % args.heads;
    double* masses = job.partials + index * kMasses * args.num_maps;
    for (int64_t i = 0; i < kMasses * args.num_maps; ++i) masses[i] = 0;

    [[maybe_unused]] const typename P::Registers registers;
    prepare_keys(job, at, b, h);
    if (P::tiled) {
        clear(at.sum_v_t, args.num_maps * job.keys * job.depth);
        clear(at.sum_k_t, args.num_maps * job.keys * job.parts);
    } else {
        clear(at.sum_v, args.num_maps * job.key_rows * job.depth);
        clear(at.sum_k, args.num_maps * job.key_rows * job.parts);
    }
    for (int64_t start = 0; start < args.queries; start += job.block) {
        const int64_t rows = round_up(min64(job.block, args.queries - start), P::rows);
        for (int64_t row = 0; row < rows; row += P::rows)
            query_rows<P, contrast>(job, at, b, h, start + row, row, masses);
        add_block(job, at, rows);
    }
    if (P::tiled) {
        for (int64_t t = 0; t < args.num_maps; ++t) {
            transpose(at.sum_v_t + t * job.depth * job.keys, job.depth, job.keys, job.key_rows,
                      at.sum_v + t * job.key_rows * job.depth, job.depth);
            transpose(at.sum_k_t + t * job.parts * job.keys, job.parts, job.keys, job.key_rows,
                      at.sum_k + t * job.key_rows * job.parts, job.parts);
        }
    }
    for (int64_t j = 0; j < args.keys; ++j) {
        const F* k = load(args.k.operand, offset(args.k, 0, b, h, j), args.width, at.raw);
        const F* v = load(args.v.operand, offset(args.v, 0, b, h, j), args.width, at.raw + job.depth);
        for (int64_t t = 0; t < (contrast ? args.num_maps / 2 : args.num_maps); ++t) {
            finish_row<F, contrast>(job, args.c_v, v, F(1), F(2),
                                    at.sum_v + (t * job.key_rows + j) * job.depth,
                                    args.num_maps / 2 * job.key_rows * job.depth, false, t, b, h, j, nullptr,
                                    at.out_row, masses + args.num_maps);
            finish_row<F, contrast>(job, args.c_k, k, F(1), F(2),
                                    at.sum_k + (t * job.key_rows + j) * job.parts,
                                    args.num_maps / 2 * job.key_rows * job.parts, !args.gated, t, b, h, j,
                                    nullptr, at.out_row, masses + 3 * args.num_maps);
        }
    }
}

template <class P>
void run(const AttentionArgs& args) {
    const int64_t heads = args.batch * args.heads;
    const Partials partials(heads * kMasses * args.num_maps);
    const Job job = plan<P>(args, partials.data());
    parallel_for(heads, heads * args.num_maps * (args.queries + args.width) * args.keys, args.threads,
                 args.contrast ? head<P, true> : head<P, false>, &job, Scratch<P>(nullptr, job).bytes);
    for (int64_t which = 0; which < kMasses; ++which)
        store_masses(args.masses, which * args.num_maps * args.batch, args.num_maps, args.batch,
                     partials.data() + which * args.num_maps, args.heads, kMasses * args.num_maps);
}

}  // namespace

void attention_pullback(const AttentionArgs& args) {
    const DType dtypes[] = {args.q.operand.dtype, args.k.operand.dtype, args.v.operand.dtype,
                            args.o.operand.dtype, args.c.operand.dtype};
    bool wide = false;
    for (DType dtype : dtypes) wide = wide || dtype == DType::f64;
    if (wide) run<Single<double>>(args);
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
