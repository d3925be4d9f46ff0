// y = x W^T + b on tile registers. Operands are bfloat16, or float in three bfloat16 parts (tiles.h): faster
// than float arithmetic on vectors and as exact. Only compiled where there are tile registers.
//
// A sum takes ranges of the depth in order, whatever task or tile it is in.
#include "cpu/tiles.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kPairRows = 2 * kTileRows;  // of sums that the tile registers hold, 32 x 32
constexpr int64_t kTaskPairs = 7;             // at most
constexpr int64_t kTaskPanels = 16;
// Of the last rows: small tasks at the end leave the threads less to wait for.
constexpr int64_t kLastTaskPanels = 4;
// Of left tiles: they stay in a 2 MB L2 cache while the panels of a task pass by, and the next ones come.
constexpr int64_t kLeftBytes = 1 << 20;
// A result of more bytes for each thread does not wait in its L2 cache for whoever reads it.
constexpr int64_t kStreamBytes = 3 << 20;

struct Job {
    const ProductArgs& args;
    int64_t steps, groups, panels;  // groups of 16 rows
    int64_t chunks;                 // of rows
    int64_t task_pairs, range;      // pairs of groups of rows of a chunk, and steps that are taken at a time
    char* left;                     // [groups, steps, part, 16, 32]; null: x itself
    bool stream;                    // the result past the caches
};

template <int parts>
void pack_task(int64_t group, const void* context, void*) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t first = group * kTileRows;
    pack_left<parts>(job.args.x.data, first, min64(kTileRows, job.args.rows - first), job.args.depth,
                     job.left + group * job.steps * kStepBytes<parts>);
}

template <int parts>
RF_INLINE LeftTiles left_tiles(const Job& job, int64_t row, int64_t step) {
    if (job.left != nullptr)
        return {job.left + (row / kTileRows * job.steps + step) * kStepBytes<parts>, 64, kStepBytes<parts>};
    const auto* x = static_cast<const std::uint16_t*>(job.args.x.data);
    return {reinterpret_cast<const char*>(x + row * job.args.depth + step * kTileDepth), 2 * job.args.depth,
            2 * kTileDepth};
}

template <int parts>
RF_INLINE RightTiles right_tiles(const Job& job, int64_t panel, int64_t step) {
    return {static_cast<const char*>(job.args.tiles.data) +
            (panel * job.steps + step) * 2 * kStepBytes<parts>};
}

// Steps [begin, end) of a panel.
struct Stretch {
    int64_t panel, begin, end;
};

// Share `index` of `count` of the left tiles of a pair of groups of rows.
template <int parts>
RF_INLINE Ahead fetch_left(const Job& job, int64_t row, const Stretch& at, int64_t index, int64_t count) {
    const LeftTiles tiles = left_tiles<parts>(job, row, at.begin);
    const int64_t rows = min64(kPairRows, job.args.rows - row), bytes = (at.end - at.begin) * tiles.step;
    if (job.left == nullptr) return {tiles.data, rows, bytes, tiles.stride, index, count};
    return {tiles.data, ceil_div(rows, kTileRows), bytes, job.steps * kStepBytes<parts>, index, count};
}

// What a task sums: panels and rows.
struct Part {
    int64_t first, last, top, bottom;
};

RF_INLINE Part part_of(const Job& job, int64_t index) {
    const int64_t panel_groups = ceil_div(job.panels, kTaskPanels), rows = job.task_pairs * kPairRows;
    const int64_t before = (job.chunks - 1) * panel_groups;  // the last rows
    const bool last = index >= before;
    const int64_t panels = last ? kLastTaskPanels : kTaskPanels;
    const int64_t chunk = last ? job.chunks - 1 : index / panel_groups;
    const int64_t first = (last ? index - before : index % panel_groups) * panels, top = chunk * rows;
    return {first, min64(first + panels, job.panels), top, min64(top + rows, job.args.rows)};
}

RF_INLINE int64_t count_parts(const Job& job) {
    return (job.chunks - 1) * ceil_div(job.panels, kTaskPanels) + ceil_div(job.panels, kLastTaskPanels);
}

using PairSums = float[kPairRows][kLinearColumns];

