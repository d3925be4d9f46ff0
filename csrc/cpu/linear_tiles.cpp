// The pull-back of linear.cpp on tile registers, for coefficients and weights of bfloat16: the sums of both
// maps over both halves of 16 columns are four tiles. Only compiled for processors that have them.
#include "cpu/linear_tiles.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kBlockSteps = 16;
constexpr int64_t kPairs = kTileDepth / 2;                      // of rows of W, in a step
constexpr int64_t kWeightBytes = kBlockSteps * 2 * kTileBytes;  // right tiles of a block

using TileSums = float[2][2][kTileRows][kLinearColumns];  // [map, W+ | W-, row, column]

// Right tiles of 16 columns of W+ and W- for steps [begin, end): [step, W+ | W-]. `panel` points at the first
// of the columns.
void split_panel(const float* panel, int64_t depth, int64_t begin, int64_t end, char* to) {
    for (int64_t pair = begin * kPairs; pair < end * kPairs; ++pair, to += 64) {
        if (pair > begin * kPairs && pair % kPairs == 0) to += kTileBytes;
        const __m512i w =
            2 * pair < depth ? _mm512_loadu_si512(panel + pair * kLinearColumns) : _mm512_setzero_si512();
        // A negative bfloat16 is a negative 16-bit integer.
        const __mmask32 positive = _mm512_cmpgt_epi16_mask(w, _mm512_setzero_si512());
        const __mmask32 negative = _mm512_movepi16_mask(w);
        const __m512i flipped = _mm512_xor_si512(w, _mm512_set1_epi32(static_cast<int>(0x80008000u)));
        _mm512_store_si512(to, _mm512_maskz_mov_epi16(positive, w));
        _mm512_store_si512(to + kTileBytes, _mm512_maskz_mov_epi16(negative, flipped));
    }
}

const char* panel_at(const LinearArgs& args, const PanelRows& at, int64_t step) {
    return static_cast<const char*>(args.panels.data) +
           (at.panel * ceil_div(args.depth, 2) + step * kPairs) * kLinearColumns * 4;
}

LeftTiles left_tiles(const Linear<float>& job, int64_t map, int64_t sample, int64_t row, int64_t step) {
    const LinearArgs& args = job.args;
    if (job.left != nullptr) {
        const int64_t steps = ceil_div(args.depth, kTileDepth), group = left_group(args, map, sample, row);
        return {job.left + (group * steps + step) * kTileBytes, 64, kTileBytes};
    }
    const int64_t first = ((map * args.batch + sample) * args.rows + row) * args.depth + step * kTileDepth;
    return {static_cast<const char*>(args.c.data) + 2 * first, 2 * args.depth, 2 * kTileDepth};
}

// Adds a block to the sums of a panel, of the maps of group t; meanwhile the next block is
// fetched: its weights, and a share of its left tiles.
template <bool both>
void sum_tiles(const Linear<float>& job, const TaskPanels& panels_of_task, int64_t t, const Block& now,
               const Block& next, TileRegisters& tiles, char* weights, TileSums* sums) {
    const LinearArgs& args = job.args;
    const PanelRows& at = panels_of_task.at[now.index];
    const int64_t steps = now.end - now.begin, second = both ? t + job.groups : t;
    const auto left = [&](int64_t map, int64_t row, int64_t step) {
        return left_tiles(job, map, at.sample, row, step);
    };
    const char* next_panel = panel_at(args, panels_of_task.at[next.index], next.begin);
    const int64_t next_pairs =
        min64((next.end - next.begin) * kPairs, ceil_div(args.depth, 2) - next.begin * kPairs);
    // The left tiles that the first panel of the next steps will read.
    const Block row_block = block_after({now.begin, now.end, panels_of_task.count - 1}, panels_of_task,
                                        ceil_div(args.depth, kTileDepth), kBlockSteps);
    constexpr int64_t stride = kLinearColumns * sizeof(float);
    int64_t index = 0;
    for (int64_t column = 0; column < kLinearColumns; column += kTileColumns) {
        split_panel(static_cast<const float*>(static_cast<const void*>(panel_at(args, at, 0))) + column,
                    args.depth, now.begin, now.end, weights);
        for (int64_t row = at.begin; row < at.end; row += kTileRows) {
            const int64_t count = min64(kTileRows, at.end - row);
            TileSums& to = sums[(row - at.begin) / kTileRows];
            tiles.set(count, both ? count : 0);
            compiler_barrier();
            if (now.begin == 0) {
                clear_sums();
            } else {
                _tile_loadd(0, &to[0][0][0][column], stride);
                _tile_loadd(1, &to[0][1][0][column], stride);
                if (both) _tile_loadd(2, &to[1][0][0][column], stride);
                if (both) _tile_loadd(3, &to[1][1][0][column], stride);
            }
            // P's rows are fetched beside one half of the columns, D's beside the other.
            const LeftTiles then = left(both && column > 0 ? second : t, row, row_block.begin);
            Prefetch left_prefetch(then.data, job.left != nullptr ? 1 : count,
                                   (row_block.end - row_block.begin) * then.step, then.stride, now.index,
                                   panels_of_task.count);
            Prefetch panel_prefetch(next_panel, 1, next_pairs * kLinearColumns * 4, 0, index++,
                                    2 * ceil_div(at.end - at.begin, kTileRows));
            const int64_t lines = ceil_div(left_prefetch.lines(), steps),
                          panel_lines = ceil_div(panel_prefetch.lines(), steps);
            add_products<both>(left(t, row, now.begin), left(second, row, now.begin), {weights}, steps, [&] {
                left_prefetch.fetch(lines);
                panel_prefetch.fetch(panel_lines);
            });
            _tile_stored(0, &to[0][0][0][column], stride);
            _tile_stored(1, &to[0][1][0][column], stride);
            if (both) _tile_stored(2, &to[1][0][0][column], stride);
            if (both) _tile_stored(3, &to[1][1][0][column], stride);
        }
    }
}

