// Elementwise pull-backs: masses, rescale and merge, products with a diagonal, and what N is centred by.
#include "cpu/channels.h"
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

struct Merge {
    const MergeArgs& args;
    int64_t chunks;    // of one sample
    int64_t groups;    // pairs (P, D), or single rows
    double* partials;  // [B, chunks, T]
};

template <class F, bool contrast>
void merge_chunk(int64_t index, const void* context, void*) {
    const Merge& job = *static_cast<const Merge*>(context);
    const MergeArgs& args = job.args;
    const int64_t b = index / job.chunks;
    const int64_t begin = index % job.chunks * kChunk;
    const int64_t end = min64(begin + kChunk, args.inner);
    double* sums = job.partials + index * args.num_maps;
    for (int64_t t = 0; t < args.num_maps; ++t) sums[t] = 0;

    F buffer_a[kBlock], in_p[kBlock], in_d[kBlock], scaled_p[kBlock], scaled_d[kBlock];
    int64_t n;
    for (int64_t start = begin; start < end; start += n) {
        n = min64(min64(kBlock, end - start), args.part_width - start % args.part_width);
        const int64_t part = start / args.part_width % args.parts;
        const F* a = args.a.data ? load_ahead(args.a, b * args.inner + start, n, buffer_a) : nullptr;
        for (int64_t t = 0; t < job.groups; ++t) {
            const int64_t cell = t * args.batch + b;
            const int64_t cell_d = cell + args.num_maps / 2 * args.batch;
            const int64_t row = cell * args.inner + start;
            const int64_t row_d = cell_d * args.inner + start;
            const bool last = args.a.data == nullptr;
            // What is not read again here is computed in the output itself.
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
            double* const mass_n = contrast ? sums + t + args.num_maps / 2 : nullptr;
            add_mass<F, contrast>(a, p, d, n, sums + t, mass_n);
        }
    }
}

// n elements of a row of c times the factor, from `offset` of the output on.
template <class F>
RF_INLINE void scale_row(const ScaleArgs& args, const F* __restrict c, const F* __restrict factor, bool gate,
                         int64_t offset, int64_t n) {
    F buffer[kBlock];
    F* __restrict out = target(args.out, offset, buffer);
    if (gate) {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = factor[i] > F(0) ? F(2) * c[i] : F(0);
    } else {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = c[i] * factor[i];
    }
    commit(args.out, offset, n, out);
}

template <class F>
struct Scale {
    const ScaleArgs& args;
    Channels<F> channels;  // with gain and shift
};

template <class F>
void scale_chunk(int64_t index, const void* context, void*) {
    const Scale<F>& job = *static_cast<const Scale<F>*>(context);
    const ScaleArgs& args = job.args;
    const bool affine = args.gain.data != nullptr, gate = args.gate && !affine;
    const int64_t map_stride = args.batch * args.inner, end = min64((index + 1) * kChunk, map_stride);
    const bool pairs = args.n_scale.data != nullptr;
    const int64_t groups = pairs ? args.num_maps / 2 : args.num_maps;
    F factor_buffer[kBlock], affine_buffer[kBlock], in_p[kBlock], in_d[kBlock], scaled[kBlock];
    int64_t n;
    for (int64_t start = index * kChunk; start < end; start += n) {
        n = min64(kBlock, end - start);
        if (pairs) n = min64(n, args.inner - start % args.inner);  // of one sample
        const F* factor = load_ahead(args.factor, start, n, factor_buffer);
        if (affine) {
            const int64_t channel = job.channels.at(start);
            affine_factors(factor, job.channels.size + channel, job.channels.shift + channel, n, args.gate,
                           affine_buffer);
            factor = affine_buffer;
        }
        for (int64_t t = 0; t < groups; ++t) {
            const int64_t row = t * map_stride + start, row_d = row + groups * map_stride;
            const F* __restrict p = load_ahead(args.c, row, n, in_p);
            scale_row(args, p, factor, gate, row, n);
            if (!pairs) continue;
            const F* __restrict d = load_ahead(args.c, row_d, n, in_d);
            const F scale = load_one<F>(args.n_scale, t * args.batch + start / args.inner);
            RF_SIMD
            for (int64_t i = 0; i < n; ++i)  // where N is zero it stays so, to the last bit
                scaled[i] = d[i] == p[i] ? p[i] : scale * d[i] + (F(1) - scale) * p[i];
            scale_row<F>(args, scaled, factor, gate, row_d, n);
        }
    }
}

template <class F>
void run_scale(const ScaleArgs& args) {
    const int64_t map_stride = args.batch * args.inner;
    Partials numbers(args.gain.data ? channel_numbers(args.channels) : 0);
    Scale<F> job{args, {}};
    if (args.gain.data)
        job.channels = fill(args.gain, args.shift, args.channels, reinterpret_cast<F*>(numbers.data()));
    parallel_for(ceil_div(map_stride, kChunk), args.num_maps * map_stride, args.threads, scale_chunk<F>, &job,
                 0);
}