// Finished sums on their way to the result, a row at a time beside the products of the next pair: written at
// once they would wait for memory, and the next tiles with them.
class Drain {
  public:
    Drain() = default;
    Drain(const PairSums& sums, const ProductArgs& args, bool stream, int64_t row, int64_t column)
        : sums_(sums[0]),
          bfloat_(args.out.dtype == DType::bf16),
          bytes_(bfloat_ ? 2 : 4),
          out_(static_cast<char*>(args.out.data) + (row * args.width + column) * bytes_),
          stride_(args.width * bytes_),
          rows_(min64(kPairRows, args.rows - row)),
          mask_(static_cast<std::uint32_t>((std::uint64_t{1} << min64(kLinearColumns, args.width - column)) -
                                           1)),
          stream_(stream && mask_ == ~std::uint32_t{0}) {}
    int64_t rows() const { return rows_; }
    void write(int64_t rows) {
        for (int64_t n = min64(rows, rows_); n > 0; --n) {
            const __m512 low = _mm512_load_ps(sums_), high = _mm512_load_ps(sums_ + 16);
            const auto low_mask = static_cast<__mmask16>(mask_);
            const auto high_mask = static_cast<__mmask16>(mask_ >> 16);
            const bool stream = stream_ && reinterpret_cast<std::uintptr_t>(out_) % 64 == 0;
            if (bfloat_) {
                const __m512i numbers = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(out_), numbers)
                       : _mm512_mask_storeu_epi16(out_, mask_, numbers);
            } else if (stream) {
                _mm512_stream_ps(reinterpret_cast<float*>(out_), low);
                _mm512_stream_ps(reinterpret_cast<float*>(out_) + 16, high);
            } else {
                _mm512_mask_storeu_ps(out_, low_mask, low);
                _mm512_mask_storeu_ps(out_ + 64, high_mask, high);
            }
            sums_ += kLinearColumns;
            out_ += stride_;
            --rows_;
        }
    }

  private:
    const float* sums_ = nullptr;
    bool bfloat_ = false;
    int64_t bytes_ = 0;
    char* out_ = nullptr;
    int64_t stride_ = 0, rows_ = 0;
    std::uint32_t mask_ = 0;  // of columns
    bool stream_ = false;     // past the caches
};

// Loads the sums of a pair of groups of rows, `stride` bytes apart (0: every row starts with the same
// numbers), adds a stretch to them and stores them.
template <int parts, class Beside>
RF_INLINE void add_stretch(const Job& job, TileRegisters& tiles, int64_t row, const Stretch& at,
                           const float* from, int64_t stride, PairSums& to, const Beside& beside) {
    const int64_t count = min64(kPairRows, job.args.rows - row);
    const bool both = count > kTileRows;
    tiles.set(min64(count, kTileRows), both ? count - kTileRows : 0);
    const float* below = from + kTileRows * stride / static_cast<int64_t>(sizeof(float));
    _tile_loadd(0, from, stride);
    _tile_loadd(1, from + kTileColumns, stride);
    if (both) _tile_loadd(2, below, stride);
    if (both) _tile_loadd(3, below + kTileColumns, stride);
    const LeftTiles first = left_tiles<parts>(job, row, at.begin);
    const RightTiles right = right_tiles<parts>(job, at.panel, at.begin);
    const int64_t steps = at.end - at.begin;
    if (both)
        add_products<parts, true>(first, left_tiles<parts>(job, row + kTileRows, at.begin), right, steps,
                                  beside);
    else
        add_products<parts, false>(first, first, right, steps, beside);
    constexpr int64_t to_bytes = sizeof(to[0]);
    _tile_stored(0, to[0], to_bytes);
    _tile_stored(1, to[0] + kTileColumns, to_bytes);
    if (both) _tile_stored(2, to[kTileRows], to_bytes);
    if (both) _tile_stored(3, to[kTileRows] + kTileColumns, to_bytes);
}

