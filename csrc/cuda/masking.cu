// Masking: which step masks an entry, and the masked copies of an image.
//
// mask_steps is a radix select for all ks of an image at once, one block per image. An entry is ranked by its
// key (ordered.h) and, among equals, its index: together a number that no other entry has. The number of the
// last entry that step s masks, its bound, is found digit by digit from the top: a histogram of the next
// digit of the entries that agree with a bound so far says which digit the bound has. Bounds ascend with the
// steps, so an entry finds those it agrees with, and in the end its own step, by bisection.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/kernels.h"
#include "ordered.h"

namespace rf::cuda {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;

constexpr int kThreads = 1024, kWarp = 32;
constexpr int kBins = 8192;        // of all histograms together, in shared memory
constexpr int kFirstBits = 11;     // of the first digit, whose histogram all steps share
constexpr int kMostBits = 8;       // of the others: what a warp adds up quickly
constexpr int kStepsAtOnce = 960;  // bounds beside the bins in 48 KB, ks in the parameters of a kernel
constexpr int kUnroll = 4;

// Entries of an image as (key, index) and the part of both that a digit is.
template <class Key>
struct Number {
    Key key;
    uint32_t index;
};

struct Digit {
    int shift, bits;
    bool of_index;
};

template <class T>
__device__ __forceinline__ T without_low(T value, int bits) {
    return bits >= 8 * static_cast<int>(sizeof(T)) ? T(0) : value >> bits;
}

// What lies above a digit.
template <class Key>
__device__ __forceinline__ Number<Key> prefix(const Number<Key>& n, const Digit& digit) {
    if (digit.of_index) return {n.key, without_low(n.index, digit.shift + digit.bits)};
    return {without_low(n.key, digit.shift + digit.bits), 0};
}

template <class Key>
__device__ __forceinline__ uint32_t digit_of(const Number<Key>& n, const Digit& digit) {
    const uint32_t mask = (1u << digit.bits) - 1;
    return (digit.of_index ? n.index >> digit.shift : static_cast<uint32_t>(n.key >> digit.shift)) & mask;
}

template <class Key>
__device__ __forceinline__ bool less(const Number<Key>& a, const Number<Key>& b) {
    return a.key != b.key ? a.key < b.key : a.index < b.index;
}

template <class Key>
struct Bounds {
    Key keys[kStepsAtOnce];
    uint32_t indices[kStepsAtOnce];
    __device__ __forceinline__ Number<Key> at(int step) const { return {keys[step], indices[step]}; }
};

// The first step whose bound, above the digit, is not less than `from`; `steps` if there is none.
template <class Key>
__device__ __forceinline__ int first_step(const Bounds<Key>& bounds, int steps, const Number<Key>& from,
                                          const Digit& digit) {
    int low = 0, high = steps;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (less(prefix(bounds.at(middle), digit), from))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

template <class Word>
struct ScoreOf;
template <>
struct ScoreOf<std::uint16_t> {  // bfloat16: the upper half of a float
    using type = float;
    static __device__ __forceinline__ uint32_t bits(std::uint16_t word) {
        return static_cast<uint32_t>(word) << 16;
    }
};
template <>
struct ScoreOf<uint32_t> {
    using type = float;
    static __device__ __forceinline__ uint32_t bits(uint32_t word) { return word; }
};
template <>
struct ScoreOf<uint64_t> {
    using type = double;
    static __device__ __forceinline__ uint64_t bits(uint64_t word) { return word; }
};

struct Ks {
    uint32_t at[kStepsAtOnce];  // 1 or more, ascending
};

// Calls visit(index, key) for the entries of an image; several loads are under way at a time.
template <class Word, class Visit>
__device__ __forceinline__ void for_each_key(const Word* __restrict__ scores, uint32_t count, bool descending,
                                             const Visit& visit) {
    using Score = typename ScoreOf<Word>::type;
    for (uint32_t start = threadIdx.x; start < count; start += kUnroll * kThreads) {
        Word words[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            words[u] = start + u * kThreads < count ? scores[start + u * kThreads] : Word(0);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            if (start + u * kThreads < count)
                visit(start + u * kThreads, ordered_key<Score>(ScoreOf<Word>::bits(words[u]), descending));
    }
}

// bins[0..count) become running sums; by one warp.
__device__ __forceinline__ void add_up(uint32_t* bins, int count, int lane) {
    uint32_t before = 0;
    for (int start = 0; start < count; start += kWarp) {
        uint32_t sum = start + lane < count ? bins[start + lane] : 0;
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, sum, distance);
            if (lane >= distance) sum += other;
        }
        sum += before;
        if (start + lane < count) bins[start + lane] = sum;
        before = __shfl_sync(0xffffffffu, sum, kWarp - 1);
    }
}

// out = `offset` + the first of `steps` steps that masks the entry, or with `add` out is increased by it.
template <class Word>
__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(const Word* __restrict__ all_scores, int32_t* __restrict__ all_out, uint32_t count,
                  int steps, int index_bits, int offset, bool descending, bool add, const Ks ks) {
    using Key = typename KeyOf<typename ScoreOf<Word>::type>::type;
    __shared__ Bounds<Key> bounds;  // below the digits known so far: ones
    __shared__ uint32_t
        left[kStepsAtOnce];  // how many entries to mask among those that agree; 0: bound known
    __shared__ uint32_t bins[kBins];
    const Word* scores = all_scores + static_cast<int64_t>(blockIdx.x) * count;
    int32_t* out = all_out + static_cast<int64_t>(blockIdx.x) * count;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;

    bool unknown = false;
    if (thread < steps) {
        bounds.keys[thread] = ~Key(0);
        bounds.indices[thread] = static_cast<uint32_t>((uint64_t(1) << index_bits) - 1);
        left[thread] = ks.at[thread] < count ? ks.at[thread] : 0;
        unknown = ks.at[thread] < count;
    }
    int later_bits = kMostBits;
    while ((steps << later_bits) > kBins) --later_bits;
    Digit digit{8 * static_cast<int>(sizeof(Key)) - kFirstBits, kFirstBits, false};
    for (bool first = true; __syncthreads_or(unknown); first = false) {
        const int rows = first ? 1 : steps;
        for (int i = thread; i < rows << digit.bits; i += kThreads) bins[i] = 0;
        __syncthreads();
        for_each_key(scores, count, descending, [&](uint32_t index, Key key) {
            const Number<Key> number{key, index};
            const Number<Key> above = prefix(number, digit);
            const int row = first_step(bounds, rows, above, digit);
            if (row < rows && !less(above, prefix(bounds.at(row), digit)))
                atomicAdd(&bins[(row << digit.bits) + digit_of(number, digit)], 1u);
        });
        __syncthreads();
        for (int row = warp; row < rows; row += kThreads / kWarp)
            add_up(bins + (row << digit.bits), 1 << digit.bits, lane);
        __syncthreads();
        Number<Key> bound{};
        uint32_t rest = 0;
        if (unknown) {
            bound = bounds.at(thread);
            const uint32_t* sums =
                bins + (first_step(bounds, rows, prefix(bound, digit), digit) << digit.bits);
            uint32_t low = 0, high = (1u << digit.bits) - 1;  // the first digit with as many entries up to it
            while (low < high) {
                const uint32_t middle = (low + high) / 2;
                if (sums[middle] < left[thread])
                    low = middle + 1;
                else
                    high = middle;
            }
            const uint32_t before = low > 0 ? sums[low - 1] : 0;
            rest = sums[low] == left[thread] ? 0 : left[thread] - before;
            const uint32_t cleared = ((1u << digit.bits) - 1) - low;  // the digit is all ones so far
            if (digit.of_index)
                bound.index -= cleared << digit.shift;
            else
                bound.key -= static_cast<Key>(cleared) << digit.shift;
        }
        __syncthreads();
        if (unknown) {
            bounds.keys[thread] = bound.key;
            bounds.indices[thread] = bound.index;
            left[thread] = rest;
            unknown = rest > 0;
        }
        // The next digit; there is one as long as a bound is not known, for no two numbers are equal.
        if (digit.shift == 0) digit = {index_bits, 0, true};
        digit.bits = min(later_bits, digit.shift);
        digit.shift -= digit.bits;
    }
    const Digit none{0, 0, true};
    for_each_key(scores, count, descending, [&](uint32_t index, Key key) {
        const int32_t step = offset + first_step(bounds, steps, Number<Key>{key, index}, none);
        out[index] = add ? out[index] + step : step;
    });
}

struct Copies {
    int64_t batch, channels, pixels, first, last, steps_per_block;
    bool shared, shared_baseline, channels_last, reveal;
    const int32_t* masked;
};

template <class Word, int count>
struct alignas(sizeof(Word) * count) Pack {
    Word at[count];
};

// A thread reads `count` elements of one image and writes them for the steps of its block.
template <class Word, int count>
__global__ void __launch_bounds__(256)
    copies_kernel(const Copies args, const Pack<Word, count>* __restrict__ images,
                  const Pack<Word, count>* __restrict__ baselines, Pack<Word, count>* __restrict__ out) {
    const int64_t size = args.channels * args.pixels, packs = size / count;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= args.batch * packs) return;
    const int64_t b = index / packs, pack = index - b * packs;
    const Pack<Word, count> image = images[index];
    const Pack<Word, count> baseline = baselines[args.shared_baseline ? pack : index];
    int32_t steps[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const int64_t element = pack * count + i;
        const int64_t pixel = args.channels_last ? element / args.channels : element % args.pixels;
        steps[i] = args.masked[args.shared ? b * args.pixels + pixel : b * size + element];
    }
    const int64_t first = args.first + blockIdx.y * args.steps_per_block;
    const int64_t last = min(first + args.steps_per_block, args.last);
    Pack<Word, count>* to = out + (first - args.first) * args.batch * packs + index;
    for (int64_t s = first; s < last; ++s, to += args.batch * packs) {
        const int32_t step = static_cast<int32_t>(s);
        Pack<Word, count> copy;
#pragma unroll
        for (int i = 0; i < count; ++i)
            copy.at[i] = (steps[i] <= step) != args.reveal ? baseline.at[i] : image.at[i];
        *to = copy;
    }
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(what) + " on CUDA: " + cudaGetErrorString(status));
}

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "finding the device");
        if (previous_ != device) check(cudaSetDevice(device), "choosing the device");
        changed_ = previous_ != device;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

