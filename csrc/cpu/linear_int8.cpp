// The pull-back of linear.cpp on tile registers, for coefficients and weights of float in int8 slices
// (int8_slices.h). Only compiled for processors that have them.
//
// W+ and W- have unsigned slices. A product is one map over one half; of its sums those that the
// signs of the input ask for are added, in float, to the sums over all blocks.
#include "cpu/int8_slices.h"
#include "cpu/linear_tiles.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kBlockSteps = 6;
constexpr int64_t kQuads = kInt8TileDepth / 4;            // of rows of W, in a step
constexpr int64_t kHalfBytes = kBlockSteps * kSliceStep;  // right tiles of a block, of W+ or W-

using ChosenSums = float[2][kTileRows][kLinearColumns];  // [map, row, column]

// The scales of the columns of a panel, to their integers and back.
struct ColumnScales {
    float to[kLinearColumns], from[kLinearColumns];
};

// Where the input is positive, in 16 rows and a panel.
using Gates = __mmask16[kTileRows][kLinearColumns / kTileColumns];

struct Workspace {
    char* weights;         // [W+ | W-, step, slice, 16, 64]
    SliceSums* products;   // of a product, and of the one before
    ColumnScales* scales;  // [panel]
    ChosenSums* sums;      // [panel, group]
    Gates* gates;          // [panel, group]
};

constexpr int64_t kFixedBytes = 2 * kHalfBytes + 2 * static_cast<int64_t>(sizeof(SliceSums)) +
                                kTaskPanels * static_cast<int64_t>(sizeof(ColumnScales));

RF_INLINE Workspace workspace(void* scratch, int64_t panel_groups) {
    char* at = static_cast<char*>(scratch);
    Workspace work;
    work.weights = at;
    work.products = reinterpret_cast<SliceSums*>(at + 2 * kHalfBytes);
    work.scales = reinterpret_cast<ColumnScales*>(work.products + 2);
    work.sums = reinterpret_cast<ChosenSums*>(at + kFixedBytes);
    work.gates = reinterpret_cast<Gates*>(work.sums + panel_groups);
    return work;
}

RF_INLINE const float* panel_at(const LinearArgs& args, const PanelRows& at) {
    return static_cast<const float*>(args.panels.data) + at.panel * args.depth * kLinearColumns;
}

void scale_columns(const float* panel, int64_t depth, ColumnScales& scales) {
    __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < 2; ++i)
            most[i] = _mm512_max_epu32(
                most[i], magnitude_bits(_mm512_loadu_ps(panel + k * kLinearColumns + i * kTileColumns)));
    alignas(64) std::uint32_t bits[kLinearColumns];
    for (int64_t i = 0; i < 2; ++i) _mm512_store_si512(bits + i * kTileColumns, most[i]);
    for (int64_t j = 0; j < kLinearColumns; ++j) {
        const Scale scale = scale_of(bits[j], kLargestUnsigned);
        scales.to[j] = scale.to;
        scales.from[j] = scale.from;
    }
}

void find_gates(const Linear<float>& job, const PanelRows& at, Gates* gates) {
    float x_buffer[kLinearColumns], gate[kLinearColumns], factor[kLinearColumns];
    for (int64_t row = at.begin; row < at.end; ++row) {
        const int64_t x_row = at.sample * job.args.rows + row, r = row - at.begin;
        const float* x = load(job.args.x, x_row * job.args.width + at.column, at.columns, x_buffer);
        prepare_row(job, x, x_row, at.column, at.columns, gate, factor);
        for (int64_t i = 0; i < 2; ++i)
            gates[r / kTileRows][r % kTileRows][i] =
                _mm512_cmp_ps_mask(_mm512_loadu_ps(gate + i * kTileColumns), _mm512_setzero_ps(), _CMP_GT_OQ);
    }
}

// The bytes chosen by `mask` of the first operand, the others of the second.
template <std::uint32_t mask>
RF_INLINE __m512i choose(__m512i first, __m512i second) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), first, second, 0xca);
}

