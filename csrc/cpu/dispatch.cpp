#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>
#ifdef RF_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rf {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx};  // slowest first

#ifdef RF_HAVE_AMX
// Linux gives a process the tile registers (8 KB a thread) when it asks for them.
bool has_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, bytes
    if ((d & kNeeded) != kNeeded) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

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
    const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (isa == Isa::avx512bf16) return avx512bf16;
#endif
#ifdef RF_HAVE_AMX
    if (isa == Isa::amx) return avx512bf16 && has_tiles();
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
