// Pull-backs around numbers by channel, which gates and pools have: products with them, and sums over all
// rows.
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

template <class Args>
struct Job {
    const Args& args;
    int64_t step, chunks;  // rows of a task, tasks of a sample
    int64_t sums;          // of a task: a mass of every map, then what else it adds
    double* partials;      // [B, chunks, sums]

    RF_INLINE int64_t sample(int64_t index) const { return index / chunks; }
    RF_INLINE int64_t first(int64_t index) const { return index % chunks * step; }
    RF_INLINE int64_t last(int64_t index) const { return min64(first(index) + step, args.rows); }
};

template <class F, bool contrast>
void mul_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Job<MulArgs>*>(context);
    const MulArgs& args = job.args;
    const int64_t b = job.sample(index), channels = args.channels, maps = args.num_maps;
    const int64_t groups = contrast ? maps / 2 : maps, map_stride = args.batch * args.rows * channels;
    double* const masses = job.partials + index * job.sums;
    for (int64_t i = 0; i < job.sums; ++i) masses[i] = 0;
    F a_in[kBlock], b_in[kBlock], of_a[kBlock], of_b[kBlock], in[kBlock], p_out[kBlock], d_out[kBlock];
    for (int64_t row = job.first(index); row < job.last(index); ++row)
        for (int64_t start = 0; start < channels; start += kBlock) {
            const int64_t n = min64(kBlock, channels - start), at = (b * args.rows + row) * channels + start;
            const F* __restrict a = load_ahead(args.a, at, n, a_in);
            const F* __restrict factor = load(args.b, b * channels + start, n, b_in);
            RF_SIMD
            for (int64_t i = 0; i < n; ++i) {
                const F open = a[i] * factor[i] > F(0) ? F(2) : F(0);  // times NaN it is NaN
                of_a[i] = open * absolute(factor[i]);
                of_b[i] = open * absolute(a[i]);
            }
            for (int64_t t = 0; t < groups; ++t) {
                F* pulled[2] = {};
                for (int64_t half = 0; half < (contrast ? 2 : 1); ++half) {
                    const int64_t map = t + half * groups, offset = map * map_stride + at;
                    const F* __restrict c = load_ahead(args.c, offset, n, in);
                    F* __restrict out = pulled[half] = target(args.c_a, offset, half ? d_out : p_out);
                    double* __restrict sums = masses + maps + map * channels + start;
                    RF_SIMD
                    for (int64_t i = 0; i < n; ++i) {
                        out[i] = c[i] * of_a[i];
                        sums[i] += static_cast<double>(c[i] * of_b[i]);
                    }
                }
                add_mass<F, contrast>(a, pulled[0], pulled[1], n, masses + t, masses + t + groups);
                commit(args.c_a, t * map_stride + at, n, p_out);
                if (contrast) commit(args.c_a, (t + groups) * map_stride + at, n, d_out);
            }
        }
}

template <class F>
void mul_gradient_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Job<MulGradientArgs>*>(context);
    const MulGradientArgs& args = job.args;
    const int64_t b = job.sample(index), channels = args.channels,
                  map_stride = args.batch * args.rows * channels;
    const F share = static_cast<F>(args.share);
    double* const partials = job.partials + index * job.sums;
    for (int64_t i = 0; i < job.sums; ++i) partials[i] = 0;
    F a_in[kBlock], b_in[kBlock], of_a[kBlock], in[kBlock], buffer[kBlock];
    for (int64_t row = job.first(index); row < job.last(index); ++row)
        for (int64_t start = 0; start < channels; start += kBlock) {
            const int64_t n = min64(kBlock, channels - start), at = (b * args.rows + row) * channels + start;
            const F* __restrict a = load_ahead(args.a, at, n, a_in);
            const F* __restrict factor = load(args.b, b * channels + start, n, b_in);
            RF_SIMD
            for (int64_t i = 0; i < n; ++i) of_a[i] = share * factor[i];
            for (int64_t t = 0; t < args.num_maps; ++t) {
                const int64_t offset = t * map_stride + at;
                const F* __restrict c = load_ahead(args.c, offset, n, in);
                F* __restrict out = target(args.c_a, offset, buffer);
                double* __restrict sums = partials + t * channels + start;
                RF_SIMD
                for (int64_t i = 0; i < n; ++i) {
                    out[i] = c[i] * of_a[i];
                    sums[i] += static_cast<double>(c[i] * a[i]);
                }
                commit(args.c_a, offset, n, out);
            }
        }
}

