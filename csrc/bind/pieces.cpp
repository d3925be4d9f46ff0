// Bindings: piece_masses, merge_pieces.
#include <vector>

#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void piece_masses(py::handle c_, py::handle x_, const std::vector<std::int64_t>& widths, bool contrast,
                  py::handle masses_, int threads) {
    const TensorView c(c_, "c"), x(x_, "x"), masses(masses_, "masses");
    check_coefficient(c, contrast);
    if (c.ndim() != 4) fail(c.describe() + " must be [T, B, rows, C]");
    c.contiguous();
    x.shaped({c.size(1), c.size(2), c.size(3)}).contiguous();
    PieceMassArgs args{};
    args.num_maps = c.size(0);
    args.batch = c.size(1);
    args.rows = c.size(2);
    args.channels = c.size(3);
    args.pieces = static_cast<std::int64_t>(widths.size());
    std::int64_t all = 0;
    for (const std::int64_t width : widths) {
        if (width < 0) fail("widths must not be negative");
        all += width;
    }
    if (all != args.channels) fail("widths must add up to the channels of " + c.describe());
    masses.shaped({args.pieces, args.num_maps, args.batch}).contiguous();
    if (masses.dtype() == DType::bf16) fail(masses.describe() + " must be float32 or float64");
    args.contrast = contrast;
    args.widths = widths.data();
    args.c = c.operand();
    args.x = x.operand();
    args.masses = masses.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(piece_masses, args);
}

void merge_pieces(const std::vector<py::object>& pieces_, py::handle scales_, bool contrast, py::handle out_,
                  int threads) {
    const TensorView scales(scales_, "scales"), out(out_, "out");
    check_coefficient(out, contrast);
    if (out.ndim() != 4) fail(out.describe() + " must be [T, B, rows, C]");
    out.contiguous();
    MergePiecesArgs args{};
    args.num_maps = out.size(0);
    args.batch = out.size(1);
    args.rows = out.size(2);
    args.channels = out.size(3);
    args.pieces = static_cast<std::int64_t>(pieces_.size());
    if (args.pieces == 0) fail("pieces: there are none");
    std::vector<StridedOperand> from;
    for (const py::object& object : pieces_) {
        const TensorView piece(object, "piece");
        piece.same_shape(out);
        if (piece.dtype() != out.dtype())
            fail(piece.describe() + " must have the dtype of " + out.describe());
        if (piece.size(3) > 1 && piece.stride(3) != 1)
            fail(piece.describe() + " must be contiguous along its last axis");
        from.push_back({piece.operand(), {piece.stride(0), piece.stride(1), piece.stride(2), 1}});
    }
    scales.shaped({args.pieces, args.num_maps, args.batch}).contiguous();
    args.contrast = contrast;
    args.from = from.data();
    args.scales = scales.operand();
    args.out = out.operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(merge_pieces, args);
}

}  // namespace

void register_pieces(py::module_& m) {
    m.def("piece_masses", &piece_masses);
    m.def("merge_pieces", &merge_pieces);
}

}  // namespace rf
