// Masking: which step masks an entry.
//
// Of all the ranks only those at the ks matter. The top 16 bits of a key choose its bucket; where a bucket
// lies between two ks all of its entries have the same step, and only the entries of the others, about one
// bucket for every k, are sorted. Sorting is stable and entries come by index, so the first of equals is
// masked first.
#include "cpu/block.h"
#include "ordered.h"

namespace rf::RF_ISA {
namespace {

using std::int32_t;
using std::uint32_t;

constexpr int kBucketBits = 16, kDigitBits = 8;
constexpr int64_t kBuckets = int64_t(1) << kBucketBits, kDigits = int64_t(1) << kDigitBits;
// Fewer entries than this are sorted as a whole: counting buckets would take longer.
constexpr int64_t kFewEntries = 4096;
// Up to this many entries are sorted by insertion.
constexpr int64_t kFewInGroup = 24;

template <class Key>
struct Entries {
    Key* keys;
    int32_t* indices;
};

// Sorts by the lowest `bits` of the keys, stably; the result may be in either of the two.
template <class Key>
Entries<Key> sort(Entries<Key> from, Entries<Key> to, int64_t count, int bits) {
    if (count <= kFewInGroup) {
        for (int64_t i = 1; i < count; ++i) {
            const Key key = from.keys[i];
            const int32_t index = from.indices[i];
            int64_t hole = i;
            for (; hole > 0 && from.keys[hole - 1] > key; --hole) {
                from.keys[hole] = from.keys[hole - 1];
                from.indices[hole] = from.indices[hole - 1];
            }
            from.keys[hole] = key;
            from.indices[hole] = index;
        }
        return from;
    }
    for (int shift = 0; shift < bits; shift += kDigitBits) {
        uint32_t places[kDigits] = {};
        for (int64_t i = 0; i < count; ++i) ++places[from.keys[i] >> shift & (kDigits - 1)];
        if (places[from.keys[0] >> shift & (kDigits - 1)] == static_cast<uint32_t>(count)) continue;
        uint32_t before = 0;
        for (int64_t digit = 0; digit < kDigits; ++digit) {
            const uint32_t here = places[digit];
            places[digit] = before;
            before += here;
        }
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t place = places[from.keys[i] >> shift & (kDigits - 1)]++;
            to.keys[place] = from.keys[i];
            to.indices[place] = from.indices[i];
        }
        const Entries<Key> swapped = from;
        from = to;
        to = swapped;
    }
    return from;
}

// Steps by rank: ranks are asked for in ascending order.
class Ranks {
  public:
    explicit Ranks(const MaskStepsArgs& args) : ks_(args.ks), steps_(static_cast<int32_t>(args.steps)) {}
    int32_t step(int64_t rank) {
        while (step_ < steps_ && ks_[step_] <= rank) ++step_;
        return step_;
    }

  private:
    const int64_t* ks_;
    int32_t steps_, step_ = 0;
};

template <class Key>
void number_group(const Entries<Key>& group, const Entries<Key>& spare, int64_t count, int bits,
                  int64_t before, Ranks& ranks, int32_t* out) {
    const Entries<Key> sorted = sort(group, spare, count, bits);
    for (int64_t i = 0; i < count; ++i) out[sorted.indices[i]] = ranks.step(before + i);
}

// The parts of a thread's scratch.
template <class Key>
struct Scratch {
    Entries<Key> entries, spare;
    uint32_t* sizes;  // [kBuckets]
    int32_t* steps;   // [kBuckets]: the step; where the bucket has several, ~(place of its next entry)

    Scratch(char* memory, int64_t count) {
        entries = {static_cast<Key*>(take(memory, count * sizeof(Key))),
                   static_cast<int32_t*>(take(memory, count * sizeof(int32_t)))};
        spare = {static_cast<Key*>(take(memory, count * sizeof(Key))),
                 static_cast<int32_t*>(take(memory, count * sizeof(int32_t)))};
        if (count < kFewEntries) return;
        sizes = static_cast<uint32_t*>(take(memory, kBuckets * sizeof(uint32_t)));
        steps = static_cast<int32_t*>(take(memory, kBuckets * sizeof(int32_t)));
    }

