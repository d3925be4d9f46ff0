// The order in which scores are masked: floating-point numbers as unsigned integers, the same on every
// device. Smaller keys are masked first; of equal keys the entry with the lower index.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RF_HOST_DEVICE inline __attribute__((always_inline))
#endif

// One namespace per instruction set where the kernels have one (cpu/block.h says why).
#ifdef RF_ISA
namespace rf::RF_ISA {
#else
namespace rf {
#endif
namespace {

template <class F>
struct KeyOf;
template <>
struct KeyOf<float> {
    using type = std::uint32_t;
    static constexpr type infinity = 0x7f800000u;
};
template <>
struct KeyOf<double> {
    using type = std::uint64_t;
    static constexpr type infinity = 0x7ff0000000000000ull;
};

// From the bits of a float or double. The two zeros are equal, and NaN comes after everything else in both
// orders: a score that is not a number is never taken for an important one, nor for an unimportant one.
template <class F>
RF_HOST_DEVICE typename KeyOf<F>::type ordered_key(typename KeyOf<F>::type bits, bool descending) {
    using Key = typename KeyOf<F>::type;
    constexpr Key top = Key(1) << (8 * sizeof(Key) - 1), ones = ~Key(0);
    const Key magnitude = bits & ~top;
    const Key ascending = magnitude == 0 ? top : (bits & top) ? ~bits : bits | top;
    return magnitude > KeyOf<F>::infinity ? ones : descending ? ~ascending : ascending;
}

}  // namespace
}
