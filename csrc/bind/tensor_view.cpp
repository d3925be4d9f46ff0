#include "tensor_view.h"

#include <memory>
#include <stdexcept>

#include "bind/bind.h"

namespace rf {
namespace {

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    // One producer type in practice; the extension holds the GIL here.
    static PyTypeObject* known_type = nullptr;
    static const dlpack::ExchangeApi* known_api = nullptr;
    if (type == known_type) return known_api;
    const dlpack::ExchangeApi* api = nullptr;
    py::handle handle(reinterpret_cast<PyObject*>(type));
    if (py::hasattr(handle, "__dlpack_c_exchange_api__")) {
        const py::object capsule = handle.attr("__dlpack_c_exchange_api__");
        if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
            api = static_cast<const dlpack::ExchangeApi*>(
                PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        while (api != nullptr && api->header.version.major != 1)
            api = reinterpret_cast<const dlpack::ExchangeApi*>(api->header.previous);
        if (api != nullptr && api->borrow == nullptr) api = nullptr;
    }
    Py_INCREF(handle.ptr());
    Py_XDECREF(known_type);
    known_type = type;
    known_api = api;
    return api;
}

template <class Managed>
struct Consumed {
    // Takes the tensor out of its capsule, which is renamed so that its owner does not free it as well.
    Consumed(const py::object& capsule, const char* name, const char* used)
        : managed(static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), name))) {
        if (managed == nullptr) throw py::error_already_set();
        PyCapsule_SetName(capsule.ptr(), used);
    }
    ~Consumed() {
        if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
    }
    Consumed(const Consumed&) = delete;
    Consumed& operator=(const Consumed&) = delete;
    Managed* managed;
};

std::string shape_text(const std::int64_t* shape, int ndim) {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

}  // namespace

void fail(const std::string& message) {
    throw std::invalid_argument(message);
}

TensorView::TensorView(py::handle object, const char* name, Elements elements) : name_(name) {
    if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
        dlpack::Tensor tensor;
        if (api->borrow(object.ptr(), &tensor) != 0) throw py::error_already_set();
        adopt(tensor, elements);
        return;
    }
    if (!py::hasattr(object, "__dlpack__"))
        throw py::type_error(std::string(name) + " must be a tensor, got " +
                             py::str(py::type::of(object)).cast<std::string>());
    const py::object capsule = object.attr("__dlpack__")();
    // The producer's own reference (the bound function's argument) keeps the memory alive after the deleter.
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
        Consumed<dlpack::ManagedTensorVersioned> consumed(capsule, "dltensor_versioned",
                                                          "used_dltensor_versioned");
        if (consumed.managed->version.major != 1) fail(std::string(name) + ": unknown DLPack version");
        adopt(consumed.managed->tensor, elements);
    } else {
        Consumed<dlpack::ManagedTensor> consumed(capsule, "dltensor", "used_dltensor");
        adopt(consumed.managed->tensor, elements);
    }
}

void TensorView::adopt(const dlpack::Tensor& tensor, Elements elements) {
    if (tensor.device.type != dlpack::kCPU) fail(std::string(name_) + " must be on the CPU");
    if (tensor.ndim > kMaxDims)
        fail(std::string(name_) + " has " + std::to_string(tensor.ndim) + " axes; at most " +
             std::to_string(kMaxDims) + " are supported");
    const dlpack::DataType dtype = tensor.dtype;
    if (dtype.lanes != 1)
        fail(std::string(name_) + " has a vector dtype");
    else if (elements == Elements::int32 && (dtype.code != dlpack::kInt || dtype.bits != 32))
        fail(std::string(name_) + " must be int32");
    else if (elements == Elements::int32)
        dtype_ = DType::i32;
    else if (dtype.code == dlpack::kFloat && dtype.bits == 32)
        dtype_ = DType::f32;
    else if (dtype.code == dlpack::kFloat && dtype.bits == 64)
        dtype_ = DType::f64;
    else if (dtype.code == dlpack::kBfloat && dtype.bits == 16)
        dtype_ = DType::bf16;
    else
        fail(std::string(name_) + " must be float32, float64 or bfloat16");
    data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
    ndim_ = tensor.ndim;
    std::int64_t run = 1;
    for (int i = ndim_ - 1; i >= 0; --i) {
        shape_[i] = tensor.shape[i];
        strides_[i] = tensor.strides != nullptr ? tensor.strides[i] : run;
        run *= shape_[i];
    }
}

