// The pull-back of softmax(scale Q K^T) V: both products and softmax in one pass over blocks of query rows;
// nothing of size N x M is in memory. One task is one head of one sample, for all right-hand sides.
//
// Products run on register tiles of kRows x kVectors vectors. An operand element is one number, or where the
// processor multiplies bfloat16 and the coefficients are bfloat16, a pair of them along the summed axis.
// Scores and softmax are always float (double).
#include "cpu/block.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace rf::RF_ISA {
namespace {

// Accumulators, one row of the right operand and a broadcast fill the vector registers.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 6, kVectors = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 6, kVectors = 2;
#else
constexpr int kBytes = 16, kRows = 4, kVectors = 2;
#endif

// Scores of one block of query rows, about: the block's operands stay in a 1 MB L2 cache.
constexpr int64_t kBlockScores = 24576;
constexpr int64_t kMasses = 4;  // of A, V, Q, K

RF_INLINE int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

template <class F>
struct Single {
    using Sum = F;
    using Element = F;
    typedef F SumVector __attribute__((vector_size(kBytes), may_alias));
    using ElementVector = SumVector;
    static constexpr int64_t lanes = kBytes / sizeof(F);
    static constexpr int64_t pack = 1;

    static RF_INLINE void multiply_add(SumVector& sum, Element a, ElementVector b) { sum += b * a; }
    // Elements along a row of n numbers.
    static RF_INLINE void along_row(const F* __restrict row, int64_t n, Element* __restrict out) {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = row[i];
    }
    // Elements across `pack` rows.
    static RF_INLINE void across_rows(const F* __restrict rows, int64_t, int64_t n, Element* __restrict out) {
        along_row(rows, n, out);
    }
};

#ifdef __AVX512BF16__
struct Pair {
    using Sum = float;
    using Element = std::uint32_t;
    typedef float SumVector __attribute__((vector_size(kBytes), may_alias));
    typedef std::uint32_t ElementVector __attribute__((vector_size(kBytes), may_alias));
    static constexpr int64_t lanes = kBytes / 4;
    static constexpr int64_t pack = 2;