// Right tiles of 16 columns of W+ and W- for steps [begin, end). `panel` and `scale` point at the first of
// the columns.
void split_panel(const float* panel, const float* scale, int64_t depth, int64_t begin, int64_t end,
                 char* to) {
    const __m512 factor = _mm512_loadu_ps(scale);
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    for (int64_t quad = begin * kQuads; quad < end * kQuads; ++quad, to += 64) {
        if (quad > begin * kQuads && quad % kQuads == 0) to += kSliceStep - kTileBytes;
        // Bytes: low, middle and high slice, and the sign.
        const auto number = [&](int64_t k) {
            if (k >= depth) return _mm512_setzero_si512();
            const __m512 w = _mm512_loadu_ps(panel + k * kLinearColumns);
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)magnitude_bits(w), factor));
            return _mm512_or_si512(q, _mm512_and_si512((__m512i)w, sign));
        };
        const __m512i a = number(4 * quad), b = number(4 * quad + 1), c = number(4 * quad + 2),
                      d = number(4 * quad + 3);
        // Bytes 0 and 2, and bytes 1 and 3, of two numbers interleaved.
        const __m512i even = choose<0x00ff00ffu>(a, _mm512_slli_epi32(b, 8)),
                      odd = choose<0x00ff00ffu>(_mm512_srli_epi32(a, 8), b),
                      even_2 = choose<0x00ff00ffu>(c, _mm512_slli_epi32(d, 8)),
                      odd_2 = choose<0x00ff00ffu>(_mm512_srli_epi32(c, 8), d);
        const __m512i slices[kSlices] = {
            choose<0x0000ffffu>(_mm512_srli_epi32(even, 16), even_2),
            choose<0x0000ffffu>(odd, _mm512_slli_epi32(odd_2, 16)),
            choose<0x0000ffffu>(even, _mm512_slli_epi32(even_2, 16)),
        };
        const __mmask64 negative =
            _mm512_movepi8_mask(choose<0x0000ffffu>(_mm512_srli_epi32(odd, 16), odd_2));
        for (int64_t p = 0; p < kSlices; ++p) {
            _mm512_store_si512(to + p * kTileBytes, _mm512_maskz_mov_epi8(~negative, slices[p]));
            _mm512_store_si512(to + kHalfBytes + p * kTileBytes, _mm512_maskz_mov_epi8(negative, slices[p]));
        }
    }
}

// A finished product that is added to the sums it is selected for, a row at a time during the next one.
class DeferredSelect {
  public:
    DeferredSelect() = default;
    DeferredSelect(const SliceSums& product, const float* rows, const float* columns, const Gates& gates,
                   bool negative, int64_t count, float* to, int64_t column)
        : product_(product[0][0]),
          rows_scale_(rows),
          columns_(_mm512_loadu_ps(columns + column)),
          gates_(&gates[0][column / kTileColumns]),
          flip_(negative ? 0xffff : 0),
          to_(to + column),
          rows_(count) {}
    int64_t rows() const { return rows_; }
    void write(int64_t rows) {
        for (int64_t n = min64(rows, rows_); n > 0; --n) {
            const __m512 scaled = _mm512_mul_ps(combined(product_), _mm512_set1_ps(*rows_scale_));
            const auto mask = static_cast<__mmask16>(*gates_ ^ flip_);
            const __m512 sum = _mm512_load_ps(to_);
            _mm512_store_ps(to_, _mm512_mask3_fmadd_ps(scaled, columns_, sum, mask));
            product_ += kTileColumns;
            ++rows_scale_;
            gates_ += kLinearColumns / kTileColumns;
            to_ += kLinearColumns;
            --rows_;
        }
    }

  private:
    const std::int32_t* product_ = nullptr;
    const float* rows_scale_ = nullptr;
    __m512 columns_ = {};
    const __mmask16* gates_ = nullptr;
    __mmask16 flip_ = 0;
    float* to_ = nullptr;
    int64_t rows_ = 0;
};

RF_INLINE const float* row_scales(const Linear<float>& job) {
    const LinearArgs& args = job.args;
    const int64_t groups = args.num_maps * args.batch * ceil_div(args.rows, kTileRows);
    return reinterpret_cast<const float*>(job.left +
                                          groups * ceil_div(args.depth, kInt8TileDepth) * kSliceStep);
}

