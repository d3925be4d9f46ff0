// The elementwise passes between layers: rescale, merge, split at a junction, and the masses.
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

// d <- s_N d + (s_P - s_N) p, p <- s_P p; without contrast p <- s_P p.
template <class F, bool contrast, bool add>
RF_INLINE void scale_into(const F* __restrict p, const F* __restrict d, F scale_p, F scale_n, int64_t n,
                          F* __restrict out_p, F* __restrict out_d) {
    const F difference = scale_p - scale_n;
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F value = scale_p * p[i];
        out_p[i] = add ? out_p[i] + value : value;
        if (contrast) {
            const F other = scale_n * d[i] + difference * p[i];
            out_d[i] = add ? out_d[i] + other : other;
        }
    }
}

// out = 2 [x > 0] c, and its masses
template <class F, bool contrast>
RF_INLINE void gate_into(const F* __restrict x, const F* __restrict p, const F* __restrict d, int64_t n,
                         F* __restrict out_p, F* __restrict out_d, double* mass_p, double* mass_n) {
    F sum_p = 0, sum_n = 0;
    RF_SIMD_SUM(sum_p, sum_n)
    for (int64_t i = 0; i < n; ++i) {
        const F kept = x[i] > 0 ? x[i] : F(0);
        const F twice_p = p[i] + p[i];
        out_p[i] = x[i] > 0 ? twice_p : F(0);
        sum_p += kept * absolute(twice_p);
        if (contrast) {
            const F twice_d = d[i] + d[i];
            out_d[i] = x[i] > 0 ? twice_d : F(0);
            sum_n += kept * absolute(twice_p - twice_d);
        }
    }
    *mass_p += static_cast<double>(sum_p);
    if (contrast) *mass_n += static_cast<double>(sum_n);
}

struct Combine {
    const CombineArgs& args;
    int64_t chunks;    // of one sample
    int64_t groups;    // pairs (P, D), or single rows
    double* partials;  // [B, chunks, operand a or b, T]
};

// One row, or with contrast a pair of rows, of the gated coefficient of one operand and its mass.
template <class F, bool contrast>
RF_INLINE void split(const CombineArgs& args, const F* x, const F* p, const F* d, const Operand& out,
                     int64_t row, int64_t row_d, int64_t n, int64_t t, double* sums) {
    F buffer_p[kBlock], buffer_d[kBlock];
    double *mass_p = sums + t, *mass_n = contrast ? sums + t + args.rhs / 2 : nullptr;
    if (out.data == nullptr) return add_mass<F, contrast>(x, p, d, n, mass_p, mass_n);
    F* out_p = target(out, row, buffer_p);
    F* out_d = contrast ? target(out, row_d, buffer_d) : nullptr;
    gate_into<F, contrast>(x, p, d, n, out_p, out_d, mass_p, mass_n);
    commit(out, row, n, buffer_p);
    if (contrast) commit(out, row_d, n, buffer_d);
}

template <class F, bool contrast>
void combine_chunk(int64_t index, const void* context, void*) {
    const Combine& job = *static_cast<const Combine*>(context);
    const CombineArgs& args = job.args;
    const int64_t b = index / job.chunks;
    const int64_t begin = index % job.chunks * kChunk;
    const int64_t end = min64(begin + kChunk, args.inner);
    double* sums_a = job.partials + index * 2 * args.rhs;
    double* sums_b = sums_a + args.rhs;
    for (int64_t t = 0; t < 2 * args.rhs; ++t) sums_a[t] = 0;

    F buffer_a[kBlock], buffer_b[kBlock], in_p[kBlock], in_d[kBlock], scaled_p[kBlock], scaled_d[kBlock];
    int64_t n;
    for (int64_t start = begin; start < end; start += n) {
        n = min64(min64(kBlock, end - start), args.part_width - start % args.part_width);
        const int64_t part = start / args.part_width % args.parts;
        const F* a = args.a.data ? load(args.a, b * args.inner + start, n, buffer_a) : nullptr;
        const F* other = args.b.data ? load(args.b, b * args.inner + start, n, buffer_b) : nullptr;
        for (int64_t t = 0; t < job.groups; ++t) {
            const int64_t cell = t * args.batch + b;
            const int64_t cell_d = cell + args.rhs / 2 * args.batch;
            const int64_t row = cell * args.inner + start;
            const int64_t row_d = cell_d * args.inner + start;
            const bool last = args.a.data == nullptr;
            // Results that nothing reads again go straight to the output.
            F* to_p = last ? target(args.out, row, scaled_p) : scaled_p;
            F* to_d = last && contrast ? target(args.out, row_d, scaled_d) : scaled_d;

            const F* p = load(args.first, row, n, in_p);
            const F* d = contrast ? load(args.first, row_d, n, in_d) : nullptr;
            if (args.first_scale.data) {
                const F scale_p = load_one<F>(args.first_scale, cell * args.parts + part);
                const F scale_n = contrast ? load_one<F>(args.first_scale, cell_d * args.parts + part) : F(0);
                scale_into<F, contrast, false>(p, d, scale_p, scale_n, n, to_p, to_d);
                p = to_p;
                d = to_d;
            }
            if (args.second.data) {
                const F* q = load(args.second, row, n, in_p);
                const F* e = contrast ? load(args.second, row_d, n, in_d) : nullptr;
                const F scale_p = load_one<F>(args.second_scale, cell);
                const F scale_n = contrast ? load_one<F>(args.second_scale, cell_d) : F(0);
                scale_into<F, contrast, true>(q, e, scale_p, scale_n, n, to_p, to_d);
            }
            if (last) {
                commit(args.out, row, n, scaled_p);
                if (contrast) commit(args.out, row_d, n, scaled_d);
                continue;
            }
            if (args.relu) {
                const F* __restrict left = a;
                const F* __restrict right = other;
                const auto gate = [&](const F* in, F* out) {
                    RF_SIMD
                    for (int64_t i = 0; i < n; ++i) out[i] = left[i] + right[i] > 0 ? in[i] + in[i] : F(0);
                };
                gate(p, scaled_p);
                if (contrast) gate(d, scaled_d);
                p = scaled_p;
                d = scaled_d;
            }
            split<F, contrast>(args, a, p, d, args.c_a, row, row_d, n, t, sums_a);
            if (other) split<F, contrast>(args, other, p, d, args.c_b, row, row_d, n, t, sums_b);
        }
    }
}

}  // namespace

void combine(const CombineArgs& args) {
    const int64_t chunks = ceil_div(args.inner, kChunk);
    const int64_t tasks = args.batch * chunks;
    Partials partials(tasks * 2 * args.rhs);
    const Combine job{args, chunks, args.contrast ? args.rhs / 2 : args.rhs, partials.data()};
    bool wide = false;
    for (const Operand* operand :
         {&args.first, &args.second, &args.a, &args.b, &args.first_scale, &args.second_scale})
        wide = wide || (operand->data != nullptr && operand->dtype == DType::f64);
    const Task task = wide ? (args.contrast ? combine_chunk<double, true> : combine_chunk<double, false>)
                           : (args.contrast ? combine_chunk<float, true> : combine_chunk<float, false>);
    parallel_for(tasks, args.rhs * args.batch * args.inner, args.threads, task, &job, 0);
    const double* of_b = job.partials + args.rhs;
    if (args.mass_a.data)
        store_masses(args.mass_a, 0, args.rhs, args.batch, job.partials, chunks, 2 * args.rhs);
    if (args.mass_b.data) store_masses(args.mass_b, 0, args.rhs, args.batch, of_b, chunks, 2 * args.rhs);
}

}  // namespace rf::RF_ISA
