// Bindings and kernels of arithmetic on masses [T, B]: share, scale_to. They are so few numbers that one loop
// on one thread does, whatever the instruction set.
#include <vector>

#include "bind/bind.h"

namespace rf {
namespace {

void check_like(const TensorView& view, const TensorView& target) {
    if (view.dtype() != target.dtype() || view.dtype() == DType::bf16)
        fail(view.describe() + " and " + target.describe() + " must both be float32 or float64");
    view.contiguous().same_shape(target.contiguous());
}

template <class F>
F quotient(F a, F b) {
    return b == 0 ? F(0) : a / b;
}

template <class F>
void share_of(const TensorView& target, const std::vector<TensorView>& masses, const TensorView& out) {
    const std::int64_t n = target.numel();
    const F* t = static_cast<const F*>(target.operand().data);
    F* shares = static_cast<F*>(out.operand().data);
    for (std::int64_t i = 0; i < n; ++i) {
        F whole = 0;
        for (const TensorView& mass : masses) whole += static_cast<const F*>(mass.operand().data)[i];
        for (std::size_t k = 0; k < masses.size(); ++k)
            shares[static_cast<std::int64_t>(k) * n + i] =
                t[i] * quotient(static_cast<const F*>(masses[k].operand().data)[i], whole);
    }
}

void share(py::handle target_, const std::vector<py::object>& masses_, py::handle out_, int) {
    const TensorView target(target_, "target"), out(out_, "out");
    std::vector<TensorView> masses;
    for (const py::object& mass : masses_) {
        masses.emplace_back(mass, "mass");
        check_like(masses.back(), target);
    }
    if (out.dtype() != target.dtype() || out.ndim() != target.ndim() + 1 ||
        out.size(0) != static_cast<std::int64_t>(masses.size()))
        fail(out.describe() + " must hold " + std::to_string(masses.size()) + " times " + target.describe());
    out.contiguous().matches(1, target, 0, target.ndim());
    py::gil_scoped_release release;
    target.dtype() == DType::f64 ? share_of<double>(target, masses, out)
                                 : share_of<float>(target, masses, out);
}

template <class F>
void scale_of(const TensorView& target, const TensorView& actual, const TensorView& scale,
              const TensorView& mass) {
    const F* t = static_cast<const F*>(target.operand().data);
    const F* a = static_cast<const F*>(actual.operand().data);
    F* scales = static_cast<F*>(scale.operand().data);
    F* masses = static_cast<F*>(mass.operand().data);
    for (std::int64_t i = 0; i < target.numel(); ++i) {
        scales[i] = quotient(t[i], a[i]);
        masses[i] = a[i] > 0 ? t[i] : F(0);
    }
}

void scale_to(py::handle target_, py::handle actual_, py::handle scale_, py::handle mass_, int) {
    const TensorView target(target_, "target"), actual(actual_, "actual");
    const TensorView scale(scale_, "scale"), mass(mass_, "mass");
    for (const TensorView* view : {&actual, &scale, &mass}) check_like(*view, target);
    py::gil_scoped_release release;
    target.dtype() == DType::f64 ? scale_of<double>(target, actual, scale, mass)
                                 : scale_of<float>(target, actual, scale, mass);
}

}  // namespace

void register_masses(py::module_& m) {
    m.def("share", &share);
    m.def("scale_to", &scale_to);
}

}  // namespace rf
