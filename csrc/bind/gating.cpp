// Bindings: gating_pullback, rescale_pieces.
#include <algorithm>
#include <vector>

#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

// From sample to sample and from row to row of x [B, rows, width].
void set_strides(std::int64_t* strides, const TensorView& x) {
    if (x.size(2) > 1 && x.stride(2) != 1) fail(x.describe() + " must be contiguous along its last axis");
    strides[0] = x.stride(0);
    strides[1] = x.stride(1);
}

void gating_pullback(py::handle c_, py::handle a_, py::handle b_, py::handle x_, py::handle factor_,
                     bool contrast, py::handle c_a_, py::handle c_b_, py::handle mass_a_, py::handle mass_b_,
                     int threads) {
    const TensorView c(c_, "c"), a(a_, "a"), b(b_, "b"), c_a(c_a_, "c_a"), c_b(c_b_, "c_b"),
        mass_a(mass_a_, "mass_a"), mass_b(mass_b_, "mass_b");
    const auto x = optional_view(x_, "x"), factor = optional_view(factor_, "factor");
    check_coefficient(c, contrast);
    if (c.ndim() != 4) fail(c.describe() + " must be [T, B, rows, width]");
    if (x.has_value() != factor.has_value()) fail("x and factor belong together");
    c.contiguous();
    GatingArgs args{};
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.rows = c.size(2);
    args.width = c.size(3);
    for (const TensorView* value : {&a, &b}) value->shaped({args.batch, args.rows, args.width});
    if (x) {
        x->shaped({args.batch, args.rows, args.width});
        factor->shaped({args.batch, args.rows, args.width}).contiguous();
        set_strides(args.of_x, *x);
    }
    for (const TensorView* out : {&c_a, &c_b}) out->same_shape(c).contiguous();
    check_mass(mass_a, c);
    check_mass(mass_b, c);
    args.contrast = contrast;
    args.c = c.operand();
    args.a = a.operand();
    args.b = b.operand();
    args.x = operand_or_null(x);
    args.factor = operand_or_null(factor);
    set_strides(args.of_a, a);
    set_strides(args.of_b, b);
    args.c_a = c_a.operand();
    args.c_b = c_b.operand();
    args.mass_a = mass_a.operand();
    args.mass_b = mass_b.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL_ROUNDING(gating_pullback, args);
}

void rescale_pieces(const std::vector<py::object>& pieces, py::handle scale_, bool contrast, py::handle out_,
                    int threads) {
    const TensorView scale(scale_, "scale"), out(out_, "out");
    const std::int64_t count = static_cast<std::int64_t>(pieces.size());
    if (out.ndim() != 6 || out.size(3) != count)
        fail(out.describe() + " must be [T, B, N, pieces, H, D] for as many pieces");
    out.contiguous();
    const std::int64_t T = out.size(0), B = out.size(1), N = out.size(2), H = out.size(4), D = out.size(5);
    scale.contiguous().shaped({count, T, B});
    std::vector<PlaceArgs> jobs;
    for (std::int64_t i = 0; i < count; ++i) {
        const TensorView c(pieces[static_cast<std::size_t>(i)], "piece");
        check_coefficient(c, contrast);
        c.shaped({T, B, H, N, D});
        if (D > 1 && c.numel() > 0 && c.stride(-1) != 1)
            fail(c.describe() + " must be contiguous along its last axis");
        PlaceArgs args{};
        args.num_maps = T;
        args.batch = B;
        args.heads = H;
        args.rows = N;
        args.width = D;
        args.contrast = contrast;
        args.c = {c.operand(), {c.stride(0), c.stride(1), c.stride(2), c.stride(3)}};
        Operand to = out.operand(), own = scale.operand();
        to.data = static_cast<char*>(to.data) + i * H * D * item_size(to.dtype);
        own.data = static_cast<char*>(own.data) + i * T * B * item_size(own.dtype);
        const std::int64_t row = count * H * D;
        args.out = {to, {B * N * row, N * row, D, row}};
        args.scale = own;
        args.threads = threads;
        jobs.push_back(args);
    }
    py::gil_scoped_release release;
    for (const PlaceArgs& args : jobs) RF_CALL_ROUNDING(rescale_piece, args);
}

}  // namespace

void register_gating(py::module_& m) {
    m.def("gating_pullback", &gating_pullback);
    m.def("rescale_pieces", &rescale_pieces);
}

}  // namespace rf
