// Elementwise pull-backs and the fused GELU.
#include "cpu/channels.h"

namespace rf::RF_ISA {
namespace {

struct Chunked {
    const void* args;
    int64_t size;  // elements or rows of one task
};

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
    const int64_t side = args.batch * args.inner, end = min64((index + 1) * kChunk, side);
    const bool pairs = args.n_scale.data != nullptr;
    const int64_t groups = pairs ? args.rhs / 2 : args.rhs;
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
            const int64_t row = t * side + start, row_d = row + groups * side;
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
    const int64_t side = args.batch * args.inner;
    Partials numbers(args.gain.data ? channel_numbers(args.channels) : 0);
    Scale<F> job{args, {}};
    if (args.gain.data)
        job.channels = fill(args.gain, args.shift, args.channels, reinterpret_cast<F*>(numbers.data()));
    parallel_for(ceil_div(side, kChunk), args.rhs * side, args.threads, scale_chunk<F>, &job, 0);
}

// What N of one pair of rows has to be multiplied by.
template <class F>
void centring_row(int64_t index, const void* context, void*) {
    const CentringArgs& args = *static_cast<const CentringArgs*>(context);
    const int64_t b = index % args.batch, row = index * args.inner;
    const int64_t row_d = row + args.rhs / 2 * args.batch * args.inner;
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
    // Not positive and finite, as it is stored: one of the two is zero here, or NaN.
    const double ratio = of_p / of_n;
    const double scale =
        args.out.dtype == DType::f64 ? ratio : static_cast<double>(static_cast<float>(ratio));
    store_one(args.out, index, scale > 0 && scale <= 1.7976931348623157e308 ? scale : 1);
}

// Rational minimax approximation on [-4, 4], where erf reaches 1 in float.
RF_INLINE float error_function(float x) {
    const float z = x < -4.0f ? -4.0f : (x > 4.0f ? 4.0f : x);
    const float s = z * z;
    float p = -2.72614225801306e-10f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s + -2.10102402082508e-06f;
    p = p * s + -5.69250639462346e-05f;
    p = p * s + -7.34990630326855e-04f;
    p = p * s + -2.95459980854025e-03f;
    p = p * s + -1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * s + -2.13374055278905e-04f;
    q = q * s + -1.68282697438203e-03f;
    q = q * s + -7.37332916720468e-03f;
    q = q * s + -1.42647390514189e-02f;
    return z * p / q;
}

RF_INLINE void gelu_erf(const float* __restrict x, int64_t n, float* __restrict y, float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float cumulative = 0.5f + 0.5f * error_function(x[i] * 0.70710678118654752f);
        const float density = 0.39894228040143268f * exponential(-0.5f * x[i] * x[i]);
        const float value = x[i] * cumulative;
        const float slope = 2.0f * (cumulative + x[i] * density);
        y[i] = value;
        factor[i] = value > 0.0f ? slope : 0.0f;
    }
}

RF_INLINE void gelu_tanh(const float* __restrict x, int64_t n, float* __restrict y,
                         float* __restrict factor) {
    // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    constexpr float scale = 1.5957691216057308f, cubic = 0.044715f;
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float square = x[i] * x[i];
        const float cumulative = 1.0f / (1.0f + exponential(-scale * x[i] * (1.0f + cubic * square)));
        const float inner_slope = scale * (1.0f + 3.0f * cubic * square);
        const float value = x[i] * cumulative;
        const float slope = 2.0f * (cumulative + x[i] * cumulative * (1.0f - cumulative) * inner_slope);
        y[i] = value;
        factor[i] = value > 0.0f ? slope : 0.0f;
    }
}

void gelu_chunk(int64_t index, const void* context, void*) {
    const GeluArgs& args = *static_cast<const GeluArgs*>(context);
    const int64_t end = min64((index + 1) * kChunk, args.inner);
    float in[kBlock], y_buffer[kBlock], factor_buffer[kBlock];
    for (int64_t start = index * kChunk; start < end; start += kBlock) {
        const int64_t n = min64(kBlock, end - start);
        const float* x = load(args.x, start, n, in);
        float* y = target(args.y, start, y_buffer);
        float* factor = target(args.factor, start, factor_buffer);
        if (args.tanh_approx)
            gelu_tanh(x, n, y, factor);
        else
            gelu_erf(x, n, y, factor);
        commit(args.y, start, n, y_buffer);
        commit(args.factor, start, n, factor_buffer);
    }
}

