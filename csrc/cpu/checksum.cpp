// Checksums of memory, which tell whether weights have changed.
#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

using std::uint32_t;
using std::uint64_t;

// Words in independent sums: a few vector registers of them hide the latency of a product.
constexpr int64_t kWords = 64;
constexpr int64_t kLineWords = 16;
// Lines of 64 bytes in a page, of which a sample has one.
constexpr int64_t kLines = 64;

// For a given sum this is a bijection of the word, and for a given word of the sum: no change of a single
// word goes unnoticed.
RF_INLINE void take(uint32_t* __restrict sums, const char* data, int64_t words) {
    uint32_t in[kWords];
    __builtin_memcpy(in, data, static_cast<std::size_t>(4 * words));
    RF_SIMD
    for (int64_t i = 0; i < words; ++i) sums[i] = (sums[i] ^ in[i]) * 0x9E3779B1u;
}

RF_INLINE void start(uint32_t* __restrict sums) {
    RF_SIMD
    for (int64_t i = 0; i < kWords; ++i) sums[i] = static_cast<uint32_t>(i + 1) * 0x85EBCA77u;
}

RF_INLINE uint64_t together(const uint32_t* sums, int64_t bytes) {
    uint64_t all = static_cast<uint64_t>(bytes);
    for (int64_t i = 0; i < kWords; ++i) all = (all ^ sums[i]) * 0x9E3779B97F4A7C15u;
    return all;
}

RF_INLINE void take_rest(uint32_t* sums, const char* data, int64_t bytes) {
    char rest[4 * kWords] = {};
    __builtin_memcpy(rest, data, static_cast<std::size_t>(bytes));
    take(sums, rest, kWords);
}

uint64_t checksum_of(const char* data, int64_t bytes) {
    uint32_t sums[kWords];
    start(sums);
    int64_t at = 0;
    for (; at + 4 * kWords <= bytes; at += 4 * kWords) take(sums, data + at, kWords);
    take_rest(sums, data + at, bytes - at);
    return together(sums, bytes);
}

// One line of every page; which one differs from page to page, or columns of a matrix would be missed.
uint64_t sample_of(const char* data, int64_t bytes) {
    constexpr int64_t line = 4 * kLineWords, block = kLines * line;
    uint32_t sums[kWords];
    start(sums);
    int64_t at = 0;
    for (uint32_t number = 0; at + block <= bytes; at += block, ++number) {
        uint32_t mixed = (number + 1) * 0x9E3779B1u;
        mixed ^= mixed >> 15;
        mixed *= 0x85EBCA77u;
        take(sums, data + at + (mixed >> 26) * line, kLineWords);
    }
    for (; at + 4 * kWords <= bytes; at += 4 * kWords) take(sums, data + at, kWords);
    take_rest(sums, data + at, bytes - at);
    return together(sums, bytes);
}

void checksum_one(int64_t index, const void* context, void*) {
    const ChecksumArgs& args = *static_cast<const ChecksumArgs*>(context);
    const char* data = reinterpret_cast<const char*>(args.addresses[index]);
    args.out[index] =
        args.sampled[index] ? sample_of(data, args.bytes[index]) : checksum_of(data, args.bytes[index]);
}

}  // namespace

void checksum(const ChecksumArgs& args) {
    parallel_for(args.count, args.total / 4, args.threads, checksum_one, &args, 0);
}

}  // namespace rf::RF_ISA
