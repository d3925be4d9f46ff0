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
// Of left tiles: they stay in a 2 MB L2 cache while the panels of a task pass by, and the next ones come.
constexpr int64_t kLeftBytes = 1 << 20;

struct Job {
    const ProductArgs& args;
    int64_t steps, groups, panels;  // groups of 16 rows
    int64_t task_pairs, range;      // pairs of groups of rows of a task, and steps that it takes at a time
    char* left;                     // [groups, steps, part, 16, 32]; null: x itself
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
RF_INLINE Ahead left_ahead(const Job& job, int64_t row, const Stretch& at, int64_t index, int64_t count) {
    if (job.steps <= job.range) return {};  // they stay where they are
    const LeftTiles tiles = left_tiles<parts>(job, row, at.begin);
    const int64_t rows = min64(kPairRows, job.args.rows - row), bytes = (at.end - at.begin) * tiles.step;
    if (job.left == nullptr) return {tiles.data, rows, bytes, tiles.stride, index, count};
    return {tiles.data, ceil_div(rows, kTileRows), bytes, job.steps * kStepBytes<parts>, index, count};
}

// Sums of a pair of groups of rows and a panel, rows `stride` numbers apart.
struct Sums {
    float* data;
    int64_t stride;
};

// Adds a stretch to them; the first one to the bias.
template <int parts>
RF_INLINE void add_stretch(const Job& job, TileRegisters& tiles, int64_t row, const Stretch& at,
                           const Sums& sums, const float* bias, const Ahead& next_left,
                           const Ahead& next_right) {
    const int64_t count = min64(kPairRows, job.args.rows - row);
    const bool both = count > kTileRows;
    tiles.set(min64(count, kTileRows), both ? count - kTileRows : 0);
    const int64_t bytes = sums.stride * static_cast<int64_t>(sizeof(float));
    float* below = sums.data + kTileRows * sums.stride;
    const bool resumed = at.begin > 0;  // else every row starts with the same numbers
    const int64_t from_bytes = resumed ? bytes : 0;
    const float* from = resumed ? sums.data : bias;
    _tile_loadd(0, from, from_bytes);
    _tile_loadd(1, from + kTileColumns, from_bytes);
    if (both) {
        from = resumed ? below : bias;
        _tile_loadd(2, from, from_bytes);
        _tile_loadd(3, from + kTileColumns, from_bytes);
    }
    const LeftTiles first = left_tiles<parts>(job, row, at.begin);
    const RightTiles right = right_tiles<parts>(job, at.panel, at.begin);
    if (both)
        add_products<parts, true>(first, left_tiles<parts>(job, row + kTileRows, at.begin), right,
                                  at.end - at.begin, next_left, next_right);
    else
        add_products<parts, false>(first, first, right, at.end - at.begin, next_left, next_right);
    _tile_stored(0, sums.data, bytes);
    _tile_stored(1, sums.data + kTileColumns, bytes);
    if (both) _tile_stored(2, below, bytes);
    if (both) _tile_stored(3, below + kTileColumns, bytes);
}

// Sums of float results are where these belong, if the panel is whole; others in the scratch.
template <int parts>
void product_task(int64_t index, const void* context, void* scratch) {
    const Job& job = *static_cast<const Job*>(context);
    const ProductArgs& args = job.args;
    const int64_t panel_groups = ceil_div(job.panels, kTaskPanels);
    const int64_t first = index % panel_groups * kTaskPanels, last = min64(first + kTaskPanels, job.panels);
    const int64_t top = index / panel_groups * job.task_pairs * kPairRows;
    const int64_t bottom = min64(top + job.task_pairs * kPairRows, args.rows);
    const int64_t pairs = ceil_div(bottom - top, kPairRows);
    const auto in_place = [&](int64_t panel) {
        return args.out.dtype == DType::f32 && (panel + 1) * kLinearColumns <= args.width;
    };
    const auto sums_of = [&](int64_t panel, int64_t row) -> Sums {
        if (in_place(panel))
            return {static_cast<float*>(args.out.data) + row * args.width + panel * kLinearColumns,
                    args.width};
        const int64_t rows = (panel - first) * job.task_pairs * kPairRows + row - top;
        return {static_cast<float*>(scratch) + rows * kLinearColumns, kLinearColumns};
    };
    alignas(64) float bias[kTaskPanels][kLinearColumns] = {};
    if (args.bias.data != nullptr)
        for (int64_t i = first * kLinearColumns; i < min64(last * kLinearColumns, args.width); ++i)
            bias[i / kLinearColumns - first][i % kLinearColumns] =
                static_cast<const float*>(args.bias.data)[i];
    TileRegisters tiles;
    for (Stretch now{first, 0, min64(job.range, job.steps)}; now.begin < job.steps;) {
        Stretch next{now.panel + 1, now.begin, now.end};
        if (next.panel == last) next = {first, now.end, min64(now.end + job.range, job.steps)};
        // Meanwhile the next stretch is fetched, and the left tiles of the next range while the panels pass
        // by; after the last one, what the next task of this thread probably begins with.
        const Stretch start{(first + args.threads * kTaskPanels) % job.panels, 0,
                            min64(job.range, job.steps)};
        const Stretch then = next.begin == job.steps ? start : next;
        const Stretch range{first, now.end % job.steps, min64(now.end % job.steps + job.range, job.steps)};
        const char* right = right_tiles<parts>(job, then.panel, then.begin).data;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const int64_t row = top + pair * kPairRows;
            add_stretch<parts>(
                job, tiles, row, now, sums_of(now.panel, row), bias[now.panel - first],
                left_ahead<parts>(job, row, range, now.panel - first, last - first),
                Ahead(right, 1, (then.end - then.begin) * 2 * kStepBytes<parts>, 0, pair, pairs));
        }
        now = next;
    }
    for (int64_t panel = first; panel < last; ++panel) {
        if (in_place(panel)) continue;
        const int64_t column = panel * kLinearColumns, n = min64(kLinearColumns, args.width - column);
        for (int64_t row = top; row < bottom; ++row) {
            const float* __restrict sum = sums_of(panel, row).data;
            if (args.out.dtype == DType::f32) {
                float* __restrict out = static_cast<float*>(args.out.data) + row * args.width + column;
                RF_SIMD
                for (int64_t i = 0; i < n; ++i) out[i] = sum[i];
            } else {
                commit(args.out, row * args.width + column, n, sum);
            }
        }
    }
}

