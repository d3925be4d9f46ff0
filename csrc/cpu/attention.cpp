// The pull-back of softmax(scale Q K^T + bias) V: both products and softmax in one pass over blocks of query
// rows; nothing of size N x M is in memory. One task is one head of one sample, for all maps.
//
// Products have operands of bfloat16 where the coefficients are and the processor multiplies bfloat16. Scores
// and softmax are always float (double).
#include "cpu/attention.h"

#include "cpu/mass.h"
#include "cpu/softmax_row.h"

namespace rf::RF_ISA {
namespace {

struct Job : Sizes {
    const AttentionArgs& args;
    bool biased;
    int64_t masses;    // 4 of A, V, Q, K, or 6 with those at the junction of Q K^T and the bias
    double* partials;  // [B, H, masses, T]
};

// values_t is 2 V+^T, key_parts [K+ | K-], q_block [Qs+ | Qs-], c_block g.
template <class P>
struct Scratch : HeadScratch<P> {
    using F = typename P::Sum;
    F* raw;      // [rows, depth]  rows as loaded
    F* rows;     // [rows, parts]  rows being prepared
    F* factors;  // [rows, keys]   sign(S) A + softmax(|S|)
    F* out_row;  // [maps, depth]
    F* lanes;    // [2, 2, depth]  masses of columns, of P and N each
    F* bias;     // [rows, keys]   with a bias
    F* product;  // [rows, keys]   scale Q K^T, where the bias is a term that takes relevance

