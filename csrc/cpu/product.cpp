// y = x W^T + b of bfloat16 on tile registers. Only compiled for processors that have them.
//
// A sum takes ranges of the depth in order, whatever task or tile it is in.
#include "cpu/product_tasks.h"
#include "cpu/tiles.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kPairRows = 2 * kTileRows;  // of sums that the tile registers hold, 32 x 32
constexpr int64_t kTaskPairs = 7;             // at most
constexpr int64_t kTaskPanels = 16;
constexpr int64_t kLastTaskPanels = 4;
// Of left tiles: they stay in a 2 MB L2 cache while the panels of a task pass by, and the next ones come.
constexpr int64_t kLeftBytes = 1 << 20;

struct Job {
    const ProductArgs& args;
    int64_t steps, groups, panels;  // groups of 16 rows
    ProductTasks tasks;             // in pairs of groups, and panels
    int64_t range;                  // steps that are taken at a time
    char* left;                     // [groups, steps, 16, 32]; null: x itself
    bool stream;                    // the result by streaming stores
};

void pack_task(int64_t group, const void* context, void*) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t first = group * kTileRows;
    pack_left(static_cast<const std::uint16_t*>(job.args.x.data), first,
              min64(kTileRows, job.args.rows - first), job.args.depth,
              job.left + group * job.steps * kTileBytes);
}

RF_INLINE LeftTiles left_tiles(const Job& job, int64_t row, int64_t step) {
    if (job.left != nullptr)
        return {job.left + (row / kTileRows * job.steps + step) * kTileBytes, 64, kTileBytes};
    const auto* x = static_cast<const std::uint16_t*>(job.args.x.data);
    return {reinterpret_cast<const char*>(x + row * job.args.depth + step * kTileDepth), 2 * job.args.depth,
            2 * kTileDepth};
}

RF_INLINE RightTiles right_tiles(const Job& job, int64_t panel, int64_t step) {
    return {static_cast<const char*>(job.args.tiles.data) + (panel * job.steps + step) * 2 * kTileBytes};
}

// Steps [begin, end) of a panel.
struct DepthRange {
    int64_t panel, begin, end;
};

// Share `index` of `count` of the left tiles of a pair of groups of rows.
RF_INLINE Prefetch prefetch_left(const Job& job, int64_t row, const DepthRange& at, int64_t index,
                                 int64_t count) {
    const LeftTiles tiles = left_tiles(job, row, at.begin);
    const int64_t rows = min64(kPairRows, job.args.rows - row), bytes = (at.end - at.begin) * tiles.step;
    if (job.left == nullptr) return {tiles.data, rows, bytes, tiles.stride, index, count};
    return {tiles.data, ceil_div(rows, kTileRows), bytes, job.steps * kTileBytes, index, count};
}

using PairSums = float[kPairRows][kLinearColumns];

// Finished sums that are stored a row at a time during the products of the next pair: stored at once they
// would wait for memory, and the next tiles with them.
class DeferredStore {
  public:
    DeferredStore() = default;
    DeferredStore(const PairSums& sums, const Job& job, int64_t row, int64_t column)
        : sums_(sums[0]),
          out_(static_cast<std::uint16_t*>(job.args.out.data) + row * job.args.width + column),
          stride_(job.args.width),
          rows_(min64(kPairRows, job.args.rows - row)),
          mask_(static_cast<std::uint32_t>(
              (std::uint64_t{1} << min64(kLinearColumns, job.args.width - column)) - 1)),
          stream_(job.stream && mask_ == ~std::uint32_t{0}) {}
    int64_t rows() const { return rows_; }
    void write(int64_t rows) {
        for (int64_t n = min64(rows, rows_); n > 0; --n) {
            const auto numbers =
                (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums_ + kTileColumns), _mm512_load_ps(sums_));
            if (stream_ && reinterpret_cast<std::uintptr_t>(out_) % 64 == 0)
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out_), numbers);
            else
                _mm512_mask_storeu_epi16(out_, mask_, numbers);
            sums_ += kLinearColumns;
            out_ += stride_;
            --rows_;
        }
    }

  private:
    const float* sums_ = nullptr;
    std::uint16_t* out_ = nullptr;
    int64_t stride_ = 0, rows_ = 0;
    std::uint32_t mask_ = 0;  // of columns
    bool stream_ = false;     // by streaming stores
};

// Loads the sums of a pair of groups of rows, `stride` bytes apart (0: every row starts with the same
// numbers), adds a range of the depth to them and stores them.
template <class Beside>
RF_INLINE void add_range(const Job& job, TileRegisters& tiles, int64_t row, const DepthRange& at,
                         const float* from, int64_t stride, PairSums& to, const Beside& beside) {
    const int64_t count = min64(kPairRows, job.args.rows - row);
    const bool both = count > kTileRows;
    tiles.set(min64(count, kTileRows), both ? count - kTileRows : 0);
    const float* below = from + kTileRows * stride / static_cast<int64_t>(sizeof(float));
    compiler_barrier();
    _tile_loadd(0, from, stride);
    _tile_loadd(1, from + kTileColumns, stride);
    if (both) _tile_loadd(2, below, stride);
    if (both) _tile_loadd(3, below + kTileColumns, stride);
    const LeftTiles first = left_tiles(job, row, at.begin);
    const RightTiles right = right_tiles(job, at.panel, at.begin);
    const int64_t steps = at.end - at.begin;
    if (both)
        add_products<true>(first, left_tiles(job, row + kTileRows, at.begin), right, steps, beside);
    else
        add_products<false>(first, first, right, steps, beside);
    constexpr int64_t to_bytes = sizeof(to[0]);
    _tile_stored(0, to[0], to_bytes);
    _tile_stored(1, to[0] + kTileColumns, to_bytes);
    if (both) _tile_stored(2, to[kTileRows], to_bytes);
    if (both) _tile_stored(3, to[kTileRows] + kTileColumns, to_bytes);
}

