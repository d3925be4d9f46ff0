// What the CUDA kernels do is what the CPU kernels do (cpu/kernels.h); operands are in the memory of one
// device.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace rf::cuda {

// Where kernels run. They are started and not waited for.
struct Place {
    int device;    // made current for the call only
    void* stream;  // a cudaStream_t
};

// Why the kernels cannot run on this device (its driver or architecture is too old); empty if they can.
std::string problem(int device);

// These throw std::runtime_error if CUDA refuses; `threads` is ignored.
void mask_steps(const MaskStepsArgs& args, const Place& place);
void masked_copies(const MaskedCopiesArgs& args, const Place& place);

}  // namespace rf::cuda