    Scratch(char* base, const Job& job) : HeadScratch<P>(base, job) {
        this->take(base, raw, P::rows * job.depth);
        this->take(base, rows, P::rows * job.parts);
        this->take(base, factors, P::rows * job.keys);
        this->take(base, out_row, job.maps * job.depth);
        this->take(base, lanes, 4 * job.depth);
        this->take(base, bias, job.biased ? P::rows * job.keys : 0);
        this->take(base, product, job.args.junction ? P::rows * job.keys : 0);
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
            fetch_row(args.k, args.width, args.keys, 0, b, h, start + P::rows + r);
            fetch_row(args.v, args.width, args.keys, 0, b, h, start + P::rows + r);
            if (start == 0) fetch_query(job, b, h, r);
        }
        load_rows(args.k, args.width, args.keys, 0, b, h, start, padded, F(1), job.depth, at.raw, at.out_row);
        transpose(at.raw, padded, job.depth, args.width, at.keys_t + start, job.keys);
        for (int64_t r = 0; r < padded; ++r)
            split_parts(at.raw + r * job.depth, args.width, F(1), job.depth, job.parts,
                        at.rows + r * job.parts);
        across_rows<P>(at.rows, padded, job.parts, at.key_parts + start / P::pack * job.parts);
        for (int64_t r = 0; r < padded; ++r) {
            clear(at.raw + r * job.depth, job.depth);
            if (start + r < args.keys) {
                const F* v = load(args.v.operand, offset(args.v, 0, b, h, start + r), args.width, at.out_row);
                split_parts(v, args.width, F(2), job.depth, job.depth, at.raw + r * job.depth);
            }
        }
        along_rows<P>(at.raw, padded, job.depth, at.along);
        transpose(at.along, padded, job.depth / P::pack, job.depth / P::pack, at.values_t + start, job.keys);
    }
}

// Masses of rows of A and, in place, c -> factor c. Of several rows at once: sums across the lanes of a
// vector take longer than a short row does.
template <class F, bool contrast>
RF_INLINE void scores_rows(const F* __restrict weight, const F* __restrict factor, int64_t n, F* __restrict p,
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

// The junction of rows of S = s + bias: masses of both, and in place c -> 2 [s > 0] c.
template <class F, bool contrast>
RF_INLINE void junction_rows(const F* __restrict s, const F* __restrict bias, int64_t n, F* __restrict p,
                             F* __restrict d, double* product_p, double* product_n, double* bias_p,
                             double* bias_n) {
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t end = min64(start + kBlock, n);
        F sum_p = 0, sum_n = 0, of_bias_p = 0, of_bias_n = 0;
        RF_SIMD_SUM(sum_p, sum_n, of_bias_p, of_bias_n)
        for (int64_t i = start; i < end; ++i) {
            const F magnitude = absolute(s[i]), upper = bias[i] > 0 ? bias[i] : F(0);
            const F whole_p = 2 * p[i], own_p = s[i] > 0 ? whole_p : F(0);
            sum_p += magnitude * absolute(own_p);
            of_bias_p += upper * absolute(whole_p);
            p[i] = own_p;
            if (contrast) {
                const F whole_d = 2 * d[i], own_d = s[i] > 0 ? whole_d : F(0);
                sum_n += magnitude * absolute(own_p - own_d);
                of_bias_n += upper * absolute(whole_p - whole_d);
                d[i] = own_d;
            }
        }
        *product_p += static_cast<double>(sum_p);
        *bias_p += static_cast<double>(of_bias_p);
        if (contrast) {
            *product_n += static_cast<double>(sum_n);
            *bias_n += static_cast<double>(of_bias_n);
        }
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

// Selects and stores one row of a result and adds its mass, column by column, to `lanes` [2, depth]; sums of
// D are `map_stride` after those of P.
template <class F, bool contrast>
RF_INLINE void finish_row(const Job& job, const StridedOperand& out, const F* x, F sign, F factor,
                          const F* sums, int64_t map_stride, bool split, int64_t t, int64_t b, int64_t h,
                          int64_t n, F* scaled, F* buffer, F* __restrict lanes) {
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
    const F* const __restrict p = results[0], * const __restrict d = results[1];
    RF_SIMD
    for (int64_t i = 0; i < args.width; ++i) {
        const F magnitude = absolute(x[i]);
        lanes[i] += magnitude * absolute(p[i]);
        if (contrast) lanes[job.depth + i] += magnitude * absolute(p[i] - d[i]);
    }
}

// Adds the masses of a few rows to those of map t.
template <class F, bool contrast>
RF_INLINE void add_lanes(const Job& job, const F* __restrict lanes, int64_t t, double* masses) {
    F sum_p = 0, sum_n = 0;
    RF_SIMD_SUM(sum_p, sum_n)
    for (int64_t i = 0; i < job.depth; ++i) {
        sum_p += lanes[i];
        if (contrast) sum_n += lanes[job.depth + i];
    }
    masses[t] += static_cast<double>(sum_p);
    if (contrast) masses[t + job.args.num_maps / 2] += static_cast<double>(sum_n);
}

// Scores of row n with their bias, which is kept, 0 beyond its keys, as is the product where both take
// relevance.
template <class P>
RF_INLINE void add_bias(const Job& job, const Scratch<P>& at, int64_t b, int64_t h, int64_t n, int64_t r,
                        typename P::Sum* __restrict scores) {
    using F = typename P::Sum;
    const AttentionArgs& args = job.args;
    F* __restrict kept = at.bias + r * job.keys;
    const F* bias = load_bias(args, b, h, n, kept);
    if (bias != kept)
        for (int64_t i = 0; i < args.keys; ++i) kept[i] = bias[i];
    for (int64_t i = args.keys; i < job.keys; ++i) kept[i] = 0;
    const F* __restrict product = args.junction ? at.product + r * job.keys : nullptr;
    if (product != nullptr) {
        RF_SIMD
        for (int64_t i = 0; i < job.keys; ++i) scores[i] = product[i] + kept[i];
    } else {
        RF_SIMD
        for (int64_t i = 0; i < job.keys; ++i) scores[i] += kept[i];
    }
}

// P::rows rows of queries from `first` on: scores, their coefficients, c_Q, and the operands that c_K and c_V
// need, at `row` of the block.
template <class P, bool contrast>
void query_rows(const Job& job, const Scratch<P>& at, int64_t b, int64_t h, int64_t first, int64_t row,
                double* masses) {
    using F = typename P::Sum;
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
    across_rows<P>(at.rows, P::rows, parts, at.q_block + row / P::pack * parts);

    F* scores = at.c_a;
    product<Single<F>, false>(P::rows, keys, args.width, {at.query, depth, 1}, at.keys_t, keys,
                              args.junction ? at.product : scores, keys);
    for (int64_t r = 0; r < P::rows; ++r) {
        F *weight = at.weights + r * keys, *factor = at.factors + r * keys;
        fetch_query(job, b, h, first + P::rows + r);
        fetch_result(args.c_q, args.num_maps, args.width, args.queries, b, h, first + r);
        if (r < count) {
            F* row_scores = scores + r * keys;
            if (job.biased) add_bias(job, at, b, h, first + r, r, row_scores);
            for (int64_t i = args.keys; i < keys; ++i) row_scores[i] = -static_cast<F>(__builtin_inf());
            if (job.biased)
                softmax_row<true>(row_scores, keys, weight, factor);
            else
                softmax_row<false>(row_scores, keys, weight, factor);
        } else {
            clear(weight, keys);
            clear(factor, keys);
        }
    }
    across_rows<P>(at.weights, P::rows, keys, at.a_block + row / P::pack * keys);

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
            along_rows<P>(at.rows, P::rows, depth, at.along);
            across_rows<P>(at.rows, P::rows, depth, at.c_block + (map * job.block + row) / P::pack * depth);
            product<P, false>(P::rows, keys, depth / P::pack, {at.along, depth / P::pack, 1}, at.values_t,
                              keys, at.c_a + of_pair * P::rows * keys, keys);
        }
        F *const c_p = at.c_a, *const c_d = c_p + P::rows * keys;
        scores_rows<F, contrast>(at.weights, at.factors, count * keys, c_p, c_d, masses + t,
                                 masses + t + half);
        if (args.junction) {
            double* const of_product = masses + 4 * args.num_maps + t;
            double* const of_bias = of_product + args.num_maps;
            junction_rows<F, contrast>(at.product, at.bias, count * keys, c_p, c_d, of_product,
                                       of_product + half, of_bias, of_bias + half);
        }
        for (int64_t of_pair = 0; of_pair < job.maps; ++of_pair)
            times_keys(job, at, at.c_a + of_pair * P::rows * keys,
                       at.c_s_block + ((t + of_pair * half) * job.block + row) / P::pack * keys,
                       at.c_query + of_pair * P::rows * parts);
        clear(at.lanes, 2 * depth);
        for (int64_t r = 0; r < count; ++r) {
            const F* q = load(args.q.operand, offset(args.q, 0, b, h, first + r), args.width, at.raw);
            finish_row<F, contrast>(job, args.c_q, q, scale < 0 ? F(-1) : F(1), 2 * scale,
                                    at.c_query + r * parts, P::rows * parts, !args.gated, t, b, h, first + r,
                                    at.raw + depth, at.out_row, at.lanes);
        }
        add_lanes<F, contrast>(job, at.lanes, t, masses + 2 * args.num_maps);
    }
}

// c_V and c_K of P::rows keys from `first` on.
template <class P, bool contrast>
void key_rows(const Job& job, const Scratch<P>& at, int64_t index, int64_t first, double* masses) {
    using F = typename P::Sum;
    const AttentionArgs& args = job.args;
    const int64_t b = index / args.heads, h = index % args.heads;
    const int64_t end = min64(first + P::rows, args.keys), half = args.num_maps / 2;
    F *const lanes_v = at.lanes, *const lanes_k = at.lanes + 2 * job.depth;
    for (int64_t j = first; j < end; ++j) fetch_keys(args, index, j, P::rows);
    for (int64_t t = 0; t < (contrast ? half : args.num_maps); ++t) {
        clear(at.lanes, 4 * job.depth);
        for (int64_t j = first; j < end; ++j) {
            const F* k = load(args.k.operand, offset(args.k, 0, b, h, j), args.width, at.raw);
            const F* v = load(args.v.operand, offset(args.v, 0, b, h, j), args.width, at.raw + job.depth);
            finish_row<F, contrast>(
                job, args.c_v, v, F(1), F(2), at.sum_v + (t * job.key_rows + j) * job.depth,
                half * job.key_rows * job.depth, false, t, b, h, j, nullptr, at.out_row, lanes_v);
            finish_row<F, contrast>(
                job, args.c_k, k, F(1), F(2), at.sum_k + (t * job.key_rows + j) * job.parts,
                half * job.key_rows * job.parts, !args.gated, t, b, h, j, nullptr, at.out_row, lanes_k);
        }
        add_lanes<F, contrast>(job, lanes_v, t, masses + args.num_maps);
        add_lanes<F, contrast>(job, lanes_k, t, masses + 3 * args.num_maps);
    }
}

template <class P, bool contrast>
void head(int64_t index, const void* context, void* scratch) {
    const Job& job = *static_cast<const Job*>(context);
    const AttentionArgs& args = job.args;
    const Scratch<P> at(static_cast<char*>(scratch), job);
    const int64_t b = index / args.heads, h = index % args.heads;
    double* masses = job.partials + index * job.masses * args.num_maps;
    for (int64_t i = 0; i < job.masses * args.num_maps; ++i) masses[i] = 0;

    [[maybe_unused]] const typename P::Registers registers;
    prepare_keys(job, at, b, h);
    clear_sums_of(job, at);
    for (int64_t start = 0; start < args.queries; start += job.block) {
        const int64_t rows = round_up(min64(job.block, args.queries - start), P::rows);
        for (int64_t row = 0; row < rows; row += P::rows)
            query_rows<P, contrast>(job, at, b, h, start + row, row, masses);
        for (int64_t r = 0; r < P::rows; ++r) fetch_key_results(args, b, h, r);
        add_block<P>(job, at, rows, at.a_block, false, at.c_block, true, job.depth, at.sum_v, at.sum_v_t);
        add_block<P>(job, at, rows, at.c_s_block, true, at.q_block, false, job.parts, at.sum_k, at.sum_k_t);
    }
    turn_sums(job, at);
    for (int64_t first = 0; first < args.keys; first += P::rows)
        key_rows<P, contrast>(job, at, index, first, masses);
}

template <class P>
void run(const AttentionArgs& args) {
    const int64_t heads = args.batch * args.heads, masses = args.junction ? 6 : 4;
    const Partials partials(heads * masses * args.num_maps);
    const Job job{sizes_of<P>(args, args.contrast ? 2 : 1, args.gated ? 1 : 2), args,
                  args.bias.operand.data != nullptr, masses, partials.data()};
    parallel_for(heads, heads * args.num_maps * (args.queries + args.width) * args.keys, args.threads,
                 args.contrast ? head<P, true> : head<P, false>, &job, Scratch<P>(nullptr, job).bytes);
    for (int64_t which = 0; which < masses; ++which)
        store_masses(args.masses, which * args.num_maps * args.batch, args.num_maps, args.batch,
                     partials.data() + which * args.num_maps, args.heads, masses * args.num_maps);
}

}  // namespace

void attention_pullback(const AttentionArgs& args) {
    const bool wide = any_double(args.q.operand, args.k.operand, args.v.operand, args.o.operand,
                                 args.c.operand, args.bias.operand);
    with_elements(wide, args.c.operand.dtype, [&](auto elements) { run<decltype(elements)>(args); });
}

}  // namespace rf::RF_ISA
