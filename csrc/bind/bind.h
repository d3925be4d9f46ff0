#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "tensor_view.h"

namespace rf {

void register_activation(py::module_& m);
void register_attention(py::module_& m);
void register_checksum(py::module_& m);
void register_cuda(py::module_& m);  // where RF_HAVE_CUDA
void register_junction(py::module_& m);
void register_linear(py::module_& m);
void register_masking(py::module_& m);
void register_masses(py::module_& m);
void register_max_pool(py::module_& m);
void register_norm(py::module_& m);
void register_phases(py::module_& m);

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

// Checks a scale [T, B] that belongs to c.
void check_per_sample(const TensorView& scale, const TensorView& c);

// Checks gain and shift [C] of c [T, B, ..., C], which is contiguous from axis 1 on.
void check_channels(const TensorView& gain, const TensorView& shift, const TensorView& c);

// Checks a mass [T, B] of c, which is written in float32 or float64.
void check_mass(const TensorView& mass, const TensorView& c);

}  // namespace rf
