// A parallel loop on the OpenMP pool that PyTorch already runs.
//
// Two OpenMP runtimes in a process have two pools, whose idle threads spin and take time from each other, and
// PyTorch's wheels have shipped theirs under different file names. So none is linked: `bind_openmp` looks up
// `GOMP_parallel` and `omp_get_thread_num` among the libraries that libtorch_cpu itself uses (libgomp, or
// LLVM's and Intel's runtimes, which export the same entry points). Where it is not found the loops run
// serially.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace rf {

// `libtorch` is the path of the loaded libtorch_cpu. Returns the file that provides the pool, or "".
std::string bind_openmp(const std::string& libtorch);

using Task = void (*)(std::int64_t index, const void* context, void* scratch);

// Fills the scratch with NaN before every task, so that what a kernel reads without having written it shows.
void poison_scratch(bool enabled);

// Calls task(i, context, scratch) once for every i in [0, count), on at most `threads` threads, each with a
// range of its own first (fewer for little work, which is the number of elements of all tasks), each with
// `scratch_bytes` of its own, uninitialised and aligned to 64. Throws std::bad_alloc before any call.
void parallel_for(std::int64_t count, std::int64_t work, int threads, Task task, const void* context,
                  std::size_t scratch_bytes);

// Builds with AddressSanitizer leave this much room behind every part of the scratch and report its use;
// to the sanitizer itself the parts are one allocation.
#ifdef RF_SANITIZE
constexpr std::size_t kGuard = 64;
#else
constexpr std::size_t kGuard = 0;
#endif
void guard(char* begin, char* end);

// Scratch that all tasks share, uninitialised (or NaN) and aligned to 64.
class Scratch {
  public:
    explicit Scratch(std::size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* data() const { return data_; }

  private:
    char* data_;
};

// Scratch for partial sums, full of NaN: a slot that was never written shows in the result.
class Partials {
  public:
    explicit Partials(std::int64_t count);
    ~Partials();
    Partials(const Partials&) = delete;
    Partials& operator=(const Partials&) = delete;
    double* data() const { return data_; }

  private:
    double* data_;
};

}  // namespace rf