    static RF_INLINE void multiply_add(SumVector& sum, Element a, ElementVector b) {
        sum = (SumVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                          (__m512bh)b);
    }
    static RF_INLINE __m256i rounded(const float* row) {
        return (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(row));
    }
    static RF_INLINE void along_row(const float* __restrict row, int64_t n, Element* __restrict out) {
        for (int64_t i = 0; i < n; i += lanes)
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + i / 2), rounded(row + i));
    }
    static RF_INLINE void across_rows(const float* __restrict rows, int64_t stride, int64_t n,
                                      Element* __restrict out) {
        for (int64_t i = 0; i < n; i += lanes) {
            const __m512i low = _mm512_cvtepu16_epi32(rounded(rows + i));
            const __m512i high = _mm512_cvtepu16_epi32(rounded(rows + stride + i));
            _mm512_store_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
};
#endif

// Element (row r, place k along the summed axis) is at data[r row + k step].
template <class P>
struct Left {
    const typename P::Element* data;
    int64_t row, step;
};

template <class P, int vectors, bool add>
__attribute__((noinline)) void tile(Left<P> left, const typename P::Element* right, int64_t stride,
                                    int64_t depth, typename P::Sum* out, int64_t out_stride) {
    using SumVector = typename P::SumVector;
    using ElementVector = typename P::ElementVector;
    SumVector sum[kRows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            if (add)
                sum[r][v] = *reinterpret_cast<const SumVector*>(out + r * out_stride + v * P::lanes);
            else
                sum[r][v] = SumVector{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        ElementVector b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            b[v] = *reinterpret_cast<const ElementVector*>(right + k * stride + v * P::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const typename P::Element a = left.data[r * left.row + k * left.step];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) P::multiply_add(sum[r][v], a, b[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            *reinterpret_cast<SumVector*>(out + r * out_stride + v * P::lanes) = sum[r][v];
    }
}

// out [rows, width] = or += left [rows, depth] right [depth, width]; rows in groups of kRows, width in lanes.
template <class P, bool add>
void product(int64_t rows, int64_t width, int64_t depth, Left<P> left, const typename P::Element* right,
             int64_t stride, typename P::Sum* out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += kRows) {
        const Left<P> group{left.data + r * left.row, left.row, left.step};
        typename P::Sum* to = out + r * out_stride;
        for (int64_t j = 0; j < width; j += kVectors * P::lanes) {
            const int64_t vectors = min64(kVectors, (width - j) / P::lanes);
            if (vectors == kVectors)
                tile<P, kVectors, add>(group, right + j, stride, depth, to + j, out_stride);
            else if (kVectors > 3 && vectors == 3)
                tile<P, 3, add>(group, right + j, stride, depth, to + j, out_stride);
            else if (kVectors > 2 && vectors == 2)
                tile<P, 2, add>(group, right + j, stride, depth, to + j, out_stride);
            else
                tile<P, 1, add>(group, right + j, stride, depth, to + j, out_stride);
        }
    }
}

struct Job {
    const AttentionArgs& args;
    int64_t sides;     // right-hand sides of one group: P and D, or one
    int64_t depth;     // D padded to whole vectors
    int64_t parts;     // columns of [K+], or [K+ | K-]
    int64_t keys;      // M padded to whole vectors and tiles
    int64_t key_rows;  // M padded to whole tiles
    int64_t block;     // query rows of one block
    double* partials;  // [B, H, kMasses, T]
};

template <class P>
Job plan(const AttentionArgs& args, double* partials) {
    Job job{args, args.contrast ? 2 : 1, 0, 0, 0, 0, 0, partials};
    job.depth = round_up(args.width, P::lanes);
    job.parts = args.gated ? job.depth : 2 * job.depth;
    job.key_rows = round_up(args.keys, kRows);
    job.keys = round_up(job.key_rows, P::lanes);
    const int64_t rows = kBlockScores / (job.keys > 0 ? job.keys : 1);
    const int64_t blocks = ceil_div(args.queries, rows > 4 * kRows ? rows : 4 * kRows);
    job.block = round_up(ceil_div(args.queries, blocks > 0 ? blocks : 1), kRows);
    return job;
}

// Scratch of one task, at `base`; only `bytes` is meaningful without one.
template <class P>
struct Scratch {
    using F = typename P::Sum;
    using E = typename P::Element;
    std::size_t bytes = 0;
    F* keys_t;     // [D, keys]                K^T
    E* values_t;   // [depth / pack, keys]     2 V+^T
    E* key_parts;  // [keys / pack, parts]     K+ | K-
    F* raw;        // [kRows, depth]           rows as they are loaded
    F* rows;       // [kRows, parts]           rows being prepared
    F* query;      // [kRows, depth]           scale q
    E* gated;      // [kRows, depth / pack]    g, along rows
    F* weights;    // [kRows, keys]            S, then A
    F* factors;    // [kRows, keys]            sign(S) A + softmax(|S|)
    F* c_a;        // [sides, kRows, keys]
    E* c_s;        // [kRows, keys / pack]     along rows
    F* c_query;    // [sides, kRows, parts]
    F* out_row;    // [sides, depth]
    // Blocks of query rows, elements across rows.
    E* a_block;    // [block / pack, keys]
    E* c_s_block;  // [T, block / pack, keys]
    E* g_block;    // [T, block / pack, depth]
    E* q_block;    // [block / pack, parts]    Qs+ | Qs-
    F* sum_v;      // [T, key_rows, depth]
    F* sum_k;      // [T, key_rows, parts]

    Scratch(char* base, const Job& job) {
        const int64_t rhs = job.args.rhs, block = job.block / P::pack;
        take(base, keys_t, job.args.width * job.keys);
        take(base, values_t, job.depth / P::pack * job.keys);
        take(base, key_parts, job.keys / P::pack * job.parts);
        take(base, raw, kRows * job.depth);
        take(base, rows, kRows * job.parts);
        take(base, query, kRows * job.depth);
        take(base, gated, kRows * job.depth / P::pack);
        take(base, weights, kRows * job.keys);
        take(base, factors, kRows * job.keys);
        take(base, c_a, job.sides * kRows * job.keys);
        take(base, c_s, kRows * job.keys / P::pack);
        take(base, c_query, job.sides * kRows * job.parts);
        take(base, out_row, job.sides * job.depth);
        take(base, a_block, block * job.keys);
        take(base, c_s_block, rhs * block * job.keys);
        take(base, g_block, rhs * block * job.depth);
        take(base, q_block, block * job.parts);
        take(base, sum_v, rhs * job.key_rows * job.depth);
        take(base, sum_k, rhs * job.key_rows * job.parts);
    }

  private:
    template <class T>
    void take(char* base, T*& pointer, int64_t count) {
        pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
        bytes += static_cast<std::size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    }
};

RF_INLINE int64_t offset(const StridedOperand& x, int64_t t, int64_t b, int64_t h, int64_t n) {
    return t * x.strides[0] + b * x.strides[1] + h * x.strides[2] + n * x.strides[3];
}

template <class T>
RF_INLINE void clear(T* data, int64_t n) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) data[i] = T(0);
}

// to = factor * x+ in the first `depth` columns and, if there are more, factor * x- in the others; 0 beyond n.
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

// out [columns, out_stride] = the transpose of columns of in [count, stride]
template <class E>
RF_INLINE void transpose(const E* __restrict in, int64_t count, int64_t stride, int64_t columns,
                         E* __restrict out, int64_t out_stride) {
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < count; ++r) out[c * out_stride + r] = in[r * stride + c];
}

