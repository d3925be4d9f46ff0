// The elementwise passes between layers: rescale, merge, and the masses. Splitting at a junction: split.cpp.
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

// d <- s_N d + (s_P - s_N) p, p <- s_P p; without contrast p <- s_P p. Where d is p, N is zero: it stays so,
// to the last bit, or a rounding error would pass for relevance.
template <class F, bool contrast, bool add>
RF_INLINE void scale_into(const F* __restrict p, const F* __restrict d, F scale_p, F scale_n, int64_t n,
                          F* __restrict out_p, F* __restrict out_d) {
    const F difference = scale_p - scale_n;
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F value = scale_p * p[i], before = add ? out_p[i] : F(0);
        const F result = add ? before + value : value;
        out_p[i] = result;
        if (contrast) {
            const F other = scale_n * d[i] + difference * p[i];
            const bool zero = add ? (d[i] == p[i]) & (out_d[i] == before) : d[i] == p[i];
            out_d[i] = zero ? result : add ? out_d[i] + other : other;
        }
    }
}

struct Combine {
    const CombineArgs& args;
    int64_t chunks;    // of one sample
    int64_t groups;    // pairs (P, D), or single rows
    double* partials;  // [B, chunks, T]
};

template <class F, bool contrast>
void combine_chunk(int64_t index, const void* context, void*) {
    const Combine& job = *static_cast<const Combine*>(context);
    const CombineArgs& args = job.args;
    const int64_t b = index / job.chunks;
    const int64_t begin = index % job.chunks * kChunk;
    const int64_t end = min64(begin + kChunk, args.inner);
    double* sums = job.partials + index * args.rhs;
    for (int64_t t = 0; t < args.rhs; ++t) sums[t] = 0;

    F buffer_a[kBlock], in_p[kBlock], in_d[kBlock], scaled_p[kBlock], scaled_d[kBlock];
    int64_t n;
    for (int64_t start = begin; start < end; start += n) {
        n = min64(min64(kBlock, end - start), args.part_width - start % args.part_width);
        const int64_t part = start / args.part_width % args.parts;
        const F* a = args.a.data ? load_ahead(args.a, b * args.inner + start, n, buffer_a) : nullptr;
        for (int64_t t = 0; t < job.groups; ++t) {
            const int64_t cell = t * args.batch + b;
            const int64_t cell_d = cell + args.rhs / 2 * args.batch;
            const int64_t row = cell * args.inner + start;
            const int64_t row_d = cell_d * args.inner + start;
            const bool last = args.a.data == nullptr;
            // Results that nothing reads again go straight to the output.
            F* to_p = last ? target(args.out, row, scaled_p) : scaled_p;
            F* to_d = last && contrast ? target(args.out, row_d, scaled_d) : scaled_d;

            const F* p = load_ahead(args.first, row, n, in_p);
            const F* d = contrast ? load_ahead(args.first, row_d, n, in_d) : nullptr;
            if (args.first_scale.data) {
                const F scale_p = load_one<F>(args.first_scale, cell * args.parts + part);
                const F scale_n = contrast ? load_one<F>(args.first_scale, cell_d * args.parts + part) : F(0);
                scale_into<F, contrast, false>(p, d, scale_p, scale_n, n, to_p, to_d);
                p = to_p;
                d = to_d;
            }
            if (args.second.data) {
                const F* q = load_ahead(args.second, row, n, in_p);
                const F* e = contrast ? load_ahead(args.second, row_d, n, in_d) : nullptr;
                const F scale_p = load_one<F>(args.second_scale, cell);
                const F scale_n = contrast ? load_one<F>(args.second_scale, cell_d) : F(0);
                scale_into<F, contrast, true>(q, e, scale_p, scale_n, n, to_p, to_d);
            }
            if (last) {
                commit(args.out, row, n, scaled_p);
                if (contrast) commit(args.out, row_d, n, scaled_d);
                continue;
            }
            double* const mass_n = contrast ? sums + t + args.rhs / 2 : nullptr;
            add_mass<F, contrast>(a, p, d, n, sums + t, mass_n);
        }
    }
}

}  // namespace

void combine(const CombineArgs& args) {
    const int64_t chunks = ceil_div(args.inner, kChunk);
    const int64_t tasks = args.batch * chunks;
    Partials partials(tasks * args.rhs);
    const Combine job{args, chunks, args.contrast ? args.rhs / 2 : args.rhs, partials.data()};
    const bool wide = any_double(args.first, args.second, args.a, args.first_scale, args.second_scale);
    const Task task = wide ? (args.contrast ? combine_chunk<double, true> : combine_chunk<double, false>)
                           : (args.contrast ? combine_chunk<float, true> : combine_chunk<float, false>);
    parallel_for(tasks, args.rhs * args.batch * args.inner, args.threads, task, &job, 0);
    if (args.mass.data) store_masses(args.mass, 0, args.rhs, args.batch, job.partials, chunks, args.rhs);
}

}  // namespace rf::RF_ISA
