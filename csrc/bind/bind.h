#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "tensor_view.h"

namespace rf {

// The binding of a CPU kernel has the name of its operator in ramp_fast/ops and takes the operator's
// arguments in their order, without dtypes, which the outputs have; then the outputs, allocated and not
// written yet; then the number of threads. `operator` in ramp_fast/ops/_registry.py calls it like that. Some
// have arguments more, between the two, which a function in ramp_fast/ops passes.
void register_activation(py::module_& m);
void register_attention(py::module_& m);
void register_by_channel(py::module_& m);
void register_checksum(py::module_& m);
void register_cuda(py::module_& m);  // where RF_HAVE_CUDA
void register_depthwise(py::module_& m);
void register_gating(py::module_& m);
void register_junction(py::module_& m);
void register_linear(py::module_& m);
void register_masking(py::module_& m);
void register_masses(py::module_& m);
void register_max_pool(py::module_& m);
void register_norm(py::module_& m);
void register_phases(py::module_& m);
void register_pieces(py::module_& m);
void register_product(py::module_& m);
void register_rotary(py::module_& m);
void register_scaling(py::module_& m);
void register_softmax(py::module_& m);

// An absent optional tensor is None.
inline std::optional<TensorView> optional_view(py::handle object, const char* name) {
    if (object.is_none()) return std::nullopt;
    return TensorView(object, name);
}

inline Operand operand_or_null(const std::optional<TensorView>& view) {
    return view ? view->operand() : Operand{};
}

// Checks c [T, B, ...]; T must be even with contrast.
void check_coefficient(const TensorView& c, bool contrast);

// Sets the sizes of coefficients c [T, B, ...].
template <class Args>
void set_sizes(Args& args, const TensorView& c) {
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.inner = c.product(2, c.ndim());
}

// Checks that samples x [B, ...] lie in memory as those of c [T, B, ...] do.
void check_samples(const TensorView& x, const TensorView& c);

// Checks that the coefficients `out` have the shape of c and lie in memory as c does.
void check_output(const TensorView& out, const TensorView& c);

// Checks a scale [T, B] that belongs to c.
void check_per_sample(const TensorView& scale, const TensorView& c);

// Checks the coefficients [T, B, ...] of two readers, in one memory layout, and their scales [T, B].
void check_readers(const TensorView& first, const TensorView& first_scale, const TensorView& second,
                   const TensorView& second_scale);

// Checks gain and shift [C] of c [T, B, ..., C], which is contiguous from axis 1 on.
void check_channels(const TensorView& gain, const TensorView& shift, const TensorView& c);

// Checks a mass [T, B] of c, which is written in float32 or float64.
void check_mass(const TensorView& mass, const TensorView& c);

}  // namespace rf
