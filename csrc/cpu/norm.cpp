// LayerNorm's pull-back, alone or after choosing between the two halves of a linear layer's pull-back.
#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

template <class F>
struct Statistics {
    F mean;
    F inverse;           // 1 / sigma(x); 0 where sigma is 0
    F inverse_absolute;  // 1 / sigma(|x|)
};

template <class F>
RF_INLINE F inverse_sigma(double sum_of_squares, int64_t width, double eps) {
    const F sigma = square_root(static_cast<F>(sum_of_squares / static_cast<double>(width) + eps));
    return sigma > 0 ? F(1) / sigma : F(0);
}

// Two passes: means, then centred squares.
template <class F>
RF_INLINE Statistics<F> row_statistics(const F* __restrict x, int64_t width, double eps) {
    double sum = 0, sum_absolute = 0;
    for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t n = min64(kBlock, width - start);
        F s = 0, sa = 0;
        RF_SIMD_SUM(s, sa)
        for (int64_t i = 0; i < n; ++i) {
            s += x[start + i];
            sa += absolute(x[start + i]);
        }
        sum += static_cast<double>(s);
        sum_absolute += static_cast<double>(sa);
    }
    const F mean = static_cast<F>(sum / static_cast<double>(width));
    const F mean_absolute = static_cast<F>(sum_absolute / static_cast<double>(width));
    double squares = 0, squares_absolute = 0;
    for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t n = min64(kBlock, width - start);
        F s = 0, sa = 0;
        RF_SIMD_SUM(s, sa)
        for (int64_t i = 0; i < n; ++i) {
            const F centred = x[start + i] - mean;
            const F centred_absolute = absolute(x[start + i]) - mean_absolute;
            s += centred * centred;
            sa += centred_absolute * centred_absolute;
        }
        squares += static_cast<double>(s);
        squares_absolute += static_cast<double>(sa);
    }
    return {mean, inverse_sigma<F>(squares, width, eps), inverse_sigma<F>(squares_absolute, width, eps)};
}

// factor = sign(x) w / sigma(x) + |w| / sigma(|x|)
template <class F>
RF_INLINE void row_factor(const F* __restrict x, const F* __restrict weight, const Statistics<F>& s,
                          int64_t width, F* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < width; ++i) {
        const F w = weight[i];
        const F signed_part = w * s.inverse;
        const F upper = x[i] > 0 ? signed_part : F(0);
        const F lower = x[i] < 0 ? signed_part : F(0);
        factor[i] = upper - lower + absolute(w) * s.inverse_absolute;
    }
}

struct Norm {
    const NormArgs& args;
    int64_t rows_per_chunk;
    int64_t chunks;      // of one sample
    const void* weight;  // [width] as F
    const void* bias;    // [width] as F
    double* partials;    // [B, chunks, T]
};

template <class F, bool contrast>
RF_INLINE void add_mass(const NormArgs& args, const F* __restrict x, const F* __restrict p,
                        const F* __restrict d, int64_t t, double* sums) {
    for (int64_t start = 0; start < args.width; start += kBlock) {
        const int64_t n = min64(kBlock, args.width - start);
        F sum_p = 0, sum_n = 0;
        RF_SIMD_SUM(sum_p, sum_n)
        for (int64_t i = start; i < start + n; ++i) {
            const F magnitude = absolute(x[i]);
            sum_p += magnitude * absolute(p[i]);
            if (contrast) sum_n += magnitude * absolute(p[i] - d[i]);
        }
        sums[t] += static_cast<double>(sum_p);
        if (contrast) sums[t + args.rhs / 2] += static_cast<double>(sum_n);
    }
}

// out = factor c; with `select` c is 2 (upper half where gate > 0, lower half where gate < 0)
template <class F>
RF_INLINE void pull_row(const NormArgs& args, int64_t row, const F* __restrict factor,
                        const F* __restrict gate, F* __restrict in, F* __restrict out) {
    if (args.select) {
        const F* __restrict c = load(args.c, row * 2 * args.width, 2 * args.width, in);
        const F* __restrict lower = c + args.width;
        RF_SIMD
        for (int64_t i = 0; i < args.width; ++i) {
            const F up = gate[i] > 0 ? c[i] : F(0);
            const F low = gate[i] < 0 ? lower[i] : F(0);
            out[i] = F(2) * factor[i] * (up + low);
        }
    } else {
        const F* __restrict c = load(args.c, row * args.width, args.width, in);
        RF_SIMD
        for (int64_t i = 0; i < args.width; ++i) out[i] = factor[i] * c[i];
    }
}