template <class F>
void ratio_chunk(int64_t index, const void* context, void*) {
    const RatioArgs& args = *static_cast<const RatioArgs*>(context);
    const int64_t map_stride = args.batch * args.inner, end = min64((index + 1) * kChunk, map_stride);
    const F stabilizer = static_cast<F>(args.stabilizer);
    F z_buffer[kBlock], d_buffer[kBlock], in_c[kBlock], factor[kBlock], buffer[kBlock];
    int64_t n;
    for (int64_t start = index * kChunk; start < end; start += n) {
        n = min64(kBlock, end - start);
        const F* __restrict z = load_ahead(args.z, start, n, z_buffer);
        const F* __restrict d = load_ahead(args.d, start, n, d_buffer);
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            const F below = d[i] + (d[i] < F(0) ? -stabilizer : stabilizer);
            const F share = z[i] / below;
            factor[i] = below == F(0) ? F(0) : share;
        }
        if (args.side) {
            const F side = static_cast<F>(args.side);
            RF_SIMD
            for (int64_t i = 0; i < n; ++i) factor[i] = side * z[i] <= F(0) ? F(0) : factor[i];
        }
        for (int64_t t = 0; t < args.num_maps; ++t) {
            const int64_t row = t * map_stride + start;
            const F* __restrict c = load_ahead(args.c, row, n, in_c);
            F* __restrict out = target(args.out, row, buffer);
            RF_SIMD
            for (int64_t i = 0; i < n; ++i) out[i] = c[i] * factor[i];
            commit(args.out, row, n, out);
        }
    }
}

// What N of one pair (P, D) has to be multiplied by.
template <class F>
void centring_row(int64_t index, const void* context, void*) {
    const CentringArgs& args = *static_cast<const CentringArgs*>(context);
    const int64_t b = index % args.batch, row = index * args.inner;
    const int64_t row_d = row + args.num_maps / 2 * args.batch * args.inner;
    F p_in[kCentringRun], d_in[kCentringRun], x_in[kCentringRun], weight[kCentringRun];
    double of_p = 0, of_n = 0;
    const bool whole = args.runs == 0;
    const int64_t runs = whole ? ceil_div(args.inner, kCentringRun) : args.runs,
                  step = whole ? kCentringRun : args.step;
    for (int64_t run = 0; run < runs; ++run) {
        const int64_t start = run * step, n = min64(kCentringRun, args.inner - start);
        if (const int64_t soon = start + 12 * step; run + 12 < runs) {
            fetch(args.c, row + soon, kCentringRun);
            fetch(args.c, row_d + soon, kCentringRun);
            if (args.factor.data) fetch(args.factor, b * args.inner + soon, kCentringRun);
        }
        const F* p = load(args.c, row + start, n, p_in);
        const F* d = load(args.c, row_d + start, n, d_in);
        const F* x = args.factor.data ? load(args.factor, b * args.inner + start, n, x_in) : nullptr;
        for (int64_t i = 0; i < n; ++i) {
            weight[i] = x == nullptr ? F(1) : args.gate ? F(x[i] > 0) : absolute(x[i]);
            if (args.gain.data) {
                const int64_t channel = (start + i) % args.channels;
                weight[i] = affine_factor_of(x[i], absolute(load_one<F>(args.gain, channel)),
                                             load_one<F>(args.shift, channel));
                if (args.gate && !(x[i] > 0)) weight[i] = 0;
            }
        }
        F sum_p = 0, sum_n = 0;
        RF_SIMD_SUM(sum_p, sum_n)
        for (int64_t i = 0; i < n; ++i) {
            sum_p += weight[i] * absolute(p[i]);
            sum_n += weight[i] * absolute(p[i] - d[i]);
        }
        of_p += static_cast<double>(sum_p);
        of_n += static_cast<double>(sum_n);
    }
    // 1 unless positive and finite in the dtype it is stored in: one of the sums is zero, or NaN.
    const double ratio = of_p / of_n;
    const double scale =
        args.out.dtype == DType::f64 ? ratio : static_cast<double>(static_cast<float>(ratio));
    store_one(args.out, index, scale > 0 && scale <= 1.7976931348623157e308 ? scale : 1);
}

}  // namespace

void merge(const MergeArgs& args) {
    const int64_t chunks = ceil_div(args.inner, kChunk);
    const int64_t tasks = args.batch * chunks;
    Partials partials(tasks * args.num_maps);
    const Merge job{args, chunks, args.contrast ? args.num_maps / 2 : args.num_maps, partials.data()};
    const bool wide = any_double(args.first, args.second, args.a, args.first_scale, args.second_scale);
    const Task task = wide ? (args.contrast ? merge_chunk<double, true> : merge_chunk<double, false>)
                           : (args.contrast ? merge_chunk<float, true> : merge_chunk<float, false>);
    parallel_for(tasks, args.num_maps * args.batch * args.inner, args.threads, task, &job, 0);
    if (args.mass.data)
        store_masses(args.mass, 0, args.num_maps, args.batch, job.partials, chunks, args.num_maps);
}

void scale_by(const ScaleArgs& args) {
    const bool wide = any_double(args.c, args.factor, args.n_scale, args.gain, args.shift);
    wide ? run_scale<double>(args) : run_scale<float>(args);
}

void ratio(const RatioArgs& args) {
    const int64_t map_stride = args.batch * args.inner;
    const bool wide = any_double(args.c, args.z, args.d);
    parallel_for(ceil_div(map_stride, kChunk), args.num_maps * map_stride, args.threads,
                 wide ? ratio_chunk<double> : ratio_chunk<float>, &args, 0);
}

void centring(const CentringArgs& args) {
    const bool wide = any_double(args.c, args.factor, args.gain, args.shift);
    const int64_t looked_at = args.runs ? args.runs * kCentringRun : args.inner;
    parallel_for(args.num_maps / 2 * args.batch, args.num_maps * args.batch * looked_at, args.threads,
                 wide ? centring_row<double> : centring_row<float>, &args, 0);
}

}  // namespace rf::RF_ISA