// Some rows of a sample and some panels. Scratch: right tiles, then the sums of every panel.
void tiles_task(int64_t index, const void* context, void* scratch) {
    const Linear<float>& job = *static_cast<const Linear<float>*>(context);
    const int64_t steps = ceil_div(job.args.depth, kTileDepth), groups = job.chunk_rows / kTileRows;
    const TaskPanels panels_of_task = task_panels_of(job, index);
    char* weights = static_cast<char*>(scratch);
    TileSums* sums = reinterpret_cast<TileSums*>(weights + kWeightBytes);
    for (int64_t t = 0; t < job.groups; ++t) {
        TileRegisters tiles;
        for (Block now{0, min64(kBlockSteps, steps), 0};;) {
            const Block next = block_after(now, panels_of_task, steps, kBlockSteps);
            (job.group_maps == 2 ? sum_tiles<true> : sum_tiles<false>)(job, panels_of_task, t, now, next,
                                                                       tiles, weights,
                                                                       sums + now.index * groups);
            if (next.begin == 0 && next.index == 0) break;
            now = next;
        }
        for (int64_t i = 0; i < panels_of_task.count; ++i)
            finish_panel(job, panels_of_task.at[i], t, [&](int64_t row, const float* gate, float* chosen[2]) {
                TileSums& of_row = sums[i * groups + row / kTileRows];
                for (int64_t s = 0; s < job.group_maps; ++s) {
                    float* __restrict positive = chosen[s] = of_row[s][0][row % kTileRows];
                    const float* __restrict negative = of_row[s][1][row % kTileRows];
                    RF_SIMD
                    for (int64_t j = 0; j < kLinearColumns; ++j)
                        positive[j] = gate[j] > 0 ? positive[j] : negative[j];
                }
            });
    }
}

// Left tiles of a group of rows.
void left_task(int64_t index, const void* context, void*) {
    const Linear<float>& job = *static_cast<const Linear<float>*>(context);
    const auto [first, count] = rows_of_group(job.args, index);
    pack_left(static_cast<const std::uint16_t*>(job.args.c.data), first, count, job.args.depth,
              job.left + index * ceil_div(job.args.depth, kTileDepth) * kTileBytes);
}

}  // namespace

void linear_pullback_tiles(const LinearArgs& args) {
    if (args.panels.dtype == DType::f32) return linear_pullback_int8(args);
    const TaskSize size = task_size(args);
    const bool as_is = args.depth % kTileDepth == 0;
    const std::size_t scratch =
        kWeightBytes + static_cast<std::size_t>(size.panels * size.groups) * sizeof(TileSums);
    const int64_t left = as_is ? 0 : args.num_maps * args.batch * ceil_div(args.rows, kTileRows);
    run<float>(args, {size.groups * kTileRows, size.panels, tiles_task, scratch, as_is ? nullptr : left_task,
                      left, left * ceil_div(args.depth, kTileDepth) * kTileBytes});
}

}  // namespace rf::RF_ISA
