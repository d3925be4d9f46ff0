// The CUDA kernels on the host behind the bindings that the extension has for them.
#include <stdexcept>

#include "bind/cuda.cpp"
#include "cuda/masking.cu"

namespace rf {

void fail(const std::string& message) {
    throw std::invalid_argument(message);
}

}  // namespace rf

PYBIND11_MODULE(cuda_on_host, m) {
    rf::register_cuda(m);
    m.def("set_order", [](unsigned order) { host::order = order; });
    m.def("current_device", [] { return cuda_device; });
}