// Adds a block to the sums of a panel, of the maps of group t; meanwhile the next block is
// fetched: its weights, and a share of its left tiles.
void sum_block(const Linear<float>& job, const TaskPanels& panels_of_task, int64_t t, const Block& now,
               const Block& next, const Workspace& work, int64_t groups, DeferredSelect& selection,
               int64_t& turn) {
    const LinearArgs& args = job.args;
    const PanelRows& at = panels_of_task.at[now.index];
    const int64_t all = ceil_div(args.depth, kInt8TileDepth), steps = now.end - now.begin;
    const float* panel = panel_at(args, at);
    const char* next_panel = reinterpret_cast<const char*>(panel_at(args, panels_of_task.at[next.index]) +
                                                           next.begin * kInt8TileDepth * kLinearColumns);
    const int64_t next_lines = min64(next.end * kInt8TileDepth, args.depth) - next.begin * kInt8TileDepth;
    // The left tiles that the first panel of the next steps will read.
    const Block row_block =
        block_after({now.begin, now.end, panels_of_task.count - 1}, panels_of_task, all, kBlockSteps);
    const int64_t slots = 2 * job.group_maps * steps * kSliceSlots;
    int64_t index = 0;
    for (int64_t column = 0; column < kLinearColumns; column += kTileColumns) {
        split_panel(panel + column, work.scales[now.index].to + column, args.depth, now.begin, now.end,
                    work.weights);
        for (int64_t row = at.begin; row < at.end; row += kTileRows) {
            const int64_t group = (row - at.begin) / kTileRows, index_of_sums = now.index * groups + group;
            const auto left = [&](int64_t map) {
                return left_group(args, t + map * job.groups, at.sample, row);
            };
            // P's rows are fetched beside one half of the columns, D's beside the other.
            const int64_t then = left(column > 0 ? job.group_maps - 1 : 0);
            Prefetch left_prefetch(job.left + (then * all + row_block.begin) * kSliceStep, 1,
                                   (row_block.end - row_block.begin) * kSliceStep, 0, now.index,
                                   panels_of_task.count);
            Prefetch panel_prefetch(next_panel, 1, next_lines * kLinearColumns * 4, 0, index++,
                                    2 * ceil_div(at.end - at.begin, kTileRows));
            const int64_t lines = ceil_div(left_prefetch.lines(), slots),
                          panel_lines = ceil_div(panel_prefetch.lines(), slots);
            // Neighbours share an operand: P over W+, D over W+, D over W-, P over W-.
            for (int64_t i = 0; i < 2 * job.group_maps; ++i) {
                const bool negative = i >= job.group_maps;
                const int64_t map = job.group_maps == 2 && (i == 1 || i == 2) ? 1 : 0;
                SliceSums& product = work.products[turn++ % 2];
                const int64_t selected_rows = ceil_div(selection.rows(), steps * kSliceSlots);
                sum_slices<true>(job.left + (left(map) * all + now.begin) * kSliceStep,
                                 work.weights + (negative ? kHalfBytes : 0), steps, kSliceStep, product, [&] {
                                     left_prefetch.fetch(lines);
                                     panel_prefetch.fetch(panel_lines);
                                     selection.write(selected_rows);
                                 });
                selection =
                    DeferredSelect(product, row_scales(job) + left(map) * kTileRows,
                                   work.scales[now.index].from, work.gates[index_of_sums], negative,
                                   min64(kTileRows, at.end - row), work.sums[index_of_sums][map][0], column);
            }
        }
    }
}

// Some rows of a sample and some panels.
void int8_task(int64_t index, const void* context, void* scratch) {
    const Linear<float>& job = *static_cast<const Linear<float>*>(context);
    const int64_t steps = ceil_div(job.args.depth, kInt8TileDepth), groups = job.chunk_rows / kTileRows;
    const TaskPanels panels_of_task = task_panels_of(job, index);
    const Workspace work = workspace(scratch, job.task_panels * groups);
    for (int64_t i = 0; i < panels_of_task.count; ++i) {
        scale_columns(panel_at(job.args, panels_of_task.at[i]), job.args.depth, work.scales[i]);
        find_gates(job, panels_of_task.at[i], work.gates + i * groups);
    }
    for (int64_t t = 0; t < job.groups; ++t) {
        const TileRegisters tiles;
        float* sums = work.sums[0][0][0];
        for (int64_t i = 0; i < panels_of_task.count * groups * static_cast<int64_t>(sizeof(ChosenSums) / 4);
             i += 16)
            _mm512_store_ps(sums + i, _mm512_setzero_ps());
        DeferredSelect selection;
        int64_t turn = 0;
        for (Block now{0, min64(kBlockSteps, steps), 0};;) {
            const Block next = block_after(now, panels_of_task, steps, kBlockSteps);
            sum_block(job, panels_of_task, t, now, next, work, groups, selection, turn);
            if (next.begin == 0 && next.index == 0) break;
            now = next;
        }
        selection.write(selection.rows());
        for (int64_t i = 0; i < panels_of_task.count; ++i)
            finish_panel(job, panels_of_task.at[i], t, [&](int64_t row, const float*, float* chosen[2]) {
                for (int64_t s = 0; s < 2; ++s)
                    chosen[s] = work.sums[i * groups + row / kTileRows][s][row % kTileRows];
            });
    }
}

// Left tiles of a group of rows.
void left_task(int64_t index, const void* context, void*) {
    const Linear<float>& job = *static_cast<const Linear<float>*>(context);
    const auto [first, count] = rows_of_group(job.args, index);
    pack_slices(static_cast<const float*>(job.args.c.data), first, count, job.args.depth,
                job.left + index * ceil_div(job.args.depth, kInt8TileDepth) * kSliceStep,
                const_cast<float*>(row_scales(job)) + index * kTileRows);
}

}  // namespace

void linear_pullback_int8(const LinearArgs& args) {
    const TaskSize size = task_size(args);
    const int64_t scratch =
        kFixedBytes + size.panels * size.groups * static_cast<int64_t>(sizeof(ChosenSums) + sizeof(Gates));
    const int64_t left = args.num_maps * args.batch * ceil_div(args.rows, kTileRows);
    run<float>(args,
               {size.groups * kTileRows, size.panels, int8_task, static_cast<std::size_t>(scratch), left_task,
                left, left * (ceil_div(args.depth, kInt8TileDepth) * kSliceStep + kTileRows * 4)});
}

}  // namespace rf::RF_ISA
