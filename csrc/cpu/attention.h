// What both pull-backs of attention have in common: rows of strided operands, transposes, scratch, and sums
// over blocks of queries.
#pragma once

#include "cpu/small_products.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace rf::RF_ISA {
namespace {

// Scores of one block of query rows, about: the block's operands stay in a 1 MB L2 cache.
constexpr int64_t kBlockScores = 24576;

RF_INLINE int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

// Query rows of one block.
template <class P>
int64_t rows_of_a_block(int64_t queries, int64_t keys) {
    const int64_t rows = kBlockScores / (keys > 0 ? keys : 1);
    const int64_t blocks = ceil_div(queries, rows > 4 * P::rows ? rows : 4 * P::rows);
    return round_up(ceil_div(queries, blocks > 0 ? blocks : 1), P::rows);
}

// Of one head.
struct Sizes {
    int64_t maps;      // of one group: P and D, or one
    int64_t depth;     // D padded to whole vectors (tiles)
    int64_t parts;     // columns of what c_S is multiplied with: `depth`, or twice as many
    int64_t keys;      // M padded to whole vectors and tiles
    int64_t key_rows;  // M padded to whole tiles
    int64_t block;     // query rows of one block
};

template <class P, class Args>
Sizes sizes_of(const Args& args, int64_t maps, int64_t parts) {
    const int64_t depth = round_up(args.width, P::align), key_rows = round_up(args.keys, P::rows);
    const int64_t keys = round_up(key_rows, P::align);
    return {maps, depth, parts * depth, keys, key_rows, rows_of_a_block<P>(args.queries, keys)};
}

// Parts of the scratch one after another; without a base only `bytes` is meaningful.
struct Layout {
    std::size_t bytes = 0;

  protected:
    template <class T>
    void take(char* base, T*& pointer, int64_t count) {
        pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
        const std::size_t end = bytes + static_cast<std::size_t>(count) * sizeof(T);
        bytes = (end + kGuard + 63) / 64 * 64;
        if (kGuard > 0 && base != nullptr) guard(base + end, base + bytes);
    }
};

// Scratch of one task that both have, at `base`; only `bytes` is meaningful without one.
template <class P>
struct HeadScratch : Layout {
    using F = typename P::Sum;
    using E = typename P::Element;
    F* keys_t;     // [D, keys]              K^T
    E* values_t;   // [depth / pack, keys]   V^T
    E* key_parts;  // [keys / pack, parts]   K
    F* query;      // [rows, depth]          scale q
    E* along;      // [rows, depth / pack]   rows of V, or of c, along rows
    F* weights;    // [rows, keys]           S, then A
    F* c_a;        // [maps, rows, keys]     c_A, then c_S
    E* c_s;        // [rows, keys / pack]    along rows
    F* c_query;    // [maps, rows, parts]
    // Blocks of query rows, elements across rows.
    E* a_block;    // [block / pack, keys]
    E* c_s_block;  // [T, block / pack, keys]
    E* c_block;    // [T, block / pack, depth]
    E* q_block;    // [block / pack, parts]  scale Q
    F* sum_v;      // [T, key_rows, depth]
    F* sum_k;      // [T, key_rows, parts]
    // On tile registers, whose left operands have elements along rows.
    E* transposed;  // [parts, block / pack]
    F* sum_v_t;     // [T, depth, keys]      c_V^T
    F* sum_k_t;     // [T, parts, keys]      c_K^T

    template <class Job>
    HeadScratch(char* base, const Job& job) {
        const int64_t num_maps = job.args.num_maps, block = job.block / P::pack;
        take(base, keys_t, job.args.width * job.keys);
        take(base, values_t, job.depth / P::pack * job.keys);
        take(base, key_parts, job.keys / P::pack * job.parts);
        take(base, query, P::rows * job.depth);
        take(base, along, P::rows * job.depth / P::pack);
        take(base, weights, P::rows * job.keys);
        take(base, c_a, job.maps * P::rows * job.keys);
        take(base, c_s, P::rows * job.keys / P::pack);
        take(base, c_query, job.maps * P::rows * job.parts);
        take(base, a_block, block * job.keys);
        take(base, c_s_block, num_maps * block * job.keys);
        take(base, c_block, num_maps * block * job.depth);
        take(base, q_block, block * job.parts);
        take(base, sum_v, num_maps * job.key_rows * job.depth);
        take(base, sum_k, num_maps * job.key_rows * job.parts);
        take(base, transposed, P::tiled ? job.parts * block : 0);
        take(base, sum_v_t, P::tiled ? num_maps * job.depth * job.keys : 0);
        take(base, sum_k_t, P::tiled ? num_maps * job.parts * job.keys : 0);
    }
};

template <class T>
RF_INLINE void clear(T* data, int64_t n) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) data[i] = T(0);
}

