// Activations and BatchNorm with the factors of their pull-backs, in one pass.
#include "cpu/channels.h"

namespace rf::RF_ISA {
namespace {

struct Chunked {
    const void* args;
    int64_t size;  // elements or rows of one task
};

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

RF_INLINE float normal_cumulative(float x) {
    return 0.5f + 0.5f * error_function(x * 0.70710678118654752f);
}

// Nothing below -87, where exponential goes no further: the product with minus infinity is NaN, as PyTorch's
// is.
RF_INLINE float logistic(float x) {
    return x < -87.0f ? 0.0f : 1.0f / (1.0f + exponential(-x));
}

// (x + 3) / 6, from 0 to 1; NaN stays.
RF_INLINE float hard_logistic(float x) {
    const float raised = x + 3.0f;
    return (raised < 0.0f ? 0.0f : (raised > 6.0f ? 6.0f : raised)) * (1.0f / 6.0f);
}

// (1 + tanh(u)) / 2 is the logistic function of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float kTanhScale = 1.5957691216057308f, kTanhCubic = 0.044715f;

// The slope of GELU is 1 from here on. In the products below infinity, or the square of a large number, would
// meet a zero, and give NaN.
constexpr float kSaturated = 30.0f;

RF_INLINE void gelu_erf(const float* __restrict x, int64_t n, float* __restrict y, float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float cumulative = normal_cumulative(x[i]);
        const float z = x[i] > kSaturated ? kSaturated : x[i];
        const float density = 0.39894228040143268f * exponential(-0.5f * z * z);
        const float value = x[i] * cumulative;
        const float slope = 2.0f * (cumulative + z * density);
        y[i] = value;
        factor[i] = value > 0.0f ? slope : 0.0f;
    }
}

RF_INLINE void gelu_tanh(const float* __restrict x, int64_t n, float* __restrict y,
                         float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float cumulative = logistic(kTanhScale * x[i] * (1.0f + kTanhCubic * (x[i] * x[i])));
        const float z = x[i] > kSaturated ? kSaturated : x[i];
        const float square = z * z;
        const float inner_slope = kTanhScale * (1.0f + 3.0f * kTanhCubic * square);
        const float value = x[i] * cumulative;
        const float slope = 2.0f * (cumulative + z * cumulative * (1.0f - cumulative) * inner_slope);
        y[i] = value;
        factor[i] = value > 0.0f ? slope : 0.0f;
    }
}

RF_INLINE void silu(const float* __restrict x, int64_t n, float* __restrict y, float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float falling = exponential(-x[i]), rising = 1.0f / (1.0f + falling);
        const float share = x[i] < -87.0f ? 0.0f : rising;
        // Where nothing is left of it x may be infinite.
        const float rest = x[i] < 87.0f ? x[i] * falling * share : 0.0f;
        const float slope = 2.0f * share * (1.0f + rest);
        y[i] = x[i] * share;
        factor[i] = x[i] > 0.0f ? slope : 0.0f;
    }
}

RF_INLINE void hardswish(const float* __restrict x, int64_t n, float* __restrict y,
                         float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float slope = x[i] < 3.0f ? x[i] * (2.0f / 3.0f) + 1.0f : 2.0f;
        y[i] = x[i] * hard_logistic(x[i]);
        factor[i] = x[i] > 0.0f ? slope : 0.0f;
    }
}

// Slopes at x and -x are the same: nothing is left below zero, and half of it at zero.
RF_INLINE float twice_above(float x) {
    return x > 0.0f ? 2.0f : (x == 0.0f ? 1.0f : 0.0f);
}

RF_INLINE void sigmoid(const float* __restrict x, int64_t n, float* __restrict y, float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float value = logistic(x[i]);
        y[i] = value;
        factor[i] = twice_above(x[i]) * value * logistic(-x[i]);
    }
}

RF_INLINE void hardsigmoid(const float* __restrict x, int64_t n, float* __restrict y,
                           float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        y[i] = hard_logistic(x[i]);
        factor[i] = x[i] < 3.0f ? twice_above(x[i]) * (1.0f / 6.0f) : 0.0f;
    }
}

template <Activation function>
RF_INLINE void factor_span(const float* __restrict x, int64_t n, float* __restrict y,
                           float* __restrict factor) {
    if constexpr (function == Activation::gelu)
        gelu_erf(x, n, y, factor);
    else if constexpr (function == Activation::gelu_tanh)
        gelu_tanh(x, n, y, factor);
    else if constexpr (function == Activation::silu)
        silu(x, n, y, factor);
    else if constexpr (function == Activation::hardswish)
        hardswish(x, n, y, factor);
    else if constexpr (function == Activation::sigmoid)
        sigmoid(x, n, y, factor);
    else
        hardsigmoid(x, n, y, factor);
}

