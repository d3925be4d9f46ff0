// Masking: which step masks an entry.
//
// Of all the ranks only those at the ks matter. Entries are counted in buckets of neighbouring scores; where
// a bucket lies between two ks all of its entries have the same step, and only the entries of the others,
// about one bucket for every k, are sorted. Sorting is stable and entries come by index, so the first of
// equals is masked first. Buckets are even parts of the range of the scores, so few that the L1 cache holds
// them; where that leaves too many entries to be sorted (a few scores far from the others, many ks), the top
// 16 bits of the keys choose.
#include "cpu/block.h"
#include "ordered.h"

namespace rf::RF_ISA {
namespace {

using std::int32_t;
using std::uint32_t;

constexpr int kBucketBits = 16, kDigitBits = 8;
constexpr int64_t kBuckets = int64_t(1) << kBucketBits, kDigits = int64_t(1) << kDigitBits;
constexpr int64_t kEvenBuckets = 4096;
// Even buckets are given up if more than this part of the entries would have to be sorted.
constexpr int64_t kSortedPart = 8;
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

// The entries of one image.
template <class F>
struct Image {
    using Key = typename KeyOf<F>::type;
    const MaskStepsArgs& args;
    int64_t first;

    int32_t* out() const { return static_cast<int32_t*>(args.out.data) + first; }
    Key key(F score) const { return ordered_key<F>(bits_of<Key>(score), args.descending); }

    // visit(place of the first, scores, how many)
    template <class Visit>
    RF_INLINE void for_each_block(const Visit& visit) const {
        F buffer[kBlock];
        for (int64_t start = 0; start < args.count; start += kBlock) {
            const int64_t n = min64(kBlock, args.count - start);
            visit(start, load(args.scores, first + start, n, buffer), n);
        }
    }
};

// Even parts of the range of the scores; `parts` is 0 if it has none.
template <class F>
struct EvenBuckets {
    F least = 0, parts = 0;  // parts in a unit of the score
    bool descending = false;

    explicit EvenBuckets(const Image<F>& image) : descending(image.args.descending) {
        F low = __builtin_inf(), high = -low, strange = 0;
        image.for_each_block([&](int64_t, const F* __restrict scores, int64_t n) {
            F least_here = low, greatest_here = high, sum = 0;
            RF_PRAGMA(omp simd reduction(min : least_here) reduction(max : greatest_here) reduction(+ : sum))
            for (int64_t i = 0; i < n; ++i) {
                least_here = scores[i] < least_here ? scores[i] : least_here;
                greatest_here = scores[i] > greatest_here ? scores[i] : greatest_here;
                sum += scores[i] - scores[i];  // 0, or NaN for what is not finite
            }
            low = least_here;
            high = greatest_here;
            strange += sum;
        });
        const F scale = F(kEvenBuckets) / (high - low);
        if (strange == 0 && scale > 0 && scale < __builtin_inf() && high - low < __builtin_inf()) {
            least = low;
            parts = scale;
        }
    }
    RF_INLINE void operator()(const F* __restrict scores, int64_t n, uint32_t* __restrict buckets) const {
        // Rounding is monotonic: a larger score never has a smaller bucket.
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            const int32_t part = static_cast<int32_t>((scores[i] - least) * parts);
            const int32_t bucket = part < kEvenBuckets ? part : static_cast<int32_t>(kEvenBuckets) - 1;
            buckets[i] = static_cast<uint32_t>(descending ? kEvenBuckets - 1 - bucket : bucket);
        }
    }
};

template <class F>
struct KeyBuckets {
    const Image<F>& image;
    static constexpr int shift = 8 * sizeof(typename KeyOf<F>::type) - kBucketBits;
    RF_INLINE void operator()(const F* __restrict scores, int64_t n, uint32_t* __restrict buckets) const {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) buckets[i] = static_cast<uint32_t>(image.key(scores[i]) >> shift);
    }
};

// Writes the steps, or nothing and returns false, if more than `most` entries would have to be sorted, by the
// lowest `bits` of their keys.
template <class F, class Buckets>
bool steps_by_buckets(const Image<F>& image, const Scratch<typename KeyOf<F>::type>& scratch,
                      const Buckets& buckets_of, int64_t count, int bits, int64_t most) {
    using Key = typename KeyOf<F>::type;
    uint32_t* sizes = scratch.sizes;
    int32_t *steps = scratch.steps, *out = image.out();
    uint32_t buckets[kBlock];
    for (int64_t i = 0; i < count; ++i) sizes[i] = 0;
    image.for_each_block([&](int64_t, const F* scores, int64_t n) {
        buckets_of(scores, n, buckets);
        for (int64_t i = 0; i < n; ++i) ++sizes[buckets[i]];
    });
    int32_t place = 0;
    Ranks whole(image.args);
    for (int64_t bucket = 0, before = 0; bucket < count; before += sizes[bucket++]) {
        if (sizes[bucket] == 0) continue;
        const int32_t first = whole.step(before), last = whole.step(before + sizes[bucket] - 1);
        steps[bucket] = first == last ? first : ~place;
        if (first != last) place += static_cast<int32_t>(sizes[bucket]);
    }
    if (place > most) return false;
    image.for_each_block([&](int64_t start, const F* scores, int64_t n) {
        buckets_of(scores, n, buckets);
        for (int64_t i = 0; i < n; ++i) {
            const int32_t step = steps[buckets[i]];
            out[start + i] = step;
            if (step >= 0) continue;
            scratch.entries.keys[~step] = image.key(scores[i]);
            scratch.entries.indices[~step] = static_cast<int32_t>(start + i);
            steps[buckets[i]] = step - 1;
        }
    });
    Ranks ranks(image.args);
    for (int64_t bucket = 0, before = 0; bucket < count; before += sizes[bucket++]) {
        if (sizes[bucket] == 0 || steps[bucket] >= 0) continue;
        const int64_t size = sizes[bucket], begin = ~steps[bucket] - size;
        number_group<Key>({scratch.entries.keys + begin, scratch.entries.indices + begin},
                          {scratch.spare.keys + begin, scratch.spare.indices + begin}, size, bits, before,
                          ranks, out);
    }
    return true;
}

template <class F>
void steps_of_image(int64_t b, const void* context, void* memory) {
    using Key = typename KeyOf<F>::type;
    constexpr int bits = 8 * sizeof(Key);
    const MaskStepsArgs& args = *static_cast<const MaskStepsArgs*>(context);
    const Image<F> image{args, b * args.count};
    const Scratch<Key> scratch(static_cast<char*>(memory), args.count);
    if (args.count < kFewEntries) {
        image.for_each_block([&](int64_t start, const F* scores, int64_t n) {
            for (int64_t i = 0; i < n; ++i) {
                scratch.entries.keys[start + i] = image.key(scores[i]);
                scratch.entries.indices[start + i] = static_cast<int32_t>(start + i);
            }
        });
        Ranks ranks(args);
        return number_group(scratch.entries, scratch.spare, args.count, bits, 0, ranks, image.out());
    }
    const EvenBuckets<F> even(image);
    if (even.parts > 0 &&
        steps_by_buckets(image, scratch, even, kEvenBuckets, bits, args.count / kSortedPart))
        return;
    steps_by_buckets(image, scratch, KeyBuckets<F>{image}, kBuckets, KeyBuckets<F>::shift, args.count);
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