template <class F, bool contrast>
void spread_rows(int64_t index, const void* context, void*) {
    const auto& job = *static_cast<const Job<SpreadArgs>*>(context);
    const SpreadArgs& args = job.args;
    const int64_t b = job.sample(index), channels = args.channels;
    const int64_t groups = contrast ? args.num_maps / 2 : args.num_maps;
    double* const masses = job.partials + index * job.sums;
    for (int64_t i = 0; i < job.sums; ++i) masses[i] = 0;
    F x_in[kBlock], in[kBlock], p_out[kBlock], d_out[kBlock];
    for (int64_t row = job.first(index); row < job.last(index); ++row)
        for (int64_t start = 0; start < channels; start += kBlock) {
            const int64_t n = min64(kBlock, channels - start), at = (b * args.rows + row) * channels + start;
            const F* __restrict x = load_ahead(args.x, at, n, x_in);
            for (int64_t t = 0; t < groups; ++t) {
                F* pulled[2] = {};
                for (int64_t half = 0; half < (contrast ? 2 : 1); ++half) {
                    const int64_t cell = (t + half * groups) * args.batch;
                    const F* __restrict c = load(args.c, (cell + b) * channels + start, n, in);
                    F* __restrict out = pulled[half] =
                        target(args.out, cell * args.rows * channels + at, half ? d_out : p_out);
                    RF_SIMD
                    for (int64_t i = 0; i < n; ++i) out[i] = x[i] > F(0) ? F(2) * c[i] : F(0);
                }
                add_mass<F, contrast>(x, pulled[0], pulled[1], n, masses + t, masses + t + groups);
                const int64_t offset = t * args.batch * args.rows * channels + at;
                commit(args.out, offset, n, p_out);
                if (contrast) commit(args.out, offset + groups * args.batch * args.rows * channels, n, d_out);
            }
        }
}

template <class Args>
Job<Args> job_of(const Args& args, int64_t sums) {
    const int64_t step = rows_of_task(args.channels);
    return {args, step, ceil_div(args.rows, step), sums, nullptr};
}

// c_b [T, B, channels] from the sums of tasks, which lie behind `skipped` others.
template <class Args>
void store_sums(const Args& args, const Job<Args>& job, int64_t skipped, double share) {
    for (int64_t cell = 0; cell < args.num_maps * args.batch; ++cell) {
        const int64_t t = cell / args.batch, b = cell % args.batch;
        for (int64_t i = 0; i < args.channels; ++i) {
            double sum = 0;
            for (int64_t chunk = b * job.chunks; chunk < (b + 1) * job.chunks; ++chunk)
                sum += job.partials[chunk * job.sums + skipped + t * args.channels + i];
            store_one(args.c_b, cell * args.channels + i, share * sum);
        }
    }
}

}  // namespace

void mul_pullback(const MulArgs& args) {
    auto job = job_of(args, args.num_maps * (1 + args.channels));
    Partials partials(args.batch * job.chunks * job.sums);
    job.partials = partials.data();
    const bool wide = any_double(args.c, args.a, args.b);
    const Task task = wide ? (args.contrast ? mul_rows<double, true> : mul_rows<double, false>)
                           : (args.contrast ? mul_rows<float, true> : mul_rows<float, false>);
    const int64_t work = args.num_maps * args.batch * args.rows * args.channels;
    parallel_for(args.batch * job.chunks, work, args.threads, task, &job, 0);
    store_masses(args.mass, 0, args.num_maps, args.batch, job.partials, job.chunks, job.sums);
    store_sums(args, job, args.num_maps, 1);
}

void mul_gradient(const MulGradientArgs& args) {
    auto job = job_of(args, args.num_maps * args.channels);
    Partials partials(args.batch * job.chunks * job.sums);
    job.partials = partials.data();
    const Task task =
        any_double(args.c, args.a, args.b) ? mul_gradient_rows<double> : mul_gradient_rows<float>;
    const int64_t work = args.num_maps * args.batch * args.rows * args.channels;
    parallel_for(args.batch * job.chunks, work, args.threads, task, &job, 0);
    store_sums(args, job, 0, args.share);
}

void spread(const SpreadArgs& args) {
    auto job = job_of(args, args.num_maps);
    Partials partials(args.batch * job.chunks * job.sums);
    job.partials = partials.data();
    const bool wide = any_double(args.c, args.x);
    const Task task = wide ? (args.contrast ? spread_rows<double, true> : spread_rows<double, false>)
                           : (args.contrast ? spread_rows<float, true> : spread_rows<float, false>);
    const int64_t work = args.num_maps * args.batch * args.rows * args.channels;
    parallel_for(args.batch * job.chunks, work, args.threads, task, &job, 0);
    store_masses(args.mass, 0, args.num_maps, args.batch, job.partials, job.chunks, job.sums);
}

}  // namespace rf::RF_ISA
