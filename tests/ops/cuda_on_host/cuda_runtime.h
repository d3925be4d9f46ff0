// A stand-in for CUDA's header: kernels of csrc/cuda compile as C++ and run on the host, so that their logic
// is tested where there is no GPU. Every thread of a block is a fiber; it runs until it waits for its block
// or warp, and the ready fibers run in an order that the test chooses: where a barrier is missing, some order
// gives another result. Blocks run one after another and find in shared memory what the one before left
// there.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

struct Fiber {
    ucontext_t context;
    unsigned thread;
};

// Everything that a running block needs.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Fiber*> ready;
    std::vector<Fiber*> waiting;                        // for the block
    std::vector<std::vector<Fiber*>> waiting_for_warp;  // of each warp
    std::vector<std::uint32_t> exchanged;               // a word of every thread
    int votes = 0, outcome = 0;
    Fiber* running = nullptr;
    ucontext_t scheduler;
    void (*body)(const void*);
    const void* arguments;
    std::size_t finished = 0;
};

inline Block* block;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of the threads of all blocks, one block after another
inline unsigned order;  // 0: ascending threads, 1: descending, others: shuffled by this seed
constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 64 * 1024;
constexpr long kMostRounds = 50000;  // between barriers

inline void sleep() {
    Fiber* self = block->running;
    swapcontext(&self->context, &block->scheduler);
    threadIdx.x = self->thread;
}

inline void wake(std::vector<Fiber*>& fibers) {
    block->ready.insert(block->ready.end(), fibers.begin(), fibers.end());
    fibers.clear();
}

inline void wait_for_warp() {
    auto& waiting = block->waiting_for_warp[block->running->thread / kWarp];
    waiting.push_back(block->running);
    if (waiting.size() == kWarp) wake(waiting);
    sleep();
}

inline void start() {
    threadIdx.x = block->running->thread;
    block->body(block->arguments);
    ++block->finished;
    swapcontext(&block->running->context, &block->scheduler);
}

inline void run_block(unsigned threads, void (*body)(const void*), const void* arguments) {
    Block state;
    block = &state;
    state.body = body;
    state.arguments = arguments;
    state.fibers.resize(threads);
    state.waiting_for_warp.resize((threads + kWarp - 1) / kWarp);
    state.exchanged.resize(threads);
    for (unsigned thread = 0; thread < threads; ++thread) {
        Fiber& fiber = state.fibers[thread];
        fiber.thread = thread;
        if (stacks.size() == thread) stacks.emplace_back(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[thread].get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, start, 0);
        state.ready.push_back(&fiber);
    }
    std::mt19937 shuffle(order);
    for (long rounds = 0; !state.ready.empty(); ++rounds) {
        if (rounds > kMostRounds) {
            std::fputs("a kernel does not end\n", stderr);
            std::abort();
        }
        std::vector<Fiber*> now;
        now.swap(state.ready);
        std::sort(now.begin(), now.end(), [](auto* a, auto* b) { return a->thread < b->thread; });
        if (order == 1) std::reverse(now.begin(), now.end());
        if (order > 1) std::shuffle(now.begin(), now.end(), shuffle);
        for (Fiber* fiber : now) {
            state.running = fiber;
            swapcontext(&state.scheduler, &fiber->context);
        }
    }
    if (state.finished != threads) {
        std::fputs("some threads wait for others that have ended\n", stderr);
        std::abort();
    }
}

template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
    static void run(const void* self) {
        const Call& call = *static_cast<const Call*>(self);
        std::apply(call.kernel, call.arguments);
    }
};

}  // namespace host

inline void __syncthreads() {
    host::Block& block = *host::block;
    block.waiting.push_back(block.running);
    if (block.waiting.size() == block.fibers.size()) {
        block.outcome = block.votes;
        block.votes = 0;
        host::wake(block.waiting);
    }
    host::sleep();
}

inline int __syncthreads_or(int vote) {
    host::block->votes |= vote;
    __syncthreads();
    return host::block->outcome;
}

inline std::uint32_t __shfl_sync(unsigned, std::uint32_t value, int lane) {
    const unsigned thread = host::block->running->thread;
    host::block->exchanged[thread] = value;
    host::wait_for_warp();
    const std::uint32_t result = host::block->exchanged[thread / host::kWarp * host::kWarp + lane];
    host::wait_for_warp();
    return result;
}

inline std::uint32_t __shfl_up_sync(unsigned mask, std::uint32_t value, int distance) {
    const int lane = static_cast<int>(host::block->running->thread % host::kWarp);
    return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}

inline std::uint32_t atomicAdd(std::uint32_t* address, std::uint32_t value) {
    const std::uint32_t old = *address;
    *address += value;
    return old;
}

using std::max;
using std::min;

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

struct cudaFuncAttributes {};

inline int cuda_device = 0;  // of two

inline cudaError_t cudaGetDevice(int* device) {
    *device = cuda_device;
    return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
    if (device > 1) return cudaErrorInvalidDevice;
    cuda_device = device;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
    return "invalid device ordinal";
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    const host::Call<Parameters...> call{kernel, {arguments...}};
    const std::int64_t blocks = std::int64_t(gridDim.x) * gridDim.y * gridDim.z;
    for (std::int64_t number = 0; number < blocks; ++number) {
        const std::int64_t at = host::order == 1 ? blocks - 1 - number : number;
        blockIdx.x = static_cast<unsigned>(at % gridDim.x);
        blockIdx.y = static_cast<unsigned>(at / gridDim.x % gridDim.y);
        blockIdx.z = static_cast<unsigned>(at / gridDim.x / gridDim.y);
        host::run_block(blockDim.x, host::Call<Parameters...>::run, &call);
    }
    return cudaSuccess;
}
