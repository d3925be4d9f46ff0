// Loads, stores and elementary functions of the kernels. Included by sources that are compiled once per
// instruction set: everything sits in an unnamed namespace and no standard header with inline functions is
// used, so that the linker can never pick an AVX-512 copy of a shared function for an older processor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

#define RF_INLINE inline __attribute__((always_inline))
#define RF_SIMD _Pragma("omp simd")
#define RF_PRAGMA(text) _Pragma(#text)
#define RF_SIMD_SUM(...) RF_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define RF_SIMD_MAX(...) RF_PRAGMA(omp simd reduction(max : __VA_ARGS__))

namespace rf::RF_ISA {
namespace {

using std::int64_t;

// Elements handled at a time: a dozen float buffers of this size stay in a 32 KB or 48 KB L1 cache.
constexpr int64_t kBlock = 512;
// Of a vector register.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Elements of one parallel task, and of one partial sum.
constexpr int64_t kChunk = 8192;

RF_INLINE int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

RF_INLINE int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// How many rows of `width` elements one task takes: this depends on neither threads nor the batch.
RF_INLINE int64_t rows_of_task(int64_t width) {
    return width >= kChunk ? 1 : kChunk / (width > 0 ? width : 1);
}

// Where a row [t, b, h, n] begins.
RF_INLINE int64_t offset(const StridedOperand& x, int64_t t, int64_t b, int64_t h, int64_t n) {
    return t * x.strides[0] + b * x.strides[1] + h * x.strides[2] + n * x.strides[3];
}

RF_INLINE float absolute(float x) {
    return __builtin_fabsf(x);
}
RF_INLINE double absolute(double x) {
    return __builtin_fabs(x);
}
RF_INLINE float square_root(float x) {
    return __builtin_sqrtf(x);
}
RF_INLINE double square_root(double x) {
    return __builtin_sqrt(x);
}

template <class To, class From>
RF_INLINE To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    __builtin_memcpy(&result, &value, sizeof(To));
    return result;
}

RF_INLINE float from_bf16(std::uint16_t value) {
    return bits_of<float>(static_cast<std::uint32_t>(value) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
RF_INLINE std::uint16_t to_bf16(float value) {
    const std::uint32_t bits = bits_of<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <class F>
struct TypeOf;
template <>
struct TypeOf<float> {
    static constexpr DType value = DType::f32;
};
template <>
struct TypeOf<double> {
    static constexpr DType value = DType::f64;
};

// Whether arithmetic is in double.
template <class... Operands>
bool any_double(const Operands&... operands) {
    return ((operands.data != nullptr && operands.dtype == DType::f64) || ...);
}

// `count` elements of `source` from `offset` on, as F: in place, or converted into `buffer`.
template <class F>
RF_INLINE const F* load(const Operand& source, int64_t offset, int64_t count, F* __restrict buffer) {
    if (source.dtype == TypeOf<F>::value) return static_cast<const F*>(source.data) + offset;
    if (source.dtype == DType::bf16) {
        const std::uint16_t* __restrict in = static_cast<const std::uint16_t*>(source.data) + offset;
        RF_SIMD
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<F>(from_bf16(in[i]));
    } else if (source.dtype == DType::f32) {
        const float* __restrict in = static_cast<const float*>(source.data) + offset;
        RF_SIMD
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<F>(in[i]);
    } else {
        const double* __restrict in = static_cast<const double*>(source.data) + offset;
        RF_SIMD
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<F>(in[i]);
    }
    return buffer;
}

// Prefetches `count` elements. Where blocks are read from several arrays in turn, each is too short for the
// hardware prefetcher.
RF_INLINE void fetch(const Operand& source, int64_t offset, int64_t count) {
    const int64_t item = item_size(source.dtype);
    const char* const from = static_cast<const char*>(source.data) + offset * item;
    for (int64_t at = 0; at < count * item; at += 64) __builtin_prefetch(from + at);
}

// As `load`, and prefetches as many elements behind them.
template <class F>
RF_INLINE const F* load_ahead(const Operand& source, int64_t offset, int64_t count, F* __restrict buffer) {
    fetch(source, offset + count, count);
    return load(source, offset, count, buffer);
}

// Where to write `count` elements of type F of `target`: in place, or into `buffer`, to be committed.
template <class F>
RF_INLINE F* target(const Operand& out, int64_t offset, F* buffer) {
    return out.dtype == TypeOf<F>::value ? static_cast<F*>(out.data) + offset : buffer;
}

template <class F>
RF_INLINE void commit(const Operand& out, int64_t offset, int64_t count, const F* __restrict buffer) {
    if (out.dtype == TypeOf<F>::value) return;
    if (out.dtype == DType::bf16) {
        std::uint16_t* __restrict to = static_cast<std::uint16_t*>(out.data) + offset;
        RF_SIMD
        for (int64_t i = 0; i < count; ++i) to[i] = to_bf16(static_cast<float>(buffer[i]));
    } else if (out.dtype == DType::f32) {
        float* __restrict to = static_cast<float*>(out.data) + offset;
        RF_SIMD
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(buffer[i]);
    } else {
        double* __restrict to = static_cast<double*>(out.data) + offset;
        RF_SIMD
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(buffer[i]);
    }
}

template <class F>
RF_INLINE F load_one(const Operand& source, int64_t index) {
    F buffer;
    return *load(source, index, 1, &buffer);
}

// Writes a mass, which is float or double.
RF_INLINE void store_one(const Operand& out, int64_t index, double value) {
    if (out.dtype == DType::f64)
        static_cast<double*>(out.data)[index] = value;
    else
        static_cast<float*>(out.data)[index] = static_cast<float>(value);
}

// exp with a relative error below 1e-7 (Cephes' polynomial); 0 below the smallest normal number, -inf
// included; NaN stays NaN.
RF_INLINE float exponential(float x) {
    const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
    const float shifted =
        clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = (p * r) * r + r + 1.0f;
    const float result = bits_of<float>(bits_of<std::uint32_t>(y) + (bits_of<std::uint32_t>(shifted) << 23));
    return x < -87.3f ? 0.0f : (x == x ? result : x);
}
RF_INLINE double exponential(double x) {
    return __builtin_exp(x);
}

}  // namespace
}  // namespace rf::RF_ISA