std::int64_t TensorView::product(int first, int last) const {
    std::int64_t result = 1;
    for (int i = first; i < last; ++i) result *= shape_[i];
    return result;
}

std::string TensorView::describe() const {
    return std::string(name_) + " " + shape_text(shape_.data(), ndim_);
}

bool TensorView::is_contiguous() const {
    if (numel() == 0) return true;
    std::int64_t run = 1;
    for (int i = ndim_ - 1; i >= 0; --i) {
        if (shape_[i] != 1 && strides_[i] != run) return false;
        run *= shape_[i];
    }
    return true;
}

const TensorView& TensorView::contiguous() const {
    if (!is_contiguous()) fail(describe() + " must be contiguous");
    return *this;
}

const TensorView& TensorView::shaped(std::initializer_list<std::int64_t> shape) const {
    bool equal = static_cast<int>(shape.size()) == ndim_;
    int axis = 0;
    for (std::int64_t size : shape) equal = equal && shape_[axis++] == size;
    if (!equal)
        fail(describe() + " must have shape " + shape_text(shape.begin(), static_cast<int>(shape.size())));
    return *this;
}

const TensorView& TensorView::same_shape(const TensorView& other) const {
    return matches(0, other, 0, ndim_ > other.ndim_ ? ndim_ : other.ndim_);
}

const TensorView& TensorView::matches(int axis, const TensorView& other, int other_axis, int n) const {
    bool equal = axis + n <= ndim_ && other_axis + n <= other.ndim_;
    for (int i = 0; equal && i < n; ++i) equal = shape_[axis + i] == other.shape_[other_axis + i];
    if (!equal) fail("the shapes of " + describe() + " and " + other.describe() + " do not fit together");
    return *this;
}

const TensorView& TensorView::same_layout(int axis, const TensorView& other, int other_axis) const {
    const int n = ndim_ - axis;
    if (n != other.ndim_ - other_axis)
        fail("the shapes of " + describe() + " and " + other.describe() + " do not fit together");
    matches(axis, other, other_axis, n);
    if (numel() == 0 || other.numel() == 0) return *this;
    bool same = true;
    for (int i = 0; i < n; ++i)
        same = same && (shape_[axis + i] == 1 || strides_[axis + i] == other.strides_[other_axis + i]);
    // Leading axes (maps, then samples) must be outermost, and the memory dense: each axis, taken
    // by increasing stride, starts where the ones before it end.
    std::int64_t run = 1;
    for (int left = ndim_ - (axis + 1); same && left > 0; --left) {
        int next = -1;
        for (int i = axis + 1; i < ndim_; ++i)
            if (shape_[i] != 1 && strides_[i] == run) next = i;
        if (next < 0) break;
        run *= shape_[next];
    }
    same = same && run == product(axis + 1, ndim_);
    for (int i = axis; same && i >= 0; --i) {
        same = shape_[i] == 1 || strides_[i] == run;
        run *= shape_[i];
    }
    if (!same)
        fail(describe() + " and " + other.describe() + " must be dense and have the same memory layout");
    return *this;
}

void check_coefficient(const TensorView& c, bool contrast) {
    if (c.ndim() < 2) fail(c.describe() + " must be [T, B, ...]");
    if (contrast && c.size(0) % 2 != 0)
        fail(c.describe() + ": with contrast the first axis holds P and D rows and must be even");
}

void check_samples(const TensorView& x, const TensorView& c) {
    c.same_layout(1, x, 0);
    x.same_layout(0, c, 1);
}

void check_output(const TensorView& out, const TensorView& c) {
    out.same_layout(1, c, 1).matches(0, c, 0, 1);
}

void check_per_sample(const TensorView& scale, const TensorView& c) {
    scale.shaped({c.size(0), c.size(1)}).contiguous();
}

void check_readers(const TensorView& first, const TensorView& first_scale, const TensorView& second,
                   const TensorView& second_scale) {
    first.same_layout(1, second, 1);
    check_output(second, first);
    check_per_sample(first_scale, first);
    check_per_sample(second_scale, first);
}

void check_mass(const TensorView& mass, const TensorView& c) {
    check_per_sample(mass, c);
    if (mass.dtype() == DType::bf16) fail(mass.describe() + " is written as float32 or float64");
}

void check_channels(const TensorView& gain, const TensorView& shift, const TensorView& c) {
    c.contiguous();
    if (c.ndim() < 3) fail(c.describe() + " must be [T, B, ..., C]");
    gain.contiguous().shaped({c.size(-1)});
    shift.contiguous().shaped({c.size(-1)});
}

}  // namespace rf
