// The extension module ramp_fast._C: CPU kernels on DLPack views and CUDA kernels on addresses, free of
// libtorch.
#include "bind/bind.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU and CUDA kernels of ramp_fast.";
    m.attr("__version__") = RF_VERSION;
    m.def("bind_openmp", &rf::bind_openmp, rf::py::arg("libtorch"),
          "Use the OpenMP pool of the loaded libtorch_cpu at this path; returns the library that provides "
          "it, or ''.");
    m.def("supported_isas", &rf::supported_isas, "Instruction sets that this build and processor support.");
    m.def("active_isa", &rf::active_isa, "The instruction set in use.");
    m.def("set_isa", &rf::set_isa, rf::py::arg("name"),
          "Choose the instruction set; ValueError if it cannot run.");
    m.def("poison_scratch", &rf::poison_scratch, rf::py::arg("enabled"),
          "Fill the kernels' scratch with NaN before every use (for tests).");
    rf::register_activation(m);
    rf::register_attention(m);
    rf::register_by_channel(m);
    rf::register_checksum(m);
    rf::register_depthwise(m);
    rf::register_gating(m);
    rf::register_junction(m);
    rf::register_linear(m);
    rf::register_masking(m);
    rf::register_masses(m);
    rf::register_max_pool(m);
    rf::register_norm(m);
    rf::register_phases(m);
    rf::register_pieces(m);
    rf::register_product(m);
    rf::register_rotary(m);
    rf::register_scaling(m);
    rf::register_softmax(m);
#ifdef RF_HAVE_CUDA
    m.attr("has_cuda") = true;
    rf::register_cuda(m);
#else
    m.attr("has_cuda") = false;
#endif
}
