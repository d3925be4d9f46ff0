#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#ifndef _WIN32
#include <dlfcn.h>
#endif
#ifdef RF_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

namespace rf {
namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
using ThreadNumber = int (*)();

GompParallel gomp_parallel = nullptr;
ThreadNumber thread_number = nullptr;

std::atomic<bool> poisons_scratch{false};

constexpr std::size_t kAlignment = 64;

// Elements that are worth waking a thread for; PyTorch's own grain.
constexpr std::int64_t kGrain = 32768;

struct AlignedDelete {
    void operator()(char* pointer) const { ::operator delete(pointer, std::align_val_t(kAlignment)); }
};

// What one thread starts with. A cache line each, since every task writes to it.
struct alignas(kAlignment) Range {
    std::atomic<std::int64_t> next;
    std::int64_t end;
};

struct Loop {
    Task task;
    const void* context;
    char* scratch;
    std::size_t scratch_bytes, scratch_stride;
    bool poison;
    Range* ranges;
    int threads;
    std::atomic<int> entered{0};
};

// A thread begins with its own range, the same one in every call: its caches and TLB hold what it has read
// there before. Then it takes tasks of the others. Each task writes its own outputs, so the order of the
// tasks does not matter.
void run(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    const int slot = loop.entered.fetch_add(1, std::memory_order_relaxed);
    char* scratch = loop.scratch + loop.scratch_stride * slot;
    // Which range it begins with is a matter of speed alone: any number would do.
    const unsigned self = loop.threads == 1 ? 0 : static_cast<unsigned>(thread_number());
    for (int turn = 0; turn < loop.threads; ++turn) {
        Range& range = loop.ranges[(self + turn) % loop.threads];
        while (range.next.load(std::memory_order_relaxed) < range.end) {
            const std::int64_t index = range.next.fetch_add(1, std::memory_order_relaxed);
            if (index >= range.end) break;
#ifdef RF_SANITIZE
            __asan_unpoison_memory_region(scratch, loop.scratch_bytes);
#endif
            if (loop.poison) std::memset(scratch, 0xff, loop.scratch_bytes);
            loop.task(index, loop.context, scratch);
        }
    }
}

}  // namespace

std::string bind_openmp(const std::string& libtorch) {
#ifndef _WIN32
    // dlsym on a handle searches that library and then its own dependencies.
    void* handle = dlopen(libtorch.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) return "";
    void* symbol = dlsym(handle, "GOMP_parallel");
    void* number = dlsym(handle, "omp_get_thread_num");
    dlclose(handle);  // drops our reference only: PyTorch keeps the library loaded
    Dl_info info;
    if (symbol != nullptr && number != nullptr && dladdr(symbol, &info) != 0) {
        gomp_parallel = reinterpret_cast<GompParallel>(symbol);
        thread_number = reinterpret_cast<ThreadNumber>(number);
        return info.dli_fname;
    }
#else
    (void)libtorch;
#endif
    return "";
}

void poison_scratch(bool enabled) {
    poisons_scratch = enabled;
}

void guard(char* begin, char* end) {
#ifdef RF_SANITIZE
    __asan_poison_memory_region(begin, static_cast<std::size_t>(end - begin));
#else
    (void)begin, (void)end;
#endif
}

void parallel_for(std::int64_t count, std::int64_t work, int threads, Task task, const void* context,
                  std::size_t scratch_bytes) {
    if (count <= 0) return;
    const std::int64_t useful = std::min(count, work / kGrain);
    threads = gomp_parallel == nullptr
                  ? 1
                  : static_cast<int>(std::clamp<std::int64_t>(useful, 1, std::max(threads, 1)));
    const std::size_t stride = (scratch_bytes + kGuard + kAlignment - 1) / kAlignment * kAlignment;
    std::unique_ptr<char, AlignedDelete> scratch(
        static_cast<char*>(::operator new(stride * threads, std::align_val_t(kAlignment))));
    std::unique_ptr<Range[]> ranges(new Range[threads]);
    for (int i = 0; i < threads; ++i) {
        guard(scratch.get() + i * stride + scratch_bytes, scratch.get() + (i + 1) * stride);
        ranges[i].next.store(count * i / threads, std::memory_order_relaxed);
        ranges[i].end = count * (i + 1) / threads;
    }
    Loop loop{task, context, scratch.get(), scratch_bytes, stride, poisons_scratch, ranges.get(), threads};
    if (threads == 1)
        run(&loop);
    else
        gomp_parallel(run, &loop, static_cast<unsigned>(threads), 0);
}

Scratch::Scratch(std::size_t bytes)
    : data_(bytes == 0 ? nullptr : static_cast<char*>(::operator new(bytes, std::align_val_t(kAlignment)))) {
    if (bytes > 0 && poisons_scratch) std::memset(data_, 0xff, bytes);
}

Scratch::~Scratch() {
    ::operator delete(data_, std::align_val_t(kAlignment));
}

Partials::Partials(std::int64_t count) : data_(new double[count]) {
    for (std::int64_t i = 0; i < count; ++i) data_[i] = std::numeric_limits<double>::quiet_NaN();
}

Partials::~Partials() {
    delete[] data_;
}

}  // namespace rf