template <int parts>
void run(const ProductArgs& args) {
    Job job{args,
            ceil_div(args.depth, kTileDepth),
            ceil_div(args.rows, kTileRows),
            ceil_div(args.width, kLinearColumns),
            1,
            1,
            nullptr};
    const int64_t pairs = ceil_div(args.rows, kPairRows), chunks = ceil_div(pairs, kTaskPairs);
    if (chunks > 0) job.task_pairs = ceil_div(pairs, chunks);
    // Left tiles that fit in one go are not taken in ranges.
    const int64_t step_bytes = 2 * job.task_pairs * kStepBytes<parts>;
    job.range = job.steps * step_bytes <= 2 * kLeftBytes ? job.steps : kLeftBytes / step_bytes;
    const bool as_is = parts == 1 && args.depth % kTileDepth == 0;
    const Scratch left(as_is ? 0 : static_cast<std::size_t>(job.groups * job.steps * kStepBytes<parts>));
    job.left = left.data();
    if (!as_is) parallel_for(job.groups, args.rows * args.depth, args.threads, pack_task<parts>, &job, 0);
    parallel_for(
        chunks * ceil_div(job.panels, kTaskPanels), args.rows * args.depth * args.width, args.threads,
        product_task<parts>, &job,
        sizeof(float) * static_cast<std::size_t>(kTaskPanels * job.task_pairs * kPairRows * kLinearColumns));
}

}  // namespace

void product(const ProductArgs& args) {
    args.x.dtype == DType::bf16 ? run<1>(args) : run<3>(args);
}

}  // namespace rf::RF_ISA
