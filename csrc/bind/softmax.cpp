// Binding: softmax_pullback.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

void softmax_pullback(py::handle scores_, py::handle c_, py::handle out_, int threads) {
    const TensorView scores(scores_, "scores"), c(c_, "c"), out(out_, "out");
    if (scores.ndim() < 1 || c.ndim() != scores.ndim() + 1)
        fail("c must have one axis more than the scores: " + scores.describe() + ", " + c.describe());
    scores.matches(0, c, 1, scores.ndim());
    out.same_shape(c);
    SoftmaxArgs args{};
    args.num_maps = c.size(0);
    args.rows = scores.product(0, scores.ndim() - 1);
    args.width = scores.size(-1);
    args.scores = scores.contiguous().operand();
    args.c = c.contiguous().operand();
    args.out = out.contiguous().operand();
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL(softmax_pullback, args);
}

}  // namespace

void register_softmax(py::module_& m) {
    m.def("softmax_pullback", &softmax_pullback);
}

}  // namespace rf
