// Typed views of Python tensors through DLPack: dtype, device and layout are checked here, shapes by the
// bindings.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <initializer_list>
#include <string>

#include "cpu/kernels.h"
#include "dlpack.h"

namespace rf {

namespace py = pybind11;

constexpr int kMaxDims = 8;

enum class Elements { floating, int32 };

// A CPU tensor of a supported floating dtype, or of int32 where that is asked for. Borrows: valid while the
// Python object is alive and unchanged, which the arguments of a bound function are.
class TensorView {
  public:
    TensorView(py::handle object, const char* name, Elements elements = Elements::floating);

    const char* name() const { return name_; }
    int ndim() const { return ndim_; }
    DType dtype() const { return dtype_; }
    std::int64_t size(int axis) const { return shape_[axis < 0 ? axis + ndim_ : axis]; }
    std::int64_t stride(int axis) const { return strides_[axis < 0 ? axis + ndim_ : axis]; }
    std::int64_t numel() const { return product(0, ndim_); }
    // Product of the sizes of axes [first, last).
    std::int64_t product(int first, int last) const;
    Operand operand() const { return {data_, dtype_}; }

    bool is_contiguous() const;
    const TensorView& contiguous() const;
    const TensorView& shaped(std::initializer_list<std::int64_t> shape) const;
    const TensorView& same_shape(const TensorView& other) const;
    // Checks that axes [axis, axis + n) equal those of `other` from `other_axis` on.
    const TensorView& matches(int axis, const TensorView& other, int other_axis, int n) const;
    // Checks that memory from `axis` on is one dense run in the same element order as `other` from
    // `other_axis` on (any permutation of the inner axes, such as channels-last), axis by axis outermost
    // first.
    const TensorView& same_layout(int axis, const TensorView& other, int other_axis) const;

    std::string describe() const;

  private:
    void adopt(const dlpack::Tensor& tensor, Elements elements);

    const char* name_;
    void* data_ = nullptr;
    DType dtype_ = DType::f32;
    int ndim_ = 0;
    std::array<std::int64_t, kMaxDims> shape_{};
    std::array<std::int64_t, kMaxDims> strides_{};
};

[[noreturn]] void fail(const std::string& message);

}  // namespace rf