template <class P>
void prepare_keys(const Job& job, const Scratch<P>& at, int64_t b, int64_t h) {
    using F = typename P::Sum;
    const AttentionArgs& args = job.args;
    for (int64_t start = 0; start < job.keys; start += kRows) {
        const int64_t padded = min64(kRows, job.keys - start);
        for (int64_t r = 0; r < padded; ++r) {
            F* to = at.raw + r * job.depth;
            clear(to, job.depth);
            if (start + r >= args.keys) continue;
            const F* k = load(args.k.operand, offset(args.k, 0, b, h, start + r), args.width, to);
            if (k != to)
                RF_SIMD
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

// s -> softmax(s), factor = sign(s) softmax(s) + softmax(|s|) over n scores; 0 from there to `padded`.
template <class F>
RF_INLINE void softmax_row(F* __restrict s, int64_t n, int64_t padded, F* __restrict factor) {
    const F outside = -static_cast<F>(__builtin_inf());
    for (int64_t i = n; i < padded; ++i) s[i] = outside;
    F largest = outside, smallest = -outside;
    RF_SIMD_MAX(largest)
    for (int64_t i = 0; i < padded; ++i) largest = s[i] > largest ? s[i] : largest;
    for (int64_t i = n; i < padded; ++i) s[i] = -outside;
    RF_PRAGMA(omp simd reduction(min : smallest))
    for (int64_t i = 0; i < padded; ++i) smallest = s[i] < smallest ? s[i] : smallest;
    for (int64_t i = n; i < padded; ++i) s[i] = outside;
    const F largest_absolute = largest > -smallest ? largest : -smallest;
    double sum = 0, sum_absolute = 0;
    for (int64_t start = 0; start < padded; start += kBlock) {
        const int64_t end = min64(start + kBlock, padded);
        F part = 0, part_absolute = 0;
        RF_SIMD_SUM(part, part_absolute)
        for (int64_t i = start; i < end; ++i) {
            const F e = exponential(s[i] - largest);
            const F kept = s[i] == outside ? outside : absolute(s[i]);
            const F ea = exponential(kept - largest_absolute);
            factor[i] = ea;
            // the sign of s stays with its exponential: e is never negative
            s[i] = s[i] < 0 ? -e : (s[i] > 0 ? e : F(0));
            part += e;
            part_absolute += ea;
            if (false) break;
        }
        sum += static_cast<double>(part);
        sum_absolute += static_cast<double>(part_absolute);
    }
    (void)sum;
    (void)sum_absolute;
}

}  // namespace
}  // namespace rf::RF_ISA