RF_INLINE void affine_span(const float* __restrict x, const float* __restrict gain,
                           const float* __restrict shift, int64_t n, bool relu, float cap,
                           float* __restrict y, float* __restrict factor) {
    if (relu) {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            const float z = gain[i] * x[i] + shift[i];
            const float cut = z > 0.0f ? (z < cap ? z : cap) : 0.0f;
            const float sign = (x[i] > 0.0f ? 1.0f : 0.0f) - (x[i] < 0.0f ? 1.0f : 0.0f);
            const float slope = 2.0f * (sign * gain[i] + absolute(gain[i]));
            y[i] = z != z ? z : cut;
            factor[i] = z > 0.0f ? slope : 0.0f;
        }
    } else {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            const float sign = (x[i] > 0.0f ? 1.0f : 0.0f) - (x[i] < 0.0f ? 1.0f : 0.0f);
            y[i] = gain[i] * x[i] + shift[i];
            factor[i] = sign * gain[i] + absolute(gain[i]);
        }
    }
}

// Channels innermost: `size` rows of all channels.
void affine_rows(int64_t index, const void* context, void*) {
    const Chunked& job = *static_cast<const Chunked*>(context);
    const AffineArgs& args = *static_cast<const AffineArgs*>(job.args);
    const float* gain = static_cast<const float*>(args.gain.data);
    const float* shift = static_cast<const float*>(args.shift.data);
    const int64_t end = min64((index + 1) * job.size, args.outer);
    float in[kBlock], y_buffer[kBlock], factor_buffer[kBlock];
    for (int64_t row = index * job.size; row < end; ++row) {
        for (int64_t start = 0; start < args.channels; start += kBlock) {
            const int64_t n = min64(kBlock, args.channels - start), offset = row * args.channels + start;
            float* y = target(args.y, offset, y_buffer);
            float* factor = target(args.factor, offset, factor_buffer);
            affine_span(load(args.x, offset, n, in), gain + start, shift + start, n, args.relu, args.cap, y,
                        factor);
            commit(args.y, offset, n, y_buffer);
            commit(args.factor, offset, n, factor_buffer);
        }
    }
}

// Channels outside: one channel of one sample.
void affine_plane(int64_t index, const void* context, void*) {
    const AffineArgs& args = *static_cast<const AffineArgs*>(context);
    const int64_t channel = index % args.channels;
    float in[kBlock], y_buffer[kBlock], factor_buffer[kBlock], gain[kBlock], shift[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
        gain[i] = static_cast<const float*>(args.gain.data)[channel];
        shift[i] = static_cast<const float*>(args.shift.data)[channel];
    }
    for (int64_t start = 0; start < args.inner; start += kBlock) {
        const int64_t n = min64(kBlock, args.inner - start), offset = index * args.inner + start;
        float* y = target(args.y, offset, y_buffer);
        float* factor = target(args.factor, offset, factor_buffer);
        affine_span(load(args.x, offset, n, in), gain, shift, n, args.relu, args.cap, y, factor);
        commit(args.y, offset, n, y_buffer);
        commit(args.factor, offset, n, factor_buffer);
    }
}

}  // namespace

void affine_factor(const AffineArgs& args) {
    const int64_t work = args.outer * args.channels * args.inner;
    if (args.inner == 1) {
        const int64_t rows = args.channels >= kChunk ? 1 : kChunk / (args.channels > 0 ? args.channels : 1);
        const Chunked job{&args, rows};
        parallel_for(ceil_div(args.outer, rows), work, args.threads, affine_rows, &job, 0);
    } else {
        parallel_for(args.outer * args.channels, work, args.threads, affine_plane, &args, 0);
    }
}

void scale_by(const ScaleArgs& args) {
    const bool wide = any_double(args.c, args.factor, args.n_scale, args.gain, args.shift);
    wide ? run_scale<double>(args) : run_scale<float>(args);
}

void centring(const CentringArgs& args) {
    const bool wide = any_double(args.c, args.factor, args.gain, args.shift);
    const int64_t looked_at = args.runs ? args.runs * kCentringRun : args.inner;
    parallel_for(args.rhs / 2 * args.batch, args.rhs * args.batch * looked_at, args.threads,
                 wide ? centring_row<double> : centring_row<float>, &args, 0);
}

void gelu_factor(const GeluArgs& args) {
    parallel_for(ceil_div(args.inner, kChunk), args.inner, args.threads, gelu_chunk, &args, 0);
}

}  // namespace rf::RF_ISA
