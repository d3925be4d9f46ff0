// Bindings: attention_pullback, attention_gradient.
#include "bind/bind.h"
#include "cpu/dispatch.h"

namespace rf {
namespace {

// [B, H, rows, D] or, with `maps`, [T, B, H, rows, D].
StridedOperand strided(const TensorView& x, bool maps) {
    if (x.size(-1) > 1 && x.stride(-1) != 1) fail(x.describe() + " must be contiguous along its last axis");
    const int first = maps ? 1 : 0;
    return {x.operand(), {maps ? x.stride(0) : 0, x.stride(first), x.stride(first + 1), x.stride(first + 2)}};
}

// [G, H, N, M] where sample b has bias b % G; absent, or empty, which adds nothing.
template <class Args>
void set_bias(Args& args, const std::optional<TensorView>& bias) {
    args.biases = 1;
    if (!bias) return;
    if (bias->ndim() != 4 || bias->size(0) < 1 || args.batch % bias->size(0) != 0)
        fail("bias must be [G, H, N, M] with G a divisor of the batch: " + bias->describe());
    bias->shaped({bias->size(0), args.heads, args.queries, args.keys});
    args.biases = bias->size(0);
    args.bias = strided(*bias, false);
}

// Checks the shapes of what both have, and sets them and the operands.
template <class Args>
void check_shapes(Args& args, const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& c, const TensorView& c_q, const TensorView& c_k, const TensorView& c_v,
                  bool contrast) {
    if (q.ndim() != 4) fail("q must be [B, H, N, D]: " + q.describe());
    if (k.ndim() != 4) fail("k must be [B, H, M, D]: " + k.describe());
    check_coefficient(c, contrast);
    const std::int64_t T = c.size(0), B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2),
                       D = q.size(3);
    k.shaped({B, H, M, D});
    v.shaped({B, H, M, D});
    c.shaped({T, B, H, N, D});
    c_q.shaped({T, B, H, N, D});
    c_k.shaped({T, B, H, M, D});
    c_v.shaped({T, B, H, M, D});
    args.num_maps = T;
    args.batch = B;
    args.heads = H;
    args.queries = N;
    args.keys = M;
    args.width = D;
    args.q = strided(q, false);
    args.k = strided(k, false);
    args.v = strided(v, false);
    args.c = strided(c, true);
    args.c_q = strided(c_q, true);
    args.c_k = strided(c_k, true);
    args.c_v = strided(c_v, true);
}

void attention_pullback(py::handle q_, py::handle k_, py::handle v_, py::handle o_, py::handle c_,
                        double scale, bool gated, bool contrast, py::handle bias_, bool junction,
                        py::handle c_q_, py::handle c_k_, py::handle c_v_, py::handle masses_, int threads) {
    const TensorView q(q_, "q"), k(k_, "k"), v(v_, "v"), o(o_, "o"), c(c_, "c");
    const TensorView c_q(c_q_, "c_q"), c_k(c_k_, "c_k"), c_v(c_v_, "c_v"), masses(masses_, "masses");
    AttentionArgs args{};
    check_shapes(args, q, k, v, c, c_q, c_k, c_v, contrast);
    o.shaped({args.batch, args.heads, args.queries, args.width});
    set_bias(args, optional_view(bias_, "bias"));
    if (junction && bias_.is_none()) fail("a junction needs a bias");
    masses.shaped({junction ? 6 : 4, args.num_maps, args.batch}).contiguous();
    if (masses.dtype() == DType::bf16) fail(masses.describe() + " is written as float32 or float64");
    args.o = strided(o, false);
    args.masses = masses.operand();
    args.junction = junction;
    args.gated = gated;
    args.contrast = contrast;
    args.scale = scale;
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL_BF16(attention_pullback, args);
}

void attention_gradient(py::handle q_, py::handle k_, py::handle v_, py::handle c_, double scale,
                        double value_share, double score_share, py::handle bias_, py::handle c_q_,
                        py::handle c_k_, py::handle c_v_, int threads) {
    const TensorView q(q_, "q"), k(k_, "k"), v(v_, "v"), c(c_, "c");
    const TensorView c_q(c_q_, "c_q"), c_k(c_k_, "c_k"), c_v(c_v_, "c_v");
    AttentionGradientArgs args{};
    check_shapes(args, q, k, v, c, c_q, c_k, c_v, false);
    args.scale = scale;
    set_bias(args, optional_view(bias_, "bias"));
    args.value_share = value_share;
    args.score_share = score_share;
    args.threads = threads;
    py::gil_scoped_release release;
    RF_CALL_BF16(attention_gradient, args);
}

}  // namespace

void register_attention(py::module_& m) {
    m.def("attention_pullback", &attention_pullback);
    m.def("attention_gradient", &attention_gradient);
}

}  // namespace rf
