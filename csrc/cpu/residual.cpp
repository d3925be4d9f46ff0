// The pull-back of the residual sum of a ResNet, z = relu(BatchNorm(x) + b), to x and b, from one or two
// readers of z.
#include "cpu/channels.h"
#include "cpu/mass.h"

namespace rf::RF_ISA {
namespace {

template <class F>
struct Residual {
    const ResidualArgs& args;
    Channels<F> channels;
    int64_t chunks;    // of one sample
    int64_t groups;    // pairs (P, D), or single rows
    double* partials;  // [B, chunks, y or b, T]
};

// What the readers of z say about n elements, in place of the first.
template <class F>
struct Readers {
    const F *p, *d, *q, *e;  // of the first and of the second, or null
    F first_p, first_n, second_p, second_n;
};

// By element: what the coefficients of x and b are multiplied by, and what turns the merged coefficient's
// absolute value into that of y's and b's relevance.
template <class F>
struct Weights {
    F x[kBlock], b[kBlock], mass_y[kBlock], mass_b[kBlock];
};

template <class F>
RF_INLINE void weigh(const F* __restrict z, const F* __restrict b, const F* __restrict size,
                     const F* __restrict shift, int64_t n, Weights<F>& out) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const F y = z[i] - b[i], open = z[i] > F(0) ? F(4) : F(0);
        const F kept_y = y > F(0) ? open : F(0), kept_b = b[i] > F(0) ? open : F(0);
        out.x[i] = kept_y * affine_factor_of(y, size[i], shift[i]);
        out.b[i] = kept_b;
        out.mass_y[i] = kept_y * y;
        out.mass_b[i] = kept_b * b[i];
    }
}

template <class F>
struct Split {
    F *x_p, *x_d, *b_p, *b_d;
    double *mass_y_p, *mass_y_n, *mass_b_p, *mass_b_n;
};

template <class F, bool contrast, bool two>
RF_INLINE void split(const Readers<F>& in, const Weights<F>& weights, int64_t n, const Split<F>& out) {
    const F* __restrict p = in.p, * __restrict d = in.d, * __restrict q = in.q, * __restrict e = in.e;
    F* __restrict x_p = out.x_p, * __restrict x_d = out.x_d, * __restrict b_p = out.b_p, * __restrict b_d = out.b_d;
    const F first_p = in.first_p, first_n = in.first_n, second_p = in.second_p, second_n = in.second_n;
    F sum_y_p = 0, sum_y_n = 0, sum_b_p = 0, sum_b_n = 0;
    RF_SIMD_SUM(sum_y_p, sum_y_n, sum_b_p, sum_b_n)
    for (int64_t i = 0; i < n; ++i) {
        const F of_p = two ? first_p * p[i] + second_p * q[i] : p[i];
        x_p[i] = weights.x[i] * of_p;
        b_p[i] = weights.b[i] * of_p;
        sum_y_p += weights.mass_y[i] * absolute(of_p);
        sum_b_p += weights.mass_b[i] * absolute(of_p);
        if (contrast) {
            const F of_d = two ? (first_n * d[i] + (first_p - first_n) * p[i]) +
                                     (second_n * e[i] + (second_p - second_n) * q[i])
                               : d[i];
            x_d[i] = weights.x[i] * of_d;
            b_d[i] = weights.b[i] * of_d;
            sum_y_n += weights.mass_y[i] * absolute(of_p - of_d);
            sum_b_n += weights.mass_b[i] * absolute(of_p - of_d);
        }
    }
    *out.mass_y_p += static_cast<double>(sum_y_p);
    *out.mass_b_p += static_cast<double>(sum_b_p);
    if (contrast) {
        *out.mass_y_n += static_cast<double>(sum_y_n);
        *out.mass_b_n += static_cast<double>(sum_b_n);
    }
}

