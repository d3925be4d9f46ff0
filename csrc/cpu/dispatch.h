// Run-time choice of the instruction set.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace rf {

enum class Isa { generic, avx2, avx512, avx512bf16, amx };

// Those compiled in that this processor runs, slowest first.
std::vector<std::string> supported_isas();
std::string active_isa();
// Throws std::invalid_argument for a name that is unknown or does not run here.
void set_isa(const std::string& name);

Isa current_isa();

}  // namespace rf

#ifdef RF_HAVE_AVX2
#define RF_CALL(kernel, args)          \
    switch (rf::current_isa()) {       \
        case rf::Isa::amx:             \
        case rf::Isa::avx512bf16:      \
        case rf::Isa::avx512:          \
            rf::avx512::kernel(args);  \
            break;                     \
        case rf::Isa::avx2:            \
            rf::avx2::kernel(args);    \
            break;                     \
        case rf::Isa::generic:         \
            rf::generic::kernel(args); \
            break;                     \
    }
#else
#define RF_CALL(kernel, args) rf::generic::kernel(args)
#endif

// For kernels that multiply bfloat16.
#ifdef RF_HAVE_AVX512BF16
#define RF_CALL_VECTORS(kernel, args)               \
    if (rf::current_isa() == rf::Isa::avx512bf16) { \
        rf::avx512bf16::kernel(args);               \
    } else {                                        \
        RF_CALL(kernel, args);                      \
    }
#else
#define RF_CALL_VECTORS(kernel, args) RF_CALL(kernel, args)
#endif
// For those that only convert to it, with AMX as without.
#ifdef RF_HAVE_AVX512BF16
#define RF_CALL_ROUNDING(kernel, args)              \
    if (rf::current_isa() >= rf::Isa::avx512bf16) { \
        rf::avx512bf16::kernel(args);               \
    } else {                                        \
        RF_CALL(kernel, args);                      \
    }
#else
#define RF_CALL_ROUNDING(kernel, args) RF_CALL(kernel, args)
#endif
#ifdef RF_HAVE_AMX
#define RF_CALL_BF16(kernel, args)           \
    if (rf::current_isa() == rf::Isa::amx) { \
        rf::amx::kernel(args);               \
    } else {                                 \
        RF_CALL_VECTORS(kernel, args);       \
    }
#else
#define RF_CALL_BF16(kernel, args) RF_CALL_VECTORS(kernel, args)
#endif