template <class F>
void norm_chunk(int64_t index, const void* context, void* scratch) {
    const Norm& job = *static_cast<const Norm*>(context);
    const NormArgs& args = job.args;
    const int64_t width = args.width;
    const int64_t b = index / job.chunks;
    const int64_t begin = index % job.chunks * job.rows_per_chunk;
    const int64_t end = min64(begin + job.rows_per_chunk, args.rows);
    double* sums = job.partials + index * args.rhs;
    for (int64_t t = 0; t < args.rhs; ++t) sums[t] = 0;

    F* buffers = static_cast<F*>(scratch);  // [7, width]
    F *x_buffer = buffers, *factor = buffers + width, *gate = buffers + 2 * width, *in = buffers + 3 * width;
    F *buffer_p = buffers + 5 * width, *buffer_d = buffers + 6 * width;
    const F* __restrict weight = static_cast<const F*>(job.weight);
    const F* __restrict bias = static_cast<const F*>(job.bias);
    const int64_t groups = args.contrast ? args.rhs / 2 : args.rhs;

    for (int64_t row = begin; row < end; ++row) {
        const int64_t x_row = b * args.rows + row;
        const F* __restrict x = load(args.x, x_row * width, width, x_buffer);
        const Statistics<F> s = row_statistics(x, width, args.eps);
        row_factor(x, weight, s, width, factor);
        if (args.select) {
            RF_SIMD
            for (int64_t i = 0; i < width; ++i) gate[i] = (x[i] - s.mean) * s.inverse * weight[i] + bias[i];
        }
        for (int64_t t = 0; t < groups; ++t) {
            const int64_t row_p = (t * args.batch + b) * args.rows + row;
            F* p = target(args.out, row_p * width, buffer_p);
            pull_row(args, row_p, factor, gate, in, p);
            commit(args.out, row_p * width, width, buffer_p);
            if (args.contrast) {
                const int64_t row_d = row_p + args.rhs / 2 * args.batch * args.rows;
                F* d = target(args.out, row_d * width, buffer_d);
                pull_row(args, row_d, factor, gate, in, d);
                commit(args.out, row_d * width, width, buffer_d);
                if (args.mass.data) add_mass<F, true>(args, x, p, d, t, sums);
            } else if (args.mass.data) {
                add_mass<F, false>(args, x, p, nullptr, t, sums);
            }
        }
    }
}

template <class F>
void run(const NormArgs& args) {
    const int64_t rows_per_chunk = args.width >= kChunk ? 1 : kChunk / (args.width > 0 ? args.width : 1);
    const int64_t chunks = ceil_div(args.rows, rows_per_chunk);
    const int64_t tasks = args.batch * chunks;
    Partials partials(tasks * args.rhs);
    const int64_t doubles = 2 * args.width * static_cast<int64_t>(sizeof(F)) / 8 + 1;
    Partials parameters(doubles);
    F* weight = reinterpret_cast<F*>(parameters.data());
    F* bias = weight + args.width;
    for (int64_t i = 0; i < args.width; ++i) {
        weight[i] = args.weight.data ? load_one<F>(args.weight, i) : F(1);
        bias[i] = args.bias.data ? load_one<F>(args.bias, i) : F(0);
    }
    const Norm job{args, rows_per_chunk, chunks, weight, bias, partials.data()};
    parallel_for(tasks, args.rhs * args.batch * args.rows * args.width, args.threads, norm_chunk<F>, &job,
                 7 * static_cast<std::size_t>(args.width) * sizeof(F));
    if (args.mass.data == nullptr) return;
    for (int64_t t = 0; t < args.rhs; ++t)
        for (int64_t b = 0; b < args.batch; ++b) {
            double sum = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                sum += partials.data()[(b * chunks + chunk) * args.rhs + t];
            store_one(args.mass, t * args.batch + b, sum);
        }
}

}  // namespace

void norm_pullback(const NormArgs& args) {
    if (args.c.dtype == DType::f64 || args.x.dtype == DType::f64)
        run<double>(args);
    else
        run<float>(args);
}

}  // namespace rf::RF_ISA
