// The part of the DLPack ABI (https://github.com/dmlc/dlpack, Apache-2.0) that this extension reads.
#pragma once

#include <cstdint>

namespace rf::dlpack {

constexpr std::int32_t kCPU = 1;
constexpr std::uint8_t kInt = 0;
constexpr std::uint8_t kFloat = 2;
constexpr std::uint8_t kBfloat = 4;

struct Device {
    std::int32_t type;
    std::int32_t id;
};

struct DataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; may be null for a contiguous tensor before DLPack 1.2
    std::uint64_t byte_offset;
};

struct Version {
    std::uint32_t major;
    std::uint32_t minor;
};

struct ManagedTensor {
    Tensor tensor;
    void* manager;
    void (*deleter)(ManagedTensor*);
};

struct ManagedTensorVersioned {
    Version version;
    void* manager;
    void (*deleter)(ManagedTensorVersioned*);
    std::uint64_t flags;
    Tensor tensor;
};

// `type(tensor).__dlpack_c_exchange_api__`: borrows a view in some 50 ns, where a capsule takes 500 ns or
// more.
struct ExchangeApi {
    struct Header {
        Version version;
        Header* previous;
    } header;
    void* allocate;
    int (*export_managed)(void* object, ManagedTensorVersioned** out);
    void* import_managed;
    int (*borrow)(void* object, Tensor* out);  // may be null
    void* current_stream;
};

}  // namespace rf::dlpack
