// What the kernels of a linear layer's pull-back share: rows that are prepared before their sums are taken
// and finished after it, and how the work is split.
#pragma once

#include "cpu/mass.h"
#include "cpu/row_statistics.h"

namespace rf::RF_ISA {
namespace {

template <class F>
struct Linear {
    const LinearArgs& args;
    int64_t panels, chunks;  // chunks: groups of rows of one sample
    int64_t chunk_rows;
    int64_t task_panels;
    int64_t groups, group_maps;  // maps t and t + groups are computed together
    Statistics<F>* statistics;   // [B, rows], of the LayerNorm's input
    F *weight, *bias;            // [width], of the LayerNorm
    double* partials;            // [B, chunks, panels, T]
    char* left;                  // of kernels on tiles: [T, B, groups of rows] left tiles; null: c itself
};

// The signs that select, and what the sums are multiplied by, for `n` columns of a row of x.
template <class F>
RF_INLINE void prepare_row(const Linear<F>& job, const F* __restrict x, int64_t row, int64_t column,
                           int64_t n, F* __restrict gate, F* __restrict factor) {
    for (int64_t i = n; i < kLinearColumns; ++i) gate[i] = F(0);
    if (job.args.norm) {
        const F* __restrict weight = job.weight + column, * __restrict bias = job.bias + column;
        const Statistics<F> s = job.statistics[row];
        row_factor(x, weight, s, n, factor);
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) gate[i] = (x[i] - s.mean) * s.inverse * weight[i] + bias[i];
    } else {
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) {
            gate[i] = x[i];
            factor[i] = F(1);
        }
    }
    RF_SIMD
    for (int64_t i = 0; i < n; ++i) factor[i] = gate[i] > 0 || gate[i] < 0 ? factor[i] : F(0);
}

// Some rows of a sample, the columns of a panel.
struct PanelRows {
    int64_t sample, begin, end;
    int64_t panel, column, columns;
    double* masses;  // [T]
};

template <class F>
RF_INLINE PanelRows panel_rows(const Linear<F>& job, int64_t sample, int64_t chunk, int64_t panel) {
    PanelRows at;
    at.sample = sample;
    at.begin = chunk * job.chunk_rows;
    at.end = min64(at.begin + job.chunk_rows, job.args.rows);
    at.panel = panel;
    at.column = panel * kLinearColumns;
    at.columns = min64(kLinearColumns, job.args.width - at.column);
    at.masses = job.partials + ((sample * job.chunks + chunk) * job.panels + panel) * job.args.num_maps;
    for (int64_t t = 0; t < job.args.num_maps; ++t) at.masses[t] = 0;
    return at;
}

// Scales and stores a row of sums of group t, and adds its masses.
template <class F>
RF_INLINE void finish_row(const Linear<F>& job, int64_t row, const PanelRows& at, const F* x,
                          const F* __restrict factor, F* __restrict first, F* __restrict second,
                          F* __restrict buffer, double* mass) {
    const LinearArgs& args = job.args;
    const int64_t n = at.columns, map_rows = job.groups * args.batch * args.rows;
    for (int64_t s = 0; s < job.group_maps; ++s) {
        const int64_t offset = (row + s * map_rows) * args.width + at.column;
        F* __restrict sum = s == 0 ? first : second;
        F* __restrict out = target(args.out, offset, buffer);
        RF_SIMD
        for (int64_t i = 0; i < n; ++i) out[i] = sum[i] *= factor[i];
        commit(args.out, offset, n, out);
    }
    if (args.mass.data == nullptr) return;
    double* second_mass = mass + job.groups;
    if (args.contrast) {
        add_mass<F, true>(x, first, second, n, mass, second_mass);
    } else {
        add_mass<F, false>(x, first, nullptr, n, mass, nullptr);
        if (job.group_maps == 2) add_mass<F, false>(x, second, nullptr, n, second_mass, nullptr);
    }
}

template <class F>
void statistics_task(int64_t row, const void* context, void* scratch) {
    const Linear<F>& job = *static_cast<const Linear<F>*>(context);
    const int64_t width = job.args.width;
    const F* x = load(job.args.x, row * width, width, static_cast<F*>(scratch));
    job.statistics[row] = row_statistics(x, width, job.args.eps);
}

// How a kernel splits the work.
struct Kernel {
    int64_t chunk_rows, task_panels;
    Task task;
    std::size_t scratch_bytes;
    Task pack;  // of left tiles, or null
    int64_t pack_tasks, left_bytes;
};

template <class F>
void run(const LinearArgs& args, const Kernel& kernel) {
    const int64_t panels = ceil_div(args.width, kLinearColumns);
    const int64_t chunks = ceil_div(args.rows, kernel.chunk_rows);
    const int64_t tasks = args.batch * chunks * ceil_div(panels, kernel.task_panels);
    const int64_t rows = args.batch * args.rows;
    const bool pairs = args.num_maps % 2 == 0;
    static_assert(sizeof(Statistics<F>) <= 3 * sizeof(double), "Partials holds them");
    Partials partials(args.batch * chunks * panels * args.num_maps), statistics(args.norm ? 3 * rows : 0);
    Partials parameters(args.norm ? 2 * args.width : 0);
    F* weight = reinterpret_cast<F*>(parameters.data());
    const Scratch left(static_cast<std::size_t>(kernel.left_bytes));
    const Linear<F> job{args,
                        panels,
                        chunks,
                        kernel.chunk_rows,
                        kernel.task_panels,
                        pairs ? args.num_maps / 2 : args.num_maps,
                        pairs ? 2 : 1,
                        reinterpret_cast<Statistics<F>*>(statistics.data()),
                        weight,
                        weight + args.width,
                        partials.data(),
                        left.data()};
    if (args.norm) {
        for (int64_t i = 0; i < args.width; ++i) {
            job.weight[i] = args.weight.data ? load_one<F>(args.weight, i) : F(1);
            job.bias[i] = args.bias.data ? load_one<F>(args.bias, i) : F(0);
        }
        parallel_for(rows, rows * args.width, args.threads, statistics_task<F>, &job,
                     static_cast<std::size_t>(args.width) * sizeof(F));
    }
    if (kernel.pack != nullptr)
        parallel_for(kernel.pack_tasks, args.num_maps * rows * args.depth, args.threads, kernel.pack, &job,
                     0);
    parallel_for(tasks, args.num_maps * rows * args.width * args.depth, args.threads, kernel.task, &job,
                 kernel.scratch_bytes);
    if (args.mass.data)
        store_masses(args.mass, 0, args.num_maps, args.batch, job.partials, chunks * panels, args.num_maps);
}

}  // namespace
}  // namespace rf::RF_ISA
