// Bindings of the CUDA kernels. Python has checked shapes and layouts (ops/masking.py) and passes addresses
// of contiguous memory, the size of an element, the device and the address of its current stream.
#include <cstdint>
#include <vector>

#include "bind/bind.h"
#include "cuda/kernels.h"

namespace rf {
namespace {

Operand floats(std::uintptr_t address, int item_size) {
    if (item_size != 2 && item_size != 4 && item_size != 8)
        fail("elements are bfloat16, float32 or float64, not of " + std::to_string(item_size) + " bytes");
    const DType dtype = item_size == 8 ? DType::f64 : item_size == 4 ? DType::f32 : DType::bf16;
    return {reinterpret_cast<void*>(address), dtype};
}

Operand int32s(std::uintptr_t address) {
    return {reinterpret_cast<void*>(address), DType::i32};
}

cuda::Place place(int device, std::uintptr_t stream) {
    return {device, reinterpret_cast<void*>(stream)};
}

void mask_steps(std::uintptr_t scores, int item_size, std::int64_t batch, std::int64_t count,
                const std::vector<std::int64_t>& ks, bool descending, std::uintptr_t out, int device,
                std::uintptr_t stream) {
    MaskStepsArgs args{};
    args.batch = batch;
    args.count = count;
    args.steps = static_cast<std::int64_t>(ks.size());
    args.descending = descending;
    args.ks = ks.data();
    args.scores = floats(scores, item_size);
    args.out = int32s(out);
    py::gil_scoped_release release;
    cuda::mask_steps(args, place(device, stream));
}

void masked_copies(std::uintptr_t images, std::uintptr_t steps, std::uintptr_t baseline, int item_size,
                   std::int64_t batch, std::int64_t channels, std::int64_t pixels, std::int64_t first,
                   std::int64_t last, bool shared, bool shared_baseline, bool channels_last, bool reveal,
                   std::uintptr_t out, int device, std::uintptr_t stream) {
    MaskedCopiesArgs args{};
    args.batch = batch;
    args.channels = channels;
    args.pixels = pixels;
    args.first = first;
    args.last = last;
    args.shared = shared;
    args.shared_baseline = shared_baseline;
    args.channels_last = channels_last;
    args.reveal = reveal;
    args.images = floats(images, item_size);
    args.masked = int32s(steps);
    args.baseline = floats(baseline, item_size);
    args.out = floats(out, item_size);
    py::gil_scoped_release release;
    cuda::masked_copies(args, place(device, stream));
}

}  // namespace

void register_cuda(py::module_& m) {
    m.def("cuda_problem", &cuda::problem, py::arg("device"),
          "Why the CUDA kernels cannot run on this device, or ''.");
    m.def("cuda_mask_steps", &mask_steps);
    m.def("cuda_masked_copies", &masked_copies);
}

}  // namespace rf
