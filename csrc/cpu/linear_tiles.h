// What the kernels of a linear layer's pull-back on tile registers share. They multiply by both halves, W+
// and W-, sooner than a vector could choose one, and take the depth in blocks: right tiles of a block lie in
// the L1 cache, its left tiles stay in the L2 cache beside the sums while the panels of a task pass by.
#pragma once

#include "cpu/linear.h"
#include "cpu/tiles.h"

namespace rf::RF_ISA {
namespace {

constexpr int64_t kTaskGroups = 16;  // of rows
constexpr int64_t kTaskPanels = 4;

// Groups of 16 rows of a sample in a task, and panels: as many as leave every thread four tasks.
struct TaskSize {
    int64_t groups, panels;
};

RF_INLINE TaskSize task_size(const LinearArgs& args) {
    const int64_t groups = ceil_div(args.rows, kTileRows), panels = ceil_div(args.width, kLinearColumns);
    const int64_t chunk = ceil_div(groups, ceil_div(groups, kTaskGroups)), threads = args.threads;
    const int64_t share = args.batch * ceil_div(groups, chunk) * panels / (4 * (threads > 1 ? threads : 1));
    return {chunk, share < 1 ? 1 : min64(share, kTaskPanels)};
}

// The panels of a task, and its rows.
struct TaskPanels {
    int64_t count;
    PanelRows at[kTaskPanels];
};

RF_INLINE TaskPanels task_panels_of(const Linear<float>& job, int64_t index) {
    const int64_t panel_groups = ceil_div(job.panels, job.task_panels);
    const int64_t chunk = index / panel_groups % job.chunks, sample = index / panel_groups / job.chunks;
    const int64_t first = index % panel_groups * job.task_panels;
    TaskPanels panels_of_task;
    panels_of_task.count = min64(job.task_panels, job.panels - first);
    for (int64_t i = 0; i < panels_of_task.count; ++i)
        panels_of_task.at[i] = panel_rows(job, sample, chunk, first + i);
    return panels_of_task;
}

// A block of steps [begin, end), of panel `index` of the task's.
struct Block {
    int64_t begin, end, index;
};

// The block after: that of the next panel, or of the first one and the next steps (after the last ones, the
// first).
RF_INLINE Block block_after(const Block& now, const TaskPanels& panels_of_task, int64_t steps,
                            int64_t block) {
    if (now.index + 1 < panels_of_task.count) return {now.begin, now.end, now.index + 1};
    const int64_t begin = now.end % steps;
    return {begin, min64(begin + block, steps), 0};
}

// The group of left tiles that has a row of a sample of a map.
RF_INLINE int64_t left_group(const LinearArgs& args, int64_t map, int64_t sample, int64_t row) {
    return (map * args.batch + sample) * ceil_div(args.rows, kTileRows) + row / kTileRows;
}

// The first row of c that such a group has, and how many it has.
struct Rows {
    int64_t first, count;
};

RF_INLINE Rows rows_of_group(const LinearArgs& args, int64_t index) {
    const int64_t groups = ceil_div(args.rows, kTileRows), row = index % groups * kTileRows;
    return {index / groups * args.rows + row, min64(kTileRows, args.rows - row)};
}

// Finishes the rows of a panel; `chosen(row, gates, sums)` points at their sums for one or two maps.
template <class Chosen>
RF_INLINE void finish_panel(const Linear<float>& job, const PanelRows& at, int64_t t, const Chosen& chosen) {
    const LinearArgs& args = job.args;
    float x_buffer[kLinearColumns], gate[kLinearColumns], factor[kLinearColumns], buffer[kLinearColumns];
    for (int64_t row = at.begin; row < at.end; ++row) {
        const int64_t x_row = at.sample * args.rows + row;
        const float* x = load(args.x, x_row * args.width + at.column, at.columns, x_buffer);
        prepare_row(job, x, x_row, at.column, at.columns, gate, factor);
        float* sums[2] = {};
        chosen(row - at.begin, gate, sums);
        finish_row(job, (t * args.batch + at.sample) * args.rows + row, at, x, factor, sums[0], sums[1],
                   buffer, at.masses + t);
    }
}

}  // namespace
}  // namespace rf::RF_ISA