// What is prefetched while a range is multiplied: the next range of weights, and a share of the
// left tiles of rows [top, bottom) that follow, of the next range or task.
struct NextOperands {
    DepthRange right, left;
    int64_t top, bottom;
};

RF_INLINE NextOperands next_operands(const Job& job, const Part& part, const Part& coming,
                                     const DepthRange& now, const DepthRange& next) {
    const DepthRange start{coming.first, 0, min64(job.range, job.steps)};
    const DepthRange& right = next.begin < job.steps ? next : start;
    if (now.end == job.steps) {
        const bool stays = coming.top == part.top;
        return {right, start, coming.top * kPairRows, stays ? 0 : coming.bottom * kPairRows};
    }
    const DepthRange range{part.first, now.end, min64(now.end + job.range, job.steps)};
    return {right, range, part.top * kPairRows, part.bottom * kPairRows};
}

// Scratch: the finished sums of a pair, and where the depth is taken in ranges those of every pair and panel.
void product_task(int64_t index, const void* context, void* scratch) {
    const Job& job = *static_cast<const Job*>(context);
    const ProductArgs& args = job.args;
    const Part part = job.tasks.part(index), coming = job.tasks.after(index, args.threads);
    const int64_t panels = part.last - part.first, pairs = part.bottom - part.top;
    PairSums* finished = static_cast<PairSums*>(scratch);
    PairSums* unfinished = finished + 1;
    alignas(64) float bias[kTaskPanels][kLinearColumns] = {};
    if (args.bias.data != nullptr)
        for (int64_t i = part.first * kLinearColumns; i < min64(part.last * kLinearColumns, args.width); ++i)
            bias[i / kLinearColumns - part.first][i % kLinearColumns] =
                static_cast<const float*>(args.bias.data)[i];
    TileRegisters tiles;
    DeferredStore stores;
    for (DepthRange now{part.first, 0, min64(job.range, job.steps)}; now.begin < job.steps;) {
        DepthRange next{now.panel + 1, now.begin, now.end};
        if (next.panel == part.last) next = {part.first, now.end, min64(now.end + job.range, job.steps)};
        const bool resumed = now.begin > 0, finishes = now.end == job.steps;
        const NextOperands then = next_operands(job, part, coming, now, next);
        const int64_t slots = now.end - now.begin, panel = now.panel - part.first;
        const char* right = right_tiles(job, then.right.panel, then.right.begin).data;
        const int64_t right_bytes = (then.right.end - then.right.begin) * 2 * kTileBytes;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const int64_t row = (part.top + pair) * kPairRows, then_row = then.top + pair * kPairRows;
            Prefetch left_prefetch, right_prefetch(right, 1, right_bytes, 0, pair, pairs);
            if (then_row < then.bottom)
                left_prefetch = prefetch_left(job, then_row, then.left, panel, panels);
            const int64_t left_lines = ceil_div(left_prefetch.lines(), slots),
                          right_lines = ceil_div(right_prefetch.lines(), slots),
                          stored_rows = ceil_div(stores.rows(), slots);
            const int64_t place = panel * job.tasks.task_rows() + pair;
            PairSums& to = finishes ? *finished : unfinished[place];
            add_range(job, tiles, row, now, resumed ? unfinished[place][0] : bias[panel],
                      resumed ? sizeof(PairSums) / kPairRows : 0, to, [&] {
                          left_prefetch.fetch(left_lines);
                          right_prefetch.fetch(right_lines);
                          stores.write(stored_rows);
                      });
            if (finishes) stores = DeferredStore(to, job, row, now.panel * kLinearColumns);
        }
        now = next;
    }
    stores.write(stores.rows());
    _mm_sfence();
}

}  // namespace

void product(const ProductArgs& args) {
    if (args.x.dtype == DType::f32) return product_int8(args);
    const int64_t panels = ceil_div(args.width, kLinearColumns);
    Job job{args,
            ceil_div(args.depth, kTileDepth),
            ceil_div(args.rows, kTileRows),
            panels,
            {ceil_div(args.rows, kPairRows), panels, kTaskPairs, kTaskPanels, kLastTaskPanels},
            1,
            nullptr,
            args.rows * args.width * 2 > args.threads * kStreamBytes};
    // Left tiles that fit in one go are not taken in ranges.
    const int64_t step_bytes = 2 * job.tasks.task_rows() * kTileBytes;
    job.range = job.steps * step_bytes <= 2 * kLeftBytes ? job.steps : kLeftBytes / step_bytes;
    const bool as_is = args.depth % kTileDepth == 0;
    const Scratch left(as_is ? 0 : static_cast<std::size_t>(job.groups * job.steps * kTileBytes));
    job.left = left.data();
    if (!as_is) parallel_for(job.groups, args.rows * args.depth, args.threads, pack_task, &job, 0);
    const int64_t unfinished = job.range < job.steps ? kTaskPanels * job.tasks.task_rows() : 0;
    parallel_for(job.tasks.count(), args.rows * args.depth * args.width, args.threads, product_task, &job,
                 sizeof(PairSums) * static_cast<std::size_t>(1 + unfinished));
}

}  // namespace rf::RF_ISA