struct Factor {
    const FactorArgs& args;
    Channels<float> channels;  // with gain and shift
};

template <Activation function>
void factor_chunk(int64_t index, const void* context, void*) {
    const Factor& job = *static_cast<const Factor*>(context);
    const FactorArgs& args = job.args;
    const int64_t end = min64((index + 1) * kChunk, args.inner);
    float in[kBlock], y_buffer[kBlock], factor_buffer[kBlock], affine[kBlock];
    for (int64_t start = index * kChunk; start < end; start += kBlock) {
        const int64_t n = min64(kBlock, end - start);
        const float* x = load(args.x, start, n, in);
        float* factor = args.factor.data ? target(args.factor, start, factor_buffer) : factor_buffer;
        factor_span<function>(x, n, target(args.y, start, y_buffer), factor);
        commit(args.y, start, n, y_buffer);
        if (!args.factor.data) continue;
        if (args.gain.data) {
            const int64_t channel = job.channels.at(start);
            affine_factors(x, job.channels.size + channel, job.channels.shift + channel, n, false, affine);
            RF_SIMD
            for (int64_t i = 0; i < n; ++i) factor[i] *= affine[i];
        }
        commit(args.factor, start, n, factor_buffer);
    }
}

Task factor_task(Activation function) {
    switch (function) {
        case Activation::gelu:
            return factor_chunk<Activation::gelu>;
        case Activation::gelu_tanh:
            return factor_chunk<Activation::gelu_tanh>;
        case Activation::silu:
            return factor_chunk<Activation::silu>;
        case Activation::hardswish:
            return factor_chunk<Activation::hardswish>;
        case Activation::sigmoid:
            return factor_chunk<Activation::sigmoid>;
        default:
            return factor_chunk<Activation::hardsigmoid>;
    }
}

// f(x) / x
template <Activation function>
RF_INLINE float share_of(float x) {
    if constexpr (function == Activation::gelu) return normal_cumulative(x);
    if constexpr (function == Activation::silu) return logistic(x);
    if constexpr (function == Activation::gelu_tanh)
        return logistic(kTanhScale * x * (1.0f + kTanhCubic * x * x));
    return hard_logistic(x);
}

template <Activation function>
RF_INLINE void share_span(const float* __restrict x, int64_t n, float* __restrict y,
                          float* __restrict factor) {
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) {
        const float share = share_of<function>(x[i]);
        y[i] = x[i] * share;
        factor[i] = x[i] == 0.0f ? 0.0f : share;
    }
}

template <Activation function>
void share_chunk(int64_t index, const void* context, void*) {
    const ShareArgs& args = *static_cast<const ShareArgs*>(context);
    const int64_t end = min64((index + 1) * kChunk, args.inner);
    float in[kBlock], y_buffer[kBlock], factor_buffer[kBlock];
    for (int64_t start = index * kChunk; start < end; start += kBlock) {
        const int64_t n = min64(kBlock, end - start);
        share_span<function>(load(args.x, start, n, in), n, target(args.y, start, y_buffer),
                             target(args.factor, start, factor_buffer));
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
        const int64_t rows = rows_of_task(args.channels);
        const Chunked job{&args, rows};
        parallel_for(ceil_div(args.outer, rows), work, args.threads, affine_rows, &job, 0);
    } else {
        parallel_for(args.outer * args.channels, work, args.threads, affine_plane, &args, 0);
    }
}

void activation_factor(const FactorArgs& args) {
    Partials numbers(args.gain.data ? channel_numbers(args.channels) : 0);
    Factor job{args, {}};
    if (args.gain.data)
        job.channels = fill(args.gain, args.shift, args.channels, reinterpret_cast<float*>(numbers.data()));
    parallel_for(ceil_div(args.inner, kChunk), args.inner, args.threads, factor_task(args.function), &job, 0);
}

void activation_share(const ShareArgs& args) {
    const Task task = args.function == Activation::gelu        ? share_chunk<Activation::gelu>
                      : args.function == Activation::gelu_tanh ? share_chunk<Activation::gelu_tanh>
                      : args.function == Activation::silu      ? share_chunk<Activation::silu>
                                                               : share_chunk<Activation::hardswish>;
    parallel_for(ceil_div(args.inner, kChunk), args.inner, args.threads, task, &args, 0);
}

}  // namespace rf::RF_ISA