template <class... Parameters, class... Arguments>
void launch(const char* what, const Place& place, dim3 grid, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = static_cast<cudaStream_t>(place.stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

template <class Word>
void select(const MaskStepsArgs& args, const Place& place) {
    int index_bits = 0;
    while ((args.count - 1) >> index_bits > 0) ++index_bits;
    // Steps that mask nothing have no bound: every entry's step comes after them.
    const int64_t zeros = std::upper_bound(args.ks, args.ks + args.steps, int64_t(0)) - args.ks;
    int64_t done = zeros;
    do {
        const int steps = static_cast<int>(std::min<int64_t>(args.steps - done, kStepsAtOnce));
        Ks ks;
        for (int i = 0; i < steps; ++i) ks.at[i] = static_cast<uint32_t>(args.ks[done + i]);
        launch("mask_steps", place, dim3(static_cast<unsigned>(args.batch)), kThreads, select_kernel<Word>,
               static_cast<const Word*>(args.scores.data), static_cast<int32_t*>(args.out.data),
               static_cast<uint32_t>(args.count), steps, index_bits,
               done == zeros ? static_cast<int>(zeros) : 0, args.descending, done != zeros, ks);
        done += steps;
    } while (done < args.steps);
}

template <class Word, int count>
void copy(const MaskedCopiesArgs& args, const Place& place) {
    using Elements = Pack<Word, count>;
    constexpr int threads = 256;
    constexpr int64_t enough_blocks = 2048;  // to fill any device; then no image is read twice
    const int64_t steps = args.last - args.first, packs = args.channels * args.pixels / count;
    const int64_t blocks = (args.batch * packs + threads - 1) / threads;
    const int64_t parts = std::max<int64_t>(1, std::min({steps, enough_blocks / blocks, int64_t(65535)}));
    const int64_t steps_per_block = (steps + parts - 1) / parts;
    const Copies copies{args.batch,
                        args.channels,
                        args.pixels,
                        args.first,
                        args.last,
                        steps_per_block,
                        args.shared,
                        args.shared_baseline,
                        args.channels_last,
                        args.reveal,
                        static_cast<const int32_t*>(args.masked.data)};
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>((steps + steps_per_block - 1) / steps_per_block));
    launch("masked_copies", place, grid, threads, copies_kernel<Word, count>, copies,
           static_cast<const Elements*>(args.images.data), static_cast<const Elements*>(args.baseline.data),
           static_cast<Elements*>(args.out.data));
}

// Sixteen bytes at a time where images begin at multiples of that.
template <class Word>
void copy_in_packs(const MaskedCopiesArgs& args, const Place& place) {
    constexpr int widest = 16 / sizeof(Word);
    bool aligned = args.channels * args.pixels % widest == 0;
    for (const Operand* operand : {&args.images, &args.baseline, &args.out})
        aligned = aligned && reinterpret_cast<std::uintptr_t>(operand->data) % 16 == 0;
    aligned ? copy<Word, widest>(args, place) : copy<Word, 1>(args, place);
}

}  // namespace

std::string problem(int device) {
    try {
        const DeviceGuard guard(device);
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, select_kernel<uint32_t>), "loading the kernels");
    } catch (const std::runtime_error& error) {
        cudaGetLastError();  // or the next call would report it
        return error.what();
    }
    return "";
}

void mask_steps(const MaskStepsArgs& args, const Place& place) {
    if (args.batch * args.count == 0) return;
    const DeviceGuard guard(place.device);
    if (args.scores.dtype == DType::f64)
        select<uint64_t>(args, place);
    else if (args.scores.dtype == DType::f32)
        select<uint32_t>(args, place);
    else
        select<std::uint16_t>(args, place);
}

void masked_copies(const MaskedCopiesArgs& args, const Place& place) {
    if (args.batch * args.channels * args.pixels * (args.last - args.first) == 0) return;
    const DeviceGuard guard(place.device);
    if (args.images.dtype == DType::f64)
        copy_in_packs<uint64_t>(args, place);
    else if (args.images.dtype == DType::f32)
        copy_in_packs<uint32_t>(args, place);
    else
        copy_in_packs<std::uint16_t>(args, place);
}

}  // namespace rf::cuda
