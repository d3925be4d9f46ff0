// y = x W^T + b of float on tile registers, in int8 slices (int8_slices.h). Only compiled for processors that
// have them.
#include "cpu/int8_slices.h"
#include "cpu/product_tasks.h"

namespace rf::RF_ISA {
namespace {

// The left tiles of a task stay in a 2 MB L2 cache while its panels pass by, and the next ones come.
constexpr int64_t kLeftBytes = 1 << 20;
constexpr int64_t kTaskGroups = 28;  // of 16 rows, at most
constexpr int64_t kTaskPanels = 32;  // of 16 columns, at most
constexpr int64_t kLastTaskPanels = 8;

struct Job {
    const ProductArgs& args;
    int64_t steps, groups;
    ProductTasks tasks;                                   // in groups of 16 rows and panels of 16 columns
    char* left;                                           // [groups, steps, slice, 16, 64]
    float* scales;                                        // [groups, 16]: 2^16 times the scales of rows
    bool stream;                                          // the result by streaming stores
    int64_t bytes() const { return steps * kSliceStep; }  // of a group or panel
    // A panel: tiles, and a block that begins with the scales of its columns.
    const char* right(int64_t panel) const {
        return static_cast<const char*>(args.tiles.data) + panel * (bytes() + kTileBytes);
    }
};

void pack_task(int64_t group, const void* context, void*) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t first = group * kTileRows;
    pack_slices(static_cast<const float*>(job.args.x.data), first, min64(kTileRows, job.args.rows - first),
                job.args.depth, job.left + group * job.bytes(), job.scales + first);
}

// Finished sums that are stored a row at a time during the next products.
class DeferredStore {
  public:
    DeferredStore() = default;
    DeferredStore(const SliceSums& sums, const Job& job, int64_t group, int64_t panel)
        : sums_(sums[0][0]),
          scales_(job.scales + group * kTileRows),
          out_(static_cast<float*>(job.args.out.data) + group * kTileRows * job.args.width +
               panel * kTileColumns),
          stride_(job.args.width),
          rows_(min64(kTileRows, job.args.rows - group * kTileRows)),
          mask_(
              static_cast<__mmask16>((1u << min64(kTileColumns, job.args.width - panel * kTileColumns)) - 1)),
          stream_(job.stream && mask_ == 0xffff) {
        columns_ = _mm512_loadu_ps(job.right(panel) + job.bytes());
        bias_ = _mm512_setzero_ps();
        if (job.args.bias.data != nullptr)
            bias_ = _mm512_maskz_loadu_ps(
                mask_, static_cast<const float*>(job.args.bias.data) + panel * kTileColumns);
    }
    int64_t rows() const { return rows_; }
    void write(int64_t rows) {
        for (int64_t n = min64(rows, rows_); n > 0; --n) {
            const __m512 y =
                _mm512_fmadd_ps(_mm512_mul_ps(combined(sums_), _mm512_set1_ps(*scales_)), columns_, bias_);
            if (stream_ && reinterpret_cast<std::uintptr_t>(out_) % 64 == 0)
                _mm512_stream_ps(out_, y);
            else
                _mm512_mask_storeu_ps(out_, mask_, y);
            sums_ += kTileColumns;
            ++scales_;
            out_ += stride_;
            --rows_;
        }
    }

  private:
    const std::int32_t* sums_ = nullptr;
    const float* scales_ = nullptr;
    float* out_ = nullptr;
    int64_t stride_ = 0, rows_ = 0;
    __m512 columns_ = {}, bias_ = {};  // scales of columns
    __mmask16 mask_ = 0;               // of columns
    bool stream_ = false;              // by streaming stores
};

// Scratch: the sums that are computed and those that are stored.
void product_task(int64_t index, const void* context, void* scratch) {
    const Job& job = *static_cast<const Job*>(context);
    const Part part = job.tasks.part(index), coming = job.tasks.after(index, job.args.threads);
    const bool stays = coming.top == part.top;
    const int64_t slots = job.steps * kSliceSlots;
    SliceSums* sums = static_cast<SliceSums*>(scratch);
    const TileRegisters tiles;
    DeferredStore stores;
    int64_t turn = 0;
    for (int64_t panel = part.first; panel < part.last; ++panel) {
        const char* next = job.right(panel + 1 < part.last ? panel + 1 : coming.first);
        for (int64_t group = part.top; group < part.bottom; ++group, ++turn) {
            // Meanwhile the next panel is fetched, and while the panels pass by the left tiles of the next
            // task.
            Prefetch right_prefetch(next, 1, job.bytes(), 0, group - part.top, part.bottom - part.top),
                left_prefetch;
            const int64_t then = coming.top + group - part.top;
            if (!stays && then < coming.bottom)
                left_prefetch = Prefetch(job.left + then * job.bytes(), 1, job.bytes(), 0, panel - part.first,
                                         part.last - part.first);
            const int64_t right_lines = ceil_div(right_prefetch.lines(), slots),
                          left_lines = ceil_div(left_prefetch.lines(), slots),
                          stored_rows = ceil_div(stores.rows(), slots);
            // Backwards every second time: what was read last is still in the L1 cache.
            const bool back = turn % 2 != 0;
            const int64_t start = back ? job.bytes() - kSliceStep : 0;
            sum_slices<false>(job.left + group * job.bytes() + start, job.right(panel) + start, job.steps,
                              back ? -kSliceStep : kSliceStep, sums[turn % 2], [&] {
                                  right_prefetch.fetch(right_lines);
                                  left_prefetch.fetch(left_lines);
                                  stores.write(stored_rows);
                              });
            stores = DeferredStore(sums[turn % 2], job, group, panel);
        }
    }
    stores.write(stores.rows());
    _mm_sfence();
}

int64_t task_groups(int64_t bytes) {
    return bytes * kTaskGroups <= kLeftBytes ? kTaskGroups : bytes <= kLeftBytes ? kLeftBytes / bytes : 1;
}

}  // namespace

void product_int8(const ProductArgs& args) {
    const int64_t steps = ceil_div(args.depth, kInt8TileDepth), groups = ceil_div(args.rows, kTileRows);
    const int64_t panels = ceil_div(args.width, kTileColumns);
    const int64_t task_panels = ceil_div(panels, ceil_div(panels, kTaskPanels));
    const Scratch left(static_cast<std::size_t>(groups * (steps * kSliceStep + kTileRows * 4)));
    const Job job{
        args,
        steps,
        groups,
        {groups, panels, task_groups(steps * kSliceStep), task_panels, min64(task_panels, kLastTaskPanels)},
        left.data(),
        reinterpret_cast<float*>(left.data() + groups * steps * kSliceStep),
        args.rows * args.width * 4 > args.threads * kStreamBytes};
    parallel_for(groups, args.rows * args.depth, args.threads, pack_task, &job, 0);
    parallel_for(job.tasks.count(), args.rows * args.depth * args.width, args.threads, product_task, &job,
                 2 * sizeof(SliceSums));
}

}  // namespace rf::RF_ISA