#ifdef __AVX512F__
// The transpose of 16 x 16 elements of 32 bits: pairs of rows, then fours, then quarters of vectors.
inline void transpose_16(const void* in, int64_t stride, void* out, int64_t out_stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = _mm512_loadu_si512(static_cast<const std::uint32_t*>(in) + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        std::uint32_t* to = static_cast<std::uint32_t*>(out) + i * out_stride;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + 4 * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + 8 * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + 12 * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

// out [columns, out_stride] = the transpose of columns of in [count, stride]
template <class E>
RF_INLINE void transpose(const E* __restrict in, int64_t count, int64_t stride, int64_t columns,
                         E* __restrict out, int64_t out_stride) {
#ifdef __AVX512F__
    if constexpr (sizeof(E) == 4) {
        if (count % 16 == 0 && columns % 16 == 0) {
            for (int64_t c = 0; c < columns; c += 16)
                for (int64_t r = 0; r < count; r += 16)
                    transpose_16(in + r * stride + c, stride, out + c * out_stride + r, out_stride);
            return;
        }
    }
#endif
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < count; ++r) out[c * out_stride + r] = in[r * stride + c];
}

// Fetches row n, if there is one, into the L2 cache: rows of a head are far apart, which no hardware
// prefetcher predicts.
RF_INLINE void fetch_row(const StridedOperand& x, int64_t width, int64_t rows, int64_t t, int64_t b,
                         int64_t h, int64_t n) {
    if (n >= rows) return;
    const int64_t element = item_size(x.operand.dtype);
    const char* row = static_cast<const char*>(x.operand.data) + offset(x, t, b, h, n) * element;
    for (int64_t at = 0; at < width * element; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Fetches row n of all maps of a result, if there is one, to be written.
RF_INLINE void fetch_result(const StridedOperand& x, int64_t num_maps, int64_t width, int64_t rows, int64_t b,
                            int64_t h, int64_t n) {
    if (n >= rows) return;
    const int64_t element = item_size(x.operand.dtype);
    for (int64_t t = 0; t < num_maps; ++t) {
        const char* row = static_cast<const char*>(x.operand.data) + offset(x, t, b, h, n) * element;
        for (int64_t at = 0; at < width * element; at += 64) __builtin_prefetch(row + at, 1, 2);
    }
}

// Likewise of both results of key n.
template <class Args>
RF_INLINE void fetch_key_results(const Args& args, int64_t b, int64_t h, int64_t n) {
    fetch_result(args.c_v, args.num_maps, args.width, args.keys, b, h, n);
    fetch_result(args.c_k, args.num_maps, args.width, args.keys, b, h, n);
}

// While the results of key n are written: those of a key `ahead` rows further on, and key n of the next head.
template <class Args>
RF_INLINE void fetch_keys(const Args& args, int64_t index, int64_t n, int64_t ahead) {
    fetch_key_results(args, index / args.heads, index % args.heads, n + ahead);
    if (index + 1 == args.batch * args.heads) return;
    const int64_t b = (index + 1) / args.heads, h = (index + 1) % args.heads;
    fetch_row(args.k, args.width, args.keys, 0, b, h, n);
    fetch_row(args.v, args.width, args.keys, 0, b, h, n);
}

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

// Elements along the rows of x [rows, width], and across them.
template <class P>
RF_INLINE void along_rows(const typename P::Sum* x, int64_t rows, int64_t width, typename P::Element* out) {
    for (int64_t r = 0; r < rows; ++r) P::along_row(x + r * width, width, out + r * width / P::pack);
}

template <class P>
RF_INLINE void across_rows(const typename P::Sum* x, int64_t rows, int64_t width, typename P::Element* out) {
    for (int64_t r = 0; r + P::pack <= rows; r += P::pack)
        P::across_rows(x + r * width, width, width, out + r / P::pack * width);
}

// Bias of row n of scores; `keys` numbers.
template <class F, class Args>
RF_INLINE const F* load_bias(const Args& args, int64_t b, int64_t h, int64_t n, F* __restrict buffer) {
    return load(args.bias.operand, offset(args.bias, 0, b % args.biases, h, n), args.keys, buffer);
}

// c_query [rows, parts] = c_s [rows, keys] times K. In `block` c_s is left across rows.
template <class P>
RF_INLINE void times_keys(const Sizes& sizes, const HeadScratch<P>& at, const typename P::Sum* c_s,
                          typename P::Element* block, typename P::Sum* c_query) {
    const int64_t pairs = sizes.keys / P::pack;
    across_rows<P>(c_s, P::rows, sizes.keys, block);
    if (P::pack > 1) along_rows<P>(c_s, P::rows, sizes.keys, at.c_s);
    product<P, false>(P::rows, sizes.parts, pairs, {P::pack > 1 ? at.c_s : block, pairs, 1}, at.key_parts,
                      sizes.parts, c_query, sizes.parts);
}

template <class P, class Job>
RF_INLINE void clear_sums_of(const Job& job, const HeadScratch<P>& at) {
    const int64_t rows = job.args.num_maps * (P::tiled ? job.keys : job.key_rows);
    clear(P::tiled ? at.sum_v_t : at.sum_v, rows * job.depth);
    clear(P::tiled ? at.sum_k_t : at.sum_k, rows * job.parts);
}

// The sums of a block for one of c_V and c_K: those of `of_keys` [T or 1, keys] and `of_columns` [T or 1,
// width].
template <class P, class Job>
RF_INLINE void add_block(const Job& job, const HeadScratch<P>& at, int64_t rows,
                         const typename P::Element* of_keys, bool keys_by_map,
                         const typename P::Element* of_columns, bool columns_by_map, int64_t width,
                         typename P::Sum* sums, typename P::Sum* sums_t) {
    const int64_t pairs = job.block / P::pack;
    for (int64_t t = 0; t < job.args.num_maps; ++t) {
        const typename P::Element* const by_key = of_keys + (keys_by_map ? t * pairs * job.keys : 0);
        const typename P::Element* const by_column = of_columns + (columns_by_map ? t * pairs * width : 0);
        if constexpr (P::tiled) {
            // Transposed: A and c_S lie as right operands.
            if (t == 0 || columns_by_map)
                transpose(by_column, rows / P::pack, width, width, at.transposed, pairs);
            product<P, true>(width, job.keys, rows / P::pack, {at.transposed, pairs, 1}, by_key, job.keys,
                             sums_t + t * width * job.keys, job.keys);
        } else {
            product<P, true>(job.key_rows, width, rows / P::pack, {by_key, 1, job.keys}, by_column, width,
                             sums + t * job.key_rows * width, width);
        }
    }
}

// sum_v and sum_k of their transposes, where these were summed.
template <class P, class Job>
RF_INLINE void turn_sums(const Job& job, const HeadScratch<P>& at) {
    if (!P::tiled) return;
    for (int64_t t = 0; t < job.args.num_maps; ++t) {
        transpose(at.sum_v_t + t * job.depth * job.keys, job.depth, job.keys, job.key_rows,
                  at.sum_v + t * job.key_rows * job.depth, job.depth);
        transpose(at.sum_k_t + t * job.parts * job.keys, job.parts, job.keys, job.key_rows,
                  at.sum_k + t * job.key_rows * job.parts, job.parts);
    }
}

// Calls `run` with what products multiply: double if `wide`, else what suits coefficients of this dtype.
template <class Run>
void with_elements(bool wide, DType coefficients, const Run& run) {
    if (wide) return run(Single<double>());
#if defined(__AMX_BF16__)
    if (coefficients == DType::bf16) return run(TilePair());
#elif defined(__AVX512BF16__)
    if (coefficients == DType::bf16) return run(Pair());
#endif
    run(Single<float>());
}

}  // namespace
}  // namespace rf::RF_ISA