    static std::size_t bytes(int64_t count) {
        return 2 * (room(count * sizeof(Key)) + room(count * sizeof(int32_t))) +
               (count < kFewEntries ? 0 : 2 * room(kBuckets * sizeof(int32_t)));
    }

  private:
    static std::size_t room(std::size_t bytes) { return (bytes + kGuard + 63) / 64 * 64; }
    static void* take(char*& memory, std::size_t bytes) {
        char* begin = memory;
        memory += room(bytes);
        guard(begin + bytes, memory);
        return begin;
    }
};

// One image.
template <class F>
void steps_of_image(int64_t b, const void* context, void* memory) {
    using Key = typename KeyOf<F>::type;
    constexpr int bits = 8 * sizeof(Key);
    const MaskStepsArgs& args = *static_cast<const MaskStepsArgs*>(context);
    const int64_t count = args.count;
    int32_t* out = static_cast<int32_t*>(args.out.data) + b * count;
    const Scratch<Key> scratch(static_cast<char*>(memory), count);
    F buffer[kBlock];
    const auto for_each_key = [&](const auto& visit) {
        for (int64_t start = 0; start < count; start += kBlock) {
            const int64_t n = min64(kBlock, count - start);
            const F* scores = load(args.scores, b * count + start, n, buffer);
            for (int64_t i = 0; i < n; ++i)
                visit(static_cast<int32_t>(start + i),
                      ordered_key<F>(bits_of<Key>(scores[i]), args.descending));
        }
    };
    Ranks ranks(args);
    if (count < kFewEntries) {
        for_each_key([&](int32_t i, Key key) {
            scratch.entries.keys[i] = key;
            scratch.entries.indices[i] = i;
        });
        return number_group(scratch.entries, scratch.spare, count, bits, 0, ranks, out);
    }

    constexpr int shift = bits - kBucketBits;
    uint32_t* sizes = scratch.sizes;
    int32_t* steps = scratch.steps;
    for (int64_t i = 0; i < kBuckets; ++i) sizes[i] = 0;
    for_each_key([&](int32_t, Key key) { ++sizes[key >> shift]; });
    int32_t place = 0;
    Ranks whole(args);
    for (int64_t bucket = 0, before = 0; bucket < kBuckets; before += sizes[bucket++]) {
        if (sizes[bucket] == 0) continue;
        const int32_t first = whole.step(before), last = whole.step(before + sizes[bucket] - 1);
        steps[bucket] = first == last ? first : ~place;
        if (first != last) place += static_cast<int32_t>(sizes[bucket]);
    }
    for_each_key([&](int32_t i, Key key) {
        const int32_t step = steps[key >> shift];
        if (step >= 0) {
            out[i] = step;
        } else {
            scratch.entries.keys[~step] = key;
            scratch.entries.indices[~step] = i;
            steps[key >> shift] = step - 1;
        }
    });
    for (int64_t bucket = 0, before = 0; bucket < kBuckets; before += sizes[bucket++]) {
        if (sizes[bucket] == 0 || steps[bucket] >= 0) continue;
        const int64_t size = sizes[bucket], begin = ~steps[bucket] - size;
        number_group<Key>({scratch.entries.keys + begin, scratch.entries.indices + begin},
                          {scratch.spare.keys + begin, scratch.spare.indices + begin}, size, shift, before,
                          ranks, out);
    }
}

}  // namespace

void mask_steps(const MaskStepsArgs& args) {
    const bool wide = args.scores.dtype == DType::f64;
    const std::size_t scratch =
        wide ? Scratch<std::uint64_t>::bytes(args.count) : Scratch<uint32_t>::bytes(args.count);
    parallel_for(args.batch, args.batch * args.count, args.threads,
                 wide ? steps_of_image<double> : steps_of_image<float>, &args, scratch);
}

}  // namespace rf::RF_ISA