template <class F, bool contrast, bool two>
void residual_chunk(int64_t index, const void* context, void*) {
    const Residual<F>& job = *static_cast<const Residual<F>*>(context);
    const ResidualArgs& args = job.args;
    const int64_t b = index / job.chunks;
    const int64_t begin = index % job.chunks * kChunk, end = min64(begin + kChunk, args.inner);
    double* sums = job.partials + index * 2 * args.rhs;
    for (int64_t t = 0; t < 2 * args.rhs; ++t) sums[t] = 0;
    F z_in[kBlock], b_in[kBlock], in[4][kBlock], out[4][kBlock];
    Weights<F> weights;
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t n = min64(kBlock, end - start), channel = job.channels.at(start);
        const F* z = load(args.z, b * args.inner + start, n, z_in);
        const F* other = load(args.b, b * args.inner + start, n, b_in);
        weigh(z, other, job.channels.size + channel, job.channels.shift + channel, n, weights);
        for (int64_t t = 0; t < job.groups; ++t) {
            const int64_t cell = t * args.batch + b, cell_d = cell + args.rhs / 2 * args.batch;
            const int64_t row = cell * args.inner + start, row_d = cell_d * args.inner + start;
            Readers<F> readers{};
            readers.p = load(args.first, row, n, in[0]);
            if (contrast) readers.d = load(args.first, row_d, n, in[1]);
            if (two) {
                readers.first_p = load_one<F>(args.first_scale, cell);
                readers.second_p = load_one<F>(args.second_scale, cell);
                readers.q = load(args.second, row, n, in[2]);
                if (contrast) {
                    readers.first_n = load_one<F>(args.first_scale, cell_d);
                    readers.second_n = load_one<F>(args.second_scale, cell_d);
                    readers.e = load(args.second, row_d, n, in[3]);
                }
            }
            Split<F> to{};
            to.x_p = target(args.c_x, row, out[0]);
            to.b_p = target(args.c_b, row, out[1]);
            to.mass_y_p = sums + t;
            to.mass_b_p = to.mass_y_p + args.rhs;
            if (contrast) {
                to.x_d = target(args.c_x, row_d, out[2]);
                to.b_d = target(args.c_b, row_d, out[3]);
                to.mass_y_n = to.mass_y_p + args.rhs / 2;
                to.mass_b_n = to.mass_b_p + args.rhs / 2;
            }
            split<F, contrast, two>(readers, weights, n, to);
            commit(args.c_x, row, n, out[0]);
            commit(args.c_b, row, n, out[1]);
            if (contrast) {
                commit(args.c_x, row_d, n, out[2]);
                commit(args.c_b, row_d, n, out[3]);
            }
        }
    }
}

template <class F>
void run(const ResidualArgs& args) {
    const int64_t chunks = ceil_div(args.inner, kChunk), tasks = args.batch * chunks;
    Partials partials(tasks * 2 * args.rhs), numbers(channel_numbers(args.channels));
    const Residual<F> job{args,
                          fill(args.gain, args.shift, args.channels, reinterpret_cast<F*>(numbers.data())),
                          chunks, args.contrast ? args.rhs / 2 : args.rhs, partials.data()};
    const bool two = args.second.data != nullptr;
    const Task task = args.contrast
                          ? (two ? residual_chunk<F, true, true> : residual_chunk<F, true, false>)
                          : (two ? residual_chunk<F, false, true> : residual_chunk<F, false, false>);
    parallel_for(tasks, args.rhs * args.batch * args.inner, args.threads, task, &job, 0);
    store_masses(args.mass_y, 0, args.rhs, args.batch, job.partials, chunks, 2 * args.rhs);
    store_masses(args.mass_b, 0, args.rhs, args.batch, job.partials + args.rhs, chunks, 2 * args.rhs);
}

}  // namespace

void residual_pullback(const ResidualArgs& args) {
    bool wide = false;
    for (const Operand* operand : {&args.first, &args.second, &args.z, &args.b, &args.first_scale,
                                   &args.second_scale, &args.gain, &args.shift})
        wide = wide || (operand->data != nullptr && operand->dtype == DType::f64);
    wide ? run<double>(args) : run<float>(args);
}

}  // namespace rf::RF_ISA
