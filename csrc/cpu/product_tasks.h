// How a matrix product is divided into tasks: blocks of rows and columns of its result, block after block of
// rows. The last rows' are narrow: small tasks at the end leave the threads less to wait for.
#pragma once

#include "cpu/block.h"

namespace rf::RF_ISA {
namespace {

struct Part {
    int64_t first, last, top, bottom;  // columns, rows
};

// Rows and columns are counted in tiles, or in groups of tiles.
class ProductTasks {
  public:
    ProductTasks(int64_t rows, int64_t columns, int64_t task_rows, int64_t task_columns, int64_t last_columns)
        : rows_(rows),
          columns_(columns),
          chunks_(rows > 0 ? ceil_div(rows, task_rows) : 1),
          task_rows_(rows > 0 ? ceil_div(rows, chunks_) : 1),
          task_columns_(task_columns),
          last_columns_(last_columns),
          before_((chunks_ - 1) * ceil_div(columns, task_columns)) {}
    int64_t count() const { return before_ + ceil_div(columns_, last_columns_); }
    int64_t task_rows() const { return task_rows_; }
    Part part(int64_t index) const {
        const bool last = index >= before_;
        const int64_t across = ceil_div(columns_, task_columns_),
                      columns = last ? last_columns_ : task_columns_;
        const int64_t chunk = last ? chunks_ - 1 : index / across;
        const int64_t first = (last ? index - before_ : index % across) * columns, top = chunk * task_rows_;
        return {first, min64(first + columns, columns_), top, min64(top + task_rows_, rows_)};
    }
    // Probably the next one of the thread that has `index`; after the last one, no rows.
    Part after(int64_t index, int threads) const {
        if (index + threads < count()) return part(index + threads);
        Part none = part(index);
        none.bottom = none.top;
        return none;
    }

  private:
    int64_t rows_, columns_, chunks_, task_rows_, task_columns_, last_columns_;
    int64_t before_;  // tasks before those of the last rows
};

// A result of more bytes for each thread does not stay in its L2 cache until it is read: it is written by
// streaming stores.
constexpr int64_t kStreamBytes = 3 << 20;

}  // namespace
}  // namespace rf::RF_ISA
