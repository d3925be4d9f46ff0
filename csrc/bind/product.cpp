// Binding: product.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void product(py::handle x_, py::handle tiles_, py::handle bias_, py::handle out_, int threads) {
    const TensorView x(x_, "x"), out(out_, "out");
    const bool bytes = x.dtype() == DType::f32;
    const TensorView tiles(tiles_, "tiles", bytes ? Elements::int32 : Elements::floating);
    const auto bias = optional_view(bias_, "bias");
    if (x.ndim() != 2 || out.ndim() != 2)
        fail("x and out must be matrices: " + x.describe() + ", " + out.describe());
    out.matches(0, x, 0, 1);
    ProductArgs args{};
    args.rows = x.size(0);
    args.depth = x.size(1);
    args.width = out.size(1);
    if (x.dtype() == DType::f64 || out.dtype() != x.dtype() || (bias && bias->dtype() != DType::f32) ||
        (!bytes && tiles.dtype() != DType::bf16))
        fail(
            "x and out must both be float32 or bfloat16, bias float32, and tiles int32 for float32 x, else "
            "bfloat16: " +
            x.describe() + ", " + out.describe() + ", " + tiles.describe());
    if (args.depth < 1 || (bytes && args.depth > kInt8Depth))
        fail("x must have at least one column, and of float32 at most " + std::to_string(kInt8Depth) + ": " +
             x.describe());
    if (bytes)
        tiles.shaped({(args.width + 15) / 16, 3 * ((args.depth + 63) / 64) + 1, 16, 16});
    else
        tiles.shaped({(args.width + 31) / 32, (args.depth + 31) / 32, 2, 16, 32});
    if (bias) bias->shaped({args.width}).contiguous();
    args.x = x.contiguous().operand();
    args.tiles = tiles.contiguous().operand();
    args.bias = operand_or_null(bias);
    args.out = out.contiguous().operand();
    args.threads = threads;
#ifdef RF_HAVE_AMX
    if (current_isa() == Isa::amx) {
        py::gil_scoped_release release;
        return amx::product(args);
    }
#endif
    fail("product runs on the instruction set 'amx' only; in use: '" + active_isa() + "'");
}

}  // namespace

void register_product(py::module_& m) {
    m.def("product", &product);
}

}  // namespace rf
