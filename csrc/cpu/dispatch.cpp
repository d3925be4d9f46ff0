#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

namespace rf {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};
constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512bf16};  // slowest first

bool runs_here(Isa isa) {
#ifdef RF_HAVE_AVX2
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx512) return avx512;
#endif
#ifdef RF_HAVE_AVX512BF16
    if (isa == Isa::avx512bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return isa == Isa::generic;
}

Isa best() {
    Isa fastest = Isa::generic;
    for (Isa isa : kIsas)
        if (runs_here(isa)) fastest = isa;
    return fastest;
}

std::atomic<Isa> active{best()};

}  // namespace

Isa current_isa() {
    return active.load(std::memory_order_relaxed);
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (Isa isa : kIsas)
        if (runs_here(isa)) names.emplace_back(kNames[static_cast<int>(isa)]);
    return names;
}

std::string active_isa() {
    return kNames[static_cast<int>(current_isa())];
}

void set_isa(const std::string& name) {
    for (Isa isa : kIsas)
        if (name == kNames[static_cast<int>(isa)] && runs_here(isa)) {
            active = isa;
            return;
        }
    std::string supported;
    for (const std::string& isa : supported_isas()) supported += (supported.empty() ? "" : ", ") + isa;
    throw std::invalid_argument("instruction set '" + name +
                                "' is unknown or does not run on this processor; " +
                                "supported here: " + supported);
}

}  // namespace rf
