// Binding: checksum.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

template <class T>
T* data_of(const py::buffer& buffer, const char* name, py::ssize_t count, bool writable) {
    const py::buffer_info info = buffer.request(writable);
    if (info.ndim != 1 || info.shape[0] != count || info.itemsize != static_cast<py::ssize_t>(sizeof(T)) ||
        (count > 1 && info.strides[0] != info.itemsize))
        throw py::value_error(std::string(name) + " must be a contiguous array of " + std::to_string(count) +
                              " numbers of " + std::to_string(sizeof(T)) + " bytes");
    return static_cast<T*>(info.ptr);
}

void checksum(const py::buffer& addresses, const py::buffer& bytes, const py::buffer& sampled,
              const py::buffer& out, int threads) {
    ChecksumArgs args{};
    args.count = addresses.request().size;
    args.addresses = data_of<std::uint64_t>(addresses, "addresses", args.count, false);
    args.bytes = data_of<std::int64_t>(bytes, "bytes", args.count, false);
    args.sampled = data_of<std::uint8_t>(sampled, "sampled", args.count, false);
    args.out = data_of<std::uint64_t>(out, "out", args.count, true);
    for (std::int64_t i = 0; i < args.count; ++i) {
        if (args.bytes[i] < 0) throw py::value_error("bytes must not be negative");
        args.total += args.bytes[i];
    }
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(checksum, args);
}

}  // namespace

void register_checksum(py::module_& m) {
    m.def("checksum", &checksum);
}

}  // namespace rf
