// Vectors of 16 floats that are read and written as float or bfloat16 in the loop that computes with them.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

// One element, or a vector of floats with its lanes.
using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;
using Bits = std::uint32_t __attribute__((vector_size(64)));
using Halves = std::uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

template <class V>
RF_INLINE V read(const Operand& source, int64_t index) {
    if constexpr (sizeof(V) == sizeof(Lanes)) {
        if (source.dtype == DType::f32)
            return *reinterpret_cast<const Lanes*>(static_cast<const float*>(source.data) + index);
        const Halves halves =
            *reinterpret_cast<const Halves*>(static_cast<const std::uint16_t*>(source.data) + index);
#ifdef __AVX512F__  // GCC 12 makes six of the one instruction
        return bits_of<Lanes>(bits_of<Bits>(_mm512_cvtepu16_epi32(bits_of<__m256i>(halves))) << 16);
#else
        return bits_of<Lanes>(__builtin_convertvector(halves, Bits) << 16);
#endif
    } else {
        return load_one<V>(source, index);
    }
}

RF_INLINE Halves rounded(Lanes value) {
#ifdef __AVX512BF16__  // subnormal numbers become 0
    return bits_of<Halves>(_mm512_cvtneps_pbh(bits_of<__m512>(value)));
#else
    const Bits bits = bits_of<Bits>(value);
    const Bits nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits chosen = (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : nearest;
    return __builtin_convertvector(chosen, Halves);
#endif
}

#ifdef __AVX512F__
// By a streaming store, to an aligned address.
RF_INLINE void store_streaming(const Operand& out, int64_t index, Lanes value) {
    if (out.dtype == DType::f32)
        _mm512_stream_ps(static_cast<float*>(out.data) + index, bits_of<__m512>(value));
    else
        _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<std::uint16_t*>(out.data) + index),
                            bits_of<__m256i>(rounded(value)));
}
#endif

template <class V>
RF_INLINE void write(const Operand& out, int64_t index, V value, [[maybe_unused]] bool stream) {
    if constexpr (sizeof(V) == sizeof(Lanes)) {
#ifdef __AVX512F__
        if (stream) return store_streaming(out, index, value);
#endif
        if (out.dtype == DType::f32) {
            *reinterpret_cast<Lanes*>(static_cast<float*>(out.data) + index) = value;
            return;
        }
        *reinterpret_cast<Halves*>(static_cast<std::uint16_t*>(out.data) + index) = rounded(value);
    } else {
        commit(out, index, 1, &value);
        if (out.dtype == TypeOf<V>::value) static_cast<V*>(out.data)[index] = value;
    }
}

template <class V>
RF_INLINE V magnitude(V x) {
    if constexpr (sizeof(V) == sizeof(Lanes))
        return bits_of<V>(bits_of<Bits>(x) & 0x7fffffffu);
    else
        return absolute(x);
}

using EightLanes = float __attribute__((vector_size(32)));
using FourLanes = float __attribute__((vector_size(16)));

// By halves: one after another, sixteen lanes would wait for each other.
template <class F, class V>
RF_INLINE F total(V sums) {
    if constexpr (sizeof(V) == sizeof(Lanes)) {
        const EightLanes eight = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7) +
                                 __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15);
        const FourLanes four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                               __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
        return (four[0] + four[2]) + (four[1] + four[3]);
    } else {
        return sums;
    }
}

// A sum of vectors and of single numbers.
template <class F>
struct Sum {
    Lanes lanes{};
    F rest{};
    RF_INLINE void add(Lanes value) { lanes += value; }
    RF_INLINE void add(F value) { rest += value; }
    RF_INLINE double value() const {
        return static_cast<double>(total<float, Lanes>(lanes)) + static_cast<double>(rest);
    }
};

template <>
struct Sum<double> {
    double rest{};
    RF_INLINE void add(double value) { rest += value; }
    RF_INLINE double value() const { return rest; }
};

}  // namespace
}  // namespace rf::RF_ISA