// Scratch: the finished sums of a pair, and where the depth is taken in ranges those of every pair and panel.
template <int parts>
void product_task(int64_t index, const void* context, void* scratch) {
    const Job& job = *static_cast<const Job*>(context);
    const ProductArgs& args = job.args;
    const auto [first, last, top, bottom] = part_of(job, index);
    const int64_t pairs = ceil_div(bottom - top, kPairRows);
    // Probably the next task of this thread; after the last one, none.
    const int64_t then_index = index + args.threads;
    const Part coming =
        then_index < count_parts(job) ? part_of(job, then_index) : Part{first, last, top, top};
    PairSums* finished = static_cast<PairSums*>(scratch);
    PairSums* unfinished = finished + 1;
    alignas(64) float bias[kTaskPanels][kLinearColumns] = {};
    if (args.bias.data != nullptr)
        for (int64_t i = first * kLinearColumns; i < min64(last * kLinearColumns, args.width); ++i)
            bias[i / kLinearColumns - first][i % kLinearColumns] =
                static_cast<const float*>(args.bias.data)[i];
    TileRegisters tiles;
    Drain drain;
    for (Stretch now{first, 0, min64(job.range, job.steps)}; now.begin < job.steps;) {
        Stretch next{now.panel + 1, now.begin, now.end};
        if (next.panel == last) next = {first, now.end, min64(now.end + job.range, job.steps)};
        const bool resumed = now.begin > 0, finishes = now.end == job.steps;
        // Meanwhile the next stretch of weights is fetched, and while the panels pass by the left tiles of
        // the next range or task.
        const Stretch then =
            next.begin < job.steps ? next : Stretch{coming.first, 0, min64(job.range, job.steps)};
        const Stretch range{first, finishes ? 0 : now.end,
                            min64(finishes ? job.range : now.end + job.range, job.steps)};
        const int64_t range_top = finishes ? coming.top : top;
        const int64_t range_bottom = finishes ? (coming.top == top ? 0 : coming.bottom) : bottom;
        const char* right = right_tiles<parts>(job, then.panel, then.begin).data;
        const int64_t slots = (now.end - now.begin) * kSlots<parts>;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const int64_t row = top + pair * kPairRows;
            const int64_t range_row = range_top + pair * kPairRows;
            Ahead left_ahead;
            if (range_row < range_bottom)
                left_ahead = fetch_left<parts>(job, range_row, range, now.panel - first, last - first);
            Ahead right_ahead(right, 1, (then.end - then.begin) * 2 * kStepBytes<parts>, 0, pair, pairs);
            const int64_t left_lines = ceil_div(left_ahead.lines(), slots),
                          right_lines = ceil_div(right_ahead.lines(), slots),
                          drained = ceil_div(drain.rows(), slots);
            PairSums& between = unfinished[(now.panel - first) * job.task_pairs + pair];
            PairSums& to = finishes ? *finished : between;
            add_stretch<parts>(job, tiles, row, now, resumed ? between[0] : bias[now.panel - first],
                               resumed ? sizeof(between[0]) : 0, to, [&] {
                                   left_ahead.fetch(left_lines);
                                   right_ahead.fetch(right_lines);
                                   drain.write(drained);
                               });
            if (finishes) drain = Drain(to, args, job.stream, row, now.panel * kLinearColumns);
        }
        now = next;
    }
    drain.write(drain.rows());
    _mm_sfence();
}

template <int parts>
void run(const ProductArgs& args) {
    const int64_t pairs = ceil_div(args.rows, kPairRows);
    const int64_t chunks = pairs > kTaskPairs ? ceil_div(pairs, kTaskPairs) : 1;
    const int64_t number = args.out.dtype == DType::bf16 ? 2 : 4;
    Job job{args,
            ceil_div(args.depth, kTileDepth),
            ceil_div(args.rows, kTileRows),
            ceil_div(args.width, kLinearColumns),
            chunks,
            pairs > 0 ? ceil_div(pairs, chunks) : 1,
            1,
            nullptr,
            args.rows * args.width * number > args.threads * kStreamBytes};
    // Left tiles that fit in one go are not taken in ranges.
    const int64_t step_bytes = 2 * job.task_pairs * kStepBytes<parts>;
    job.range = job.steps * step_bytes <= 2 * kLeftBytes ? job.steps : kLeftBytes / step_bytes;
    const bool as_is = parts == 1 && args.depth % kTileDepth == 0;
    const Scratch left(as_is ? 0 : static_cast<std::size_t>(job.groups * job.steps * kStepBytes<parts>));
    job.left = left.data();
    if (!as_is) parallel_for(job.groups, args.rows * args.depth, args.threads, pack_task<parts>, &job, 0);
    parallel_for(
        count_parts(job), args.rows * args.depth * args.width, args.threads, product_task<parts>, &job,
        sizeof(PairSums) *
            static_cast<std::size_t>(1 + (job.range < job.steps ? kTaskPanels * job.task_pairs : 0)));
}

}  // namespace

void product(const ProductArgs& args) {
    args.x.dtype == DType::bf16 ? run<1>(args) : run<3>(args);
}

}  // namespace rf::RF_ISA
