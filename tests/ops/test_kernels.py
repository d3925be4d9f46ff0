"""Every operator, on every instruction set and as the float32 reference, against the float64 reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Draw, Options, as_tuple, attention_bias, check_case, odd_options, poison_memory
from hypothesis import HealthCheck, given, settings
from strategies import options
from tolerances import assert_close
from torch import Tensor

from ramp_fast import ops
from ramp_fast.ops import _registry
from ramp_fast.ops.activation import FUNCTIONS, SHARES

VARIANTS = ["reference", *ops.cpu_isas()]
# Operators with kernels of their own for these instruction sets (csrc/cpu/kernels.h); the others run those of "avx512",
# and what is tested of every variant, large cases, tells if one is missing here.
OF_ATTENTION_AND_LINEAR = {"attention_pullback", "attention_gradient", "linear_pullback", "linear_norm_pullback"}
ROUNDING = {
    *("norm_pullback", "norm_gradient", "junction", "merge_junction", "residual_pullback"),
    *("gating_pullback", "rescale_pieces", "rotary", "rotary_pullback"),
}
OWN_KERNELS = {
    "avx512bf16": OF_ATTENTION_AND_LINEAR | ROUNDING,
    "amx": OF_ATTENTION_AND_LINEAR | ROUNDING | {"product"},
}
KERNELS = [(name, variant) for variant in VARIANTS for name in CASES if name in OWN_KERNELS.get(variant, CASES)]

# The fixtures only save and restore global state.
examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def choose(variant: str) -> None:
    if variant == "reference":
        ops.set_backend("reference")
    else:
        ops.set_backend("cpu")
        ops.set_cpu_isa(variant)


def multiplies_bfloat16() -> bool:
    return ops.forced_backend() == "cpu" and _registry.extension.active_isa() in ("avx512bf16", "amx")


def check(name: str, o: Options) -> tuple[torch.Tensor, ...]:
    """Compare with the float64 reference; returns the outputs."""
    return check_case(name, o, multiplies_bfloat16())


@pytest.mark.parametrize(("name", "variant"), KERNELS)
@given(o=options())
@examples
def test_against_float64(name: str, variant: str, o: Options) -> None:
    choose(variant)
    check(name, o)


@pytest.mark.parametrize(("name", "variant"), KERNELS)
def test_odd_shapes_in_any_memory(name: str, variant: str) -> None:
    choose(variant)
    for o in odd_options():
        poisoned = check(name, o)
        poison_memory(False)
        plain = as_tuple(getattr(ops, name)(*CASES[name].arguments(o)))
        poison_memory(True)
        assert all(torch.equal(p, q) for p, q in zip(poisoned, plain, strict=True)), o


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [0, 2])
def test_large(name: str, variant: str, batch: int) -> None:
    # several chunks, blocks and a tail in each sample, enough work for several threads
    choose(variant)
    check(name, Options(rhs=4, batch=batch, inner=(9, 4099), rows=(67, 521)))


def test_kernels_of_their_own_are_those_of_the_bindings() -> None:
    sources = sorted((Path(__file__).parents[2] / "csrc" / "bind").glob("*.cpp"))
    assert sources
    found = {name for file in sources for name in re.findall(r"RF_CALL_[A-Z0-9]+\((\w+)", file.read_text())}
    # Kernels of several operators, or of another name.
    several = {
        "linear_pullback": {"linear_pullback", "linear_norm_pullback"},
        "junction": {"junction", "merge_junction", "residual_pullback"},
        "rescale_piece": {"rescale_pieces"},
    }
    assert set().union(*(several.get(name, {name}) for name in found)) == OWN_KERNELS["avx512bf16"]


def output_dtypes(name: str, c_dtype: torch.dtype, x_dtype: torch.dtype) -> list[torch.dtype]:
    args = CASES[name].arguments(Options(c_dtype=c_dtype, x_dtype=x_dtype, seed=1))
    return [out.dtype for out in as_tuple(getattr(ops, name)(*args))]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_output_dtypes(backend: str) -> None:
    if ops.unavailable(backend):
        backend = "reference"
    ops.set_backend(backend)
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    assert output_dtypes("mass", bf16, bf16) == [f32]
    assert output_dtypes("mass", f64, f64) == [f64]
    assert output_dtypes("merge", bf16, f32) == [f32]
    assert output_dtypes("merge", bf16, bf16) == [bf16]
    assert output_dtypes("junction", f32, bf16) == [f32, bf16, f32, f32]
    assert output_dtypes("merge_junction", bf16, bf16) == [bf16, bf16, f32, f32]
    assert output_dtypes("norm_pullback", bf16, f32) == [bf16]
    assert output_dtypes("norm_gradient", bf16, f32) == [bf16]
    assert output_dtypes("linear_pullback", bf16, f32) == [bf16]
    assert output_dtypes("linear_norm_pullback", bf16, f32) == [f32, f32]
    assert output_dtypes("linear_norm_pullback", f64, f64) == [f64, f64]
    assert output_dtypes("activation_factor", bf16, f32) == [f32, bf16]
    assert output_dtypes("depthwise", bf16, f32) == [bf16]
    assert output_dtypes("mul_pullback", bf16, f32) == [bf16, f32, f32]
    assert output_dtypes("mul_pullback", f64, f64) == [f64, f64, f64]
    assert output_dtypes("mul_gradient", bf16, f32) == [bf16, f32]
    assert output_dtypes("mul_gradient", f64, f64) == [f64, f64]
    assert output_dtypes("sides", bf16, f32) == [bf16]
    assert output_dtypes("spread", bf16, f32) == [bf16, f32]
    assert output_dtypes("piece_masses", bf16, f32) == [f32]
    assert output_dtypes("merge_pieces", bf16, f32) == [bf16]
    assert output_dtypes("gating_pullback", bf16, f32) == [bf16, bf16, f32, f32]
    assert output_dtypes("gating_pullback", f64, f64) == [f64, f64, f64, f64]
    assert output_dtypes("rescale_pieces", bf16, bf16) == [bf16]
    assert output_dtypes("rescale_pieces", bf16, f32) == [f32]
    assert output_dtypes("rotary", bf16, f32) == [f32]
    assert output_dtypes("rotary_pullback", bf16, f32) == [bf16, f32]
    assert output_dtypes("rotary_pullback", f64, f64) == [f64, f64]
    assert output_dtypes("activation_share", bf16, f32) == [f32, bf16]
    assert output_dtypes("affine_factor", bf16, f32) == [f32, bf16]
    assert output_dtypes("affine_pullback", bf16, f32) == [bf16]
    assert output_dtypes("centring", bf16, f32) == [f32]
    assert output_dtypes("centring", f64, f64) == [f64]
    assert output_dtypes("residual_pullback", f32, bf16) == [bf16, f32, f32, f32]
    assert output_dtypes("residual_pullback", f64, f64) == [f64, f64, f64, f64]
    assert output_dtypes("max_pool_pullback", bf16, f32) == [bf16]
    assert output_dtypes("unpool", bf16, f32) == [bf16]
    assert output_dtypes("select_phases", bf16, f32) == [bf16]
    assert output_dtypes("softmax_pullback", bf16, f32) == [bf16]
    assert output_dtypes("attention_pullback", bf16, f32) == [bf16, bf16, bf16, f32]
    assert output_dtypes("attention_pullback", f64, f64) == [f64, f64, f64, f64]
    assert output_dtypes("attention_gradient", bf16, f32) == [bf16, bf16, bf16]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diagonals_round_once(backend: str, dtype: torch.dtype) -> None:
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    ops.set_backend(backend)
    c, x = torch.randn(2, 3, 1000, dtype=dtype), torch.randn(3, 1000, dtype=dtype)
    assert torch.equal(ops.scale_by(c, x), c * x)
    assert torch.equal(ops.gate(c, x), torch.where(x > 0, 2 * c, 0.0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_bfloat16_values_round_trip(variant: str) -> None:
    # scale_by 1 loads, multiplies and stores: every bfloat16 must survive, NaN and infinities included
    choose(variant)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    out = ops.scale_by(every.view(1, 1, -1), torch.ones(1, 2**16))
    torch.testing.assert_close(out.flatten(), every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_to_bfloat16_is_to_nearest_even(variant: str) -> None:
    choose(variant)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 1, 50_000), generator=generator).to(torch.int32)
    bits[..., ::3] = bits[..., ::3] & ~0xFFFF | 0x8000  # halfway between two bfloat16 values
    a = torch.ones(1, 50_000)
    c = bits.view(torch.float32) / 2
    c_b = ops.junction(c, a, a, False, torch.bfloat16)[1]
    expected = (2 * c).to(torch.bfloat16)
    if variant in ("avx512bf16", "amx"):  # the processor's own instruction takes subnormal numbers for 0
        tiny = (2 * c).abs() < torch.finfo(torch.float32).tiny
        assert 100 < tiny.sum() < 1000
        assert ((c_b == 0) | (c_b == expected))[tiny].all()
        c_b, expected = (t.masked_fill(tiny, 0) for t in (c_b, expected))
    torch.testing.assert_close(c_b, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_junction_is_junction_of_merge(variant: str) -> None:
    choose(variant)
    first, s, second, t, a, b, contrast, *_ = CASES["merge_junction"].arguments(Options(rhs=4, batch=3, inner=(700,)))
    fused = ops.merge_junction(first, s, second, t, a, b, contrast)
    separate = ops.junction(ops.merge(first, s, second, t, contrast), a, b, contrast)
    for x, y in zip(fused, separate, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax_of_masked_rows(variant: str) -> None:
    choose(variant)
    scores = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf] * 3, [0.0, -2.0, 500.0]])[None]
    c = torch.full((1, 1, 3, 3), torch.inf)
    c[..., 0, ::2] = 1
    c[..., 2, :] = 1
    out = ops.softmax_pullback(scores, c)[0, 0]
    # masked entries give 0 even against an infinite coefficient; sign(0) is 0, so only softmax(|S|) is left
    torch.testing.assert_close(out[0], torch.tensor([0.5, 0.0, 0.5]))
    assert torch.equal(out[1], torch.zeros(3))
    torch.testing.assert_close(out[2], torch.tensor([0.0, 0.0, 2.0]))


def attention(dtype: torch.dtype, queries: int, keys: int, width: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(2, 3, queries, width), normal(2, 3, keys, width), normal(2, 3, keys, width)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return q, k, v, out, normal(2, 2, queries, 3, width).to(dtype).transpose(2, 3), width**-0.5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gated", [False, True])
def test_attention_pullback_of_ordinary_scores(variant: str, gated: bool) -> None:
    choose(variant)
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)]:
        args = (*attention(dtype, 197, 197, 64), gated, True)
        exact = CASES["attention_pullback"].expected(args)
        for actual, expected in zip(ops.attention_pullback(*args), exact, strict=True):
            assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_pullback_agrees_with_its_parts(variant: str) -> None:
    choose(variant)
    q, k, v, out, c, scale = attention(torch.float32, 9, 7, 5)
    c_q, c_k, c_v, masses = ops.attention_pullback(q, k, v, out, c, scale, True, True)
    scores = scale * q @ k.mT
    c_a = 2 * (c * (out > 0)) @ v.clamp_min(0).mT
    c_s = ops.softmax_pullback(scores, c_a)
    torch.testing.assert_close(c_q, 2 * scale * (q > 0) * (c_s @ k.clamp_min(0)))
    torch.testing.assert_close(c_k, 2 * (k > 0) * (c_s.mT @ (scale * q).clamp_min(0)))
    for mass, x, own in zip(masses, (scores.softmax(-1), v, q, k), (c_a, c_v, c_q, c_k), strict=True):
        torch.testing.assert_close(mass, ops.mass(x, own, True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_attention_writes_the_layout_of_a_qkv_layer(backend: str) -> None:
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    ops.set_backend(backend)
    args = attention(torch.float32, 6, 6, 5)
    c_q, c_k, c_v, _ = ops.attention_pullback(*args, True, True)
    assert c_q.stride() == c_k.stride() == c_v.stride() == (2 * 6 * 3 * 3 * 5, 6 * 3 * 3 * 5, 5, 3 * 3 * 5, 1)
    assert [x.stride() for x in ops.attention_gradient(*args[:3], *args[4:], 0.5, 0.25)] == [c_q.stride()] * 3
    step = 3 * 5 * c_q.element_size()
    assert (c_k.data_ptr() - c_q.data_ptr(), c_v.data_ptr() - c_q.data_ptr()) == (step, 2 * step)
    qkv = torch.stack([x.transpose(1, 2) for x in args[:3]], 2)  # the operands as views of one buffer too
    views = qkv.permute(2, 0, 3, 1, 4)
    for a, b in zip(ops.attention_pullback(*views, *args[3:], True, True)[:3], (c_q, c_k, c_v), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_pullback_of_extreme_scores(variant: str) -> None:
    choose(variant)
    q, k, v, out, c, _ = attention(torch.bfloat16, 5, 9, 8)
    for factor in (0.0, 1e4):  # all scores equal; all weight on one key
        for part in ops.attention_pullback(q, k, v, out, c, factor, True, True):
            assert part.isfinite().all()
    for part in ops.attention_pullback(q, k, v, out, torch.zeros_like(c), 1.0, True, True):
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_gradient_is_that_of_autograd(variant: str) -> None:
    choose(variant)
    for dtype, tolerance in [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)]:
        q, k, v, _, c, scale = attention(dtype, 197, 197, 64)
        operands = [x.double().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*operands, scale=scale)
        for t, own in enumerate(c):
            exact = torch.autograd.grad(out, operands, own.double(), retain_graph=True)
            actual = [pulled[t] for pulled in ops.attention_gradient(q, k, v, c, scale, 1.0, 1.0)]
            for a, e in zip(actual, exact, strict=True):
                assert (a - e).norm() < tolerance * e.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_gradient_of_extreme_scores(variant: str) -> None:
    choose(variant)
    q, k, v, _, c, _ = attention(torch.bfloat16, 5, 9, 8)
    for factor in (0.0, 1e4):  # all scores equal; all weight on one key, and nothing for queries and keys
        pulled = ops.attention_gradient(q, k, v, c, factor, 0.5, 0.25)
        assert all(part.isfinite().all() for part in pulled)
        assert all(torch.equal(part, torch.zeros_like(part)) for part in pulled[:2])
    for part in ops.attention_gradient(q, k, v, torch.zeros_like(c), 1.0, 0.5, 0.25):
        assert torch.equal(part, torch.zeros_like(part))
    of_values = ops.attention_gradient(q, k, v, c, 1.0, 0.5, 0.0)
    assert torch.equal(of_values[2], ops.attention_gradient(q, k, v, c, 1.0, 0.5, 0.25)[2])
    assert all(torch.equal(part, torch.zeros_like(part)) for part in of_values[:2])
    q[0, 1, 2, 3] = torch.nan  # one head of one sample
    for part, before in zip(ops.attention_gradient(q, k, v, c, 1.0, 0.5, 0.0), of_values, strict=True):
        assert torch.equal(part[:, 1], before[:, 1])
        assert torch.equal(part[:, 0, 0], before[:, 0, 0])
    assert all(part[:, 0, 1].isnan().any() for part in ops.attention_gradient(q, k, v, c, 1.0, 0.5, 0.25))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_gradient_does_not_change_if_a_constant_is_added_to_values(variant: str) -> None:
    # rows of A sum to one, so c_A changes by a constant of its row: queries and keys get nothing of it
    choose(variant)
    q, k, v, _, c, scale = attention(torch.float32, 33, 17, 16)
    plain = ops.attention_gradient(q, k, v, c, scale, 1.0, 1.0)
    moved = ops.attention_gradient(q, k, v + 100, c, scale, 1.0, 1.0)
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def with_bias(dtype: torch.dtype, groups: int) -> tuple[tuple[Any, ...], torch.Tensor]:
    """Attention of six windows [6, 3, 9, 5], two to a sample if ``groups`` is 2, and their biases."""
    q, k, v, out, c, scale = attention(torch.float32, 9, 7, 5)
    factors = torch.linspace(0.5, 1, 6).view(6, 1, 1, 1)
    q, k, v, out = (x.repeat(3, 1, 1, 1) * factors for x in (q, k, v, out))
    bias = attention_bias(Draw(Options(seed=3)), 3, 9, 7, True, True, groups)
    return (q, k, v, out, c.repeat(1, 3, 1, 1, 1).to(dtype), scale), bias.float()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("junction", [False, True])
def test_attention_pullback_with_a_bias_agrees_with_its_parts(variant: str, junction: bool) -> None:
    choose(variant)
    (q, k, v, out, c, scale), bias = with_bias(torch.float32, 3)
    c_q, c_k, c_v, masses = ops.attention_pullback(q, k, v, out, c, scale, False, True, bias, junction)
    product, added = scale * q @ k.mT, bias.repeat(2, 1, 1, 1)
    scores = product + added
    weights = scores.softmax(-1).nan_to_num()
    c_a = 2 * c @ v.clamp_min(0).mT
    c_s = ops.softmax_pullback(scores, c_a)
    of_terms = []
    if junction:
        c_s, _, *of_terms = ops.junction(c_s, product, added.masked_fill(added.isinf(), 0), True)

    def pull(c: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 2 * ((x > 0) * (c @ other.clamp_min(0)) + (x < 0) * (c @ (-other).clamp_min(0)))

    torch.testing.assert_close(c_v, 2 * (v > 0) * (weights.mT @ c))
    torch.testing.assert_close(c_q, scale * pull(c_s, k, q))
    torch.testing.assert_close(c_k, scale * pull(c_s.mT, q, k))
    pairs = zip((weights, v, q, k), (c_a, c_v, c_q, c_k), strict=True)
    expected = [ops.mass(x, own, True) for x, own in pairs] + of_terms
    torch.testing.assert_close(masses, torch.stack(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bias_is_that_of_its_window_whatever_else_is_in_the_batch(variant: str) -> None:
    choose(variant)
    for dtype in (torch.float32, torch.bfloat16):
        (q, k, v, out, c, scale), bias = with_bias(dtype, 3)
        whole = ops.attention_pullback(q, k, v, out, c, scale, True, True, bias, True)
        gradient = ops.attention_gradient(q, k, v, c, scale, 0.5, 0.25, bias)
        for b in range(6):
            one = [x[b : b + 1] for x in (q, k, v, out)]
            own = bias[b % 3 : b % 3 + 1]
            alone = ops.attention_pullback(*one, c[:, b : b + 1], scale, True, True, own, True)
            for part, all_of in zip(alone, (*whole[:3], whole[3].movedim(0, -1)), strict=True):
                part = part.movedim(0, -1) if part is alone[3] else part
                assert torch.equal(part, all_of[:, b : b + 1])
            alone = ops.attention_gradient(*one[:3], c[:, b : b + 1], scale, 0.5, 0.25, own)
            assert all(torch.equal(part, all_of[:, b : b + 1]) for part, all_of in zip(alone, gradient, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bias_may_be_expanded(variant: str) -> None:
    choose(variant)
    (q, k, v, out, c, scale), bias = with_bias(torch.float32, 2)
    for own in (bias[:1, :1], bias[:, :1], bias[:1], bias[:, :, :1], bias[..., 1:2]):
        view = own.expand(2 if len(own) > 1 else 1, 3, 9, 7)
        a = ops.attention_pullback(q, k, v, out, c, scale, True, False, view, True)
        b = ops.attention_pullback(q, k, v, out, c, scale, True, False, view.contiguous(), True)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        a = ops.attention_gradient(q, k, v, c, scale, 0.5, 0.25, view)
        b = ops.attention_gradient(q, k, v, c, scale, 0.5, 0.25, view.contiguous())
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _pulled(
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    ways: tuple[bool, bool],
    k: torch.Tensor,
    v: torch.Tensor,
    c: torch.Tensor,
    *bias: torch.Tensor,
) -> list[torch.Tensor]:
    both = ops.attention_pullback(q, k, v, out, c, scale, *ways, *bias)
    return [*both, *ops.attention_gradient(q, k, v, c, scale, 0.5, 0.25, *bias)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bias_of_zeros_or_masks(variant: str) -> None:
    """Zeros add nothing; what is masked is as if it were not there; rows of nothing else, and zeros, give exact 0."""
    choose(variant)
    for dtype in (torch.float32, torch.bfloat16):
        (q, k, v, out, c, scale), bias = with_bias(dtype, 1)
        zero, masks = torch.zeros_like(bias), torch.zeros_like(bias)
        masks[..., 5:] = -torch.inf
        few = k[..., :5, :], v[..., :5, :]
        for ways in ((True, True), (False, False)):
            given = q, out, scale, ways
            for a, b in zip(_pulled(*given, k, v, c, zero), _pulled(*given, k, v, c), strict=True):
                assert torch.equal(a, b)
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            for a, b in zip(_pulled(*given, k, v, c, masks), _pulled(*given, *few, c), strict=True):
                hidden = a.shape[-2:] == k.shape[-2:] and a.shape[-2] != b.shape[-2]
                assert not hidden or torch.equal(a[..., 5:, :], torch.zeros_like(a[..., 5:, :]))
                torch.testing.assert_close(a[..., :5, :] if hidden else a, b, **tolerance)
            for a in _pulled(*given, k, v, c, torch.full_like(bias, -torch.inf)):
                assert torch.equal(a, torch.zeros_like(a))
            for a in _pulled(*given, k, v, torch.zeros_like(c), bias):
                assert torch.equal(a, torch.zeros_like(a))
        _, _, _, masses = ops.attention_pullback(q, k, v, out, c, scale, True, True, masks, True)
        assert torch.equal(masses[5], torch.zeros_like(masses[5]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bias_never_hides_nan(variant: str) -> None:
    choose(variant)
    (q, k, v, out, c, scale), bias = with_bias(torch.float32, 3)
    for name in ("query", "query of a masked row", "bias"):
        own, of = q.clone(), bias.clone()
        if name == "bias":
            of[1, 0, 2, 3] = torch.nan  # of windows 1 and 4
        else:
            own[1, 0, -1 if "masked" in name else 2, 0] = own[4, 0, -1 if "masked" in name else 2, 0] = torch.nan
        for part in (
            ops.attention_pullback(own, k, v, out, c, scale, False, True, of, True)[2],
            *ops.attention_gradient(own, k, v, c, scale, 0.5, 0.25, of)[1:],
        ):
            assert part[:, [1, 4], 0].isnan().flatten(2).any(-1).all(), name
            assert part[:, [0, 2, 3, 5]].isfinite().all(), name
        masses = ops.attention_pullback(own, k, v, out, c, scale, False, True, of, True)[3]
        assert masses[[0, 4, 5]][..., [1, 4]].isnan().all() or name == "bias", name
        assert masses[..., [0, 2, 3, 5]].isfinite().all(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_gradient_with_a_bias_is_that_of_autograd(variant: str) -> None:
    choose(variant)
    for dtype, tolerance in [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)]:
        q, k, v, _, c, scale = attention(dtype, 49, 49, 32)
        bias = attention_bias(Draw(Options(seed=5)), 3, 49, 49, True, True).float()
        bias[..., -1, 0] = 0  # autograd of a row that is masked as a whole is NaN
        operands = [x.double().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*operands, bias.double(), scale=scale)
        for t, own in enumerate(c):
            exact = torch.autograd.grad(out, operands, own.double(), retain_graph=True)
            actual = [pulled[t] for pulled in ops.attention_gradient(q, k, v, c, scale, 1.0, 1.0, bias)]
            for a, e in zip(actual, exact, strict=True):
                assert (a - e).norm() < tolerance * e.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax_never_hides_nan(variant: str) -> None:
    choose(variant)
    scores = torch.tensor([[torch.nan] * 3, [torch.nan, -torch.inf, -torch.inf]])[None, None]
    assert ops.softmax_pullback(scores, torch.ones(1, 1, 1, 2, 3))[..., 0].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_constant_rows_without_epsilon(variant: str) -> None:
    choose(variant)
    x, c = torch.zeros(1, 2, 5), torch.arange(10.0).view(1, 1, 2, 5)
    for out in (ops.norm_pullback(c, x, None, 0.0), ops.norm_gradient(c, x, None, 0.0)):
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("variant", VARIANTS)
def test_norm_gradient_is_that_of_autograd_and_hides_no_nan(variant: str) -> None:
    choose(variant)
    generator = torch.Generator().manual_seed(0)
    x, c, weight = (torch.randn(shape, generator=generator) for shape in ((3, 7, 96), (2, 3, 7, 96), (96,)))
    u = x.double().requires_grad_()
    sigma = (u.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt().detach()
    normalised = weight.double() * (u - u.mean(-1, keepdim=True)) / sigma
    expected = torch.stack([torch.autograd.grad(normalised, u, own.double(), retain_graph=True)[0] for own in c])
    actual = ops.norm_gradient(c, x, weight, 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for row, bad in ((0, torch.nan), (1, torch.inf)):
        x[0, row, 5] = bad
    marred = ops.norm_gradient(c, x, weight, 1e-6)
    assert marred[:, 0, :2].isnan().all()
    assert torch.equal(marred[:, 0, 2:], actual[:, 0, 2:])
    assert torch.equal(marred[:, 1:], actual[:, 1:])


EXACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
RANGE = torch.cat([torch.linspace(-12, 12, 20_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4, -1e4])])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_factors_over_the_range(variant: str, function: str) -> None:
    choose(variant)
    x = RANGE[(RANGE.abs() - 3).abs() > 1e-6] if "hard" in function else RANGE  # their slopes jump there
    y, factor = ops.activation_factor(x, function, torch.float32)

    def exact(u: Tensor) -> tuple[Tensor, Tensor]:
        wide = u.double().requires_grad_()
        value = EXACT[function](wide)
        return value.detach(), torch.autograd.grad(value.sum(), wide)[0]

    value, slope = exact(x)
    assert_close("activation_factor", 0, y, value, 1 + x.double().abs(), torch.float32)
    expected = (value > 0) * (x.double().sign() * slope + exact(x.abs())[1])
    assert_close("activation_factor", 1, factor, expected, 2 + 2 * x.double().abs().clamp_max(12), torch.float32)
    without, empty = ops.activation_factor(x, function, None)
    assert torch.equal(without, y)
    assert empty.numel() == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", SHARES)
def test_shares_over_the_range(variant: str, function: str) -> None:
    choose(variant)
    x = RANGE
    y, factor = ops.activation_share(x, function, torch.float32)
    wide = x.double()
    exact = EXACT[function](wide)
    assert_close("activation_share", 0, y, exact, wide.abs(), torch.float32)
    share = (exact / wide).masked_fill(wide == 0, 0)
    assert_close("activation_share", 1, factor, share, torch.ones_like(wide), torch.float32)
    assert not factor[x == 0].any()
    assert all(t.isnan().all() for t in ops.activation_share(torch.full((40,), torch.nan), function, torch.float32))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", SHARES)
def test_activations_beyond_numbers(variant: str, function: str) -> None:
    """Minus infinity times nothing is NaN, as PyTorch has it; the largest negative numbers have nothing left."""
    choose(variant)
    x = torch.tensor([-torch.inf, torch.nan, -3e38, -1e30, torch.inf]).repeat_interleave(40)
    for operator in (ops.activation_share, ops.activation_factor):
        lowest, nan, *large, highest = operator(x, function, torch.float32)[0].view(5, 40)
        assert bool(lowest.isnan().all())
        assert bool(nan.isnan().all())
        assert not any(bool(part.any()) for part in large)
        assert bool((highest == torch.inf).all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_at_large_numbers(variant: str, function: str, dtype: torch.dtype) -> None:
    """It is 1, also where squares overflow, and at infinity; nothing is sent to what is below zero, or to NaN."""
    choose(variant)
    x = torch.tensor([20, 40, 1e13, 1e20, 3e38, torch.inf, -1e20, -3e38, -torch.inf, torch.nan], dtype=dtype)
    factor = ops.activation_factor(x.repeat_interleave(40), function, torch.float32)[1].view(-1, 40)
    assert bool((factor[:6] == 2).all())
    assert not factor[6:].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", ["sigmoid", "hardsigmoid"])
def test_sigmoids_beyond_numbers(variant: str, function: str) -> None:
    choose(variant)
    x = torch.tensor([-torch.inf, torch.nan, -3e38, torch.inf]).repeat_interleave(40)
    lowest, nan, large, highest = ops.activation_factor(x, function, torch.float32)[0].view(4, 40)
    assert not lowest.any()
    assert bool(nan.isnan().all())
    assert not large.any()
    assert bool((highest == 1).all())


def test_shares_of_no_function() -> None:
    with pytest.raises(ValueError, match=r"'tanh'.*gelu, gelu_tanh, silu"):
        ops.activation_share(torch.zeros(3), "tanh", torch.float32)
    with pytest.raises(ValueError, match="'sigmoid'"):  # which is not 0 at 0
        ops.activation_share(torch.zeros(3), "sigmoid", torch.float32)
    with pytest.raises(ValueError, match=r"'tanh'.*hardswish"):
        ops.activation_factor(torch.zeros(3), "tanh", torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_shares_keep_channels_last(variant: str, dtype: torch.dtype) -> None:
    choose(variant)
    x = torch.randn(2, 5, 3, 7).to(dtype)
    last = torch.channels_last
    plain, moved = (ops.activation_share(t, "silu", torch.bfloat16) for t in (x, x.contiguous(memory_format=last)))
    for expected, found in zip(plain, moved, strict=True):
        assert expected.is_contiguous()
        assert found.is_contiguous(memory_format=last)
        torch.testing.assert_close(found, expected)  # PyTorch's own functions differ in the last bit by the layout


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [3, 40])
def test_nan_is_on_both_sides(variant: str, channels: int) -> None:
    choose(variant)
    x = torch.randn(7, channels)
    x[3] = torch.nan
    assert bool(ops.sides(x, 1, torch.float32)[3].isnan().all())
    assert not ops.sides(x, 1, torch.float32)[[0, 1, 2, 4, 5, 6]].isnan().any()
    weight = torch.randn(2, 1, 1, channels)
    where = [1, 1], [0, 0], [1, 1], [1, 7], False, False
    found = ops.depthwise(x.view(1, 1, 1, 7, channels), weight, None, None, *where).view(7, channels)
    assert bool(found[3].isnan().all())
    torch.testing.assert_close(found[4], torch.where(x[4] > 0, *weight.view(2, channels)) * x[4])


@pytest.mark.parametrize("variant", VARIANTS)
def test_masses_of_narrow_pieces_of_many_rows(variant: str) -> None:
    """Several blocks of rows, and several tasks."""
    choose(variant)
    c, x = torch.randn(2, 2, 6000, 3), torch.randn(2, 6000, 3)
    maps = torch.stack([c[0], c[0] - c[1]]).double()
    own = (maps.abs() * x.double().abs()).sum(2)
    expected = torch.stack([own[..., 0], own[..., 1:].sum(-1)])
    torch.testing.assert_close(ops.piece_masses(c, x, [1, 2], True), expected.float(), rtol=4e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_of_a_factor_shows(variant: str) -> None:
    choose(variant)
    c, a, b = torch.randn(2, 1, 3, 40), torch.randn(1, 3, 40), torch.randn(1, 40)
    a[0, 1, 5] = b[0, 20] = torch.nan
    c_a, c_b, _ = ops.mul_pullback(c, a, b, True)
    assert bool(c_a[..., 20].isnan().all())
    assert bool(c_b[..., 5].isnan().all())
    assert not c_a[..., 21:].isnan().any()
    other = torch.randn(1, 3, 40)
    c_a, c_b, mass_a, mass_b = ops.gating_pullback(c, a, other, None, None, True)
    assert bool(c_b[..., 1, 5].isnan().all())
    assert bool(mass_a.isnan().all() and mass_b.isnan().all())
    c_a, c_b, mass_a, mass_b = ops.gating_pullback(c, other, a, None, None, True)
    assert bool(c_a[..., 1, 5].isnan().all())
    assert bool(mass_a.isnan().all() and mass_b.isnan().all())
    assert not c_a[..., 0, :].isnan().any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_selected_from_no_channels(variant: str) -> None:
    choose(variant)
    assert ops.select_phases(torch.zeros(1, 1, 4, 4, 2, 2, 2, 0), torch.zeros(1, 8, 8, 0), 0, 0).numel() == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [64, 256, 2048])
def test_centring_looks_at_all_channels(variant: str, channels: int) -> None:
    choose(variant)
    n = torch.ones(1, 1, 56 * 56, channels)
    n[..., 32:] = 100
    c = torch.cat((torch.ones_like(n), 1 - n))
    expected = channels / (32 + 100 * (channels - 32))
    torch.testing.assert_close(ops.centring(c), torch.full((1, 1), expected), rtol=0.2, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_centring_by_what_float32_cannot_hold_is_left_out(variant: str) -> None:
    choose(variant)
    for p, n in ((1e-25, 1e25), (1e25, 1e-25), (0.0, 1.0), (1.0, 0.0)):
        c = torch.tensor([p, p - n]).view(2, 1, 1).expand(2, 1, 40)
        assert ops.centring(c).item() == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_masses_leave_out_what_is_below_zero(variant: str) -> None:
    choose(variant)
    a = torch.ones(1, 40)
    a[0, ::3] = -torch.inf
    _, _, mass_a, mass_b = ops.junction(torch.ones(1, 1, 40), a, torch.ones(1, 40), False)
    if variant != "reference":  # which multiplies minus infinity by 0
        assert mass_a.item() == 2 * 26
    assert mass_b.item() == 2 * 40


def _split(kind: str, first: Tensor, second: Tensor, scale: Tensor, a: Tensor, b: Tensor, out: torch.dtype) -> Any:
    """A sum of one reader, one with a ReLU of two, or one with a BatchNorm."""
    if kind == "sum":
        return ops.junction(first, a, b, True, out)
    if kind == "relu":
        return ops.merge_junction(first, scale, second, scale, a, b, True, out, True)
    gain, shift = torch.linspace(-1, 1, a.shape[-1]), torch.linspace(1, -1, a.shape[-1])
    return ops.residual_pullback(first, scale, second, scale, (a + b).relu(), b, gain, shift, True, out)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["sum", "relu", "norm"])
@pytest.mark.parametrize(("dtype", "out"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("width", [512, 508])  # rows that begin at a cache line, and others
def test_results_past_the_caches_are_the_same(variant: str, kind: str, dtype: str, out: str, width: int) -> None:
    choose(variant)
    torch.manual_seed(0)
    a, b, scale = torch.randn(7, 501, width), torch.randn(7, 501, width), torch.rand(2, 7)
    first, second = (torch.randn(2, *a.shape).to(getattr(torch, dtype)) for _ in range(2))
    whole = _split(kind, first, second, scale, a, b, getattr(torch, out))
    assert sum(t.nbytes for t in whole[:2]) > 12 * 2**20
    for i in (0, 6):
        here = slice(i, i + 1)
        parts = first[:, here], second[:, here], scale[:, here], a[here], b[here]
        alone = _split(kind, *(p.contiguous() for p in parts), getattr(torch, out))
        assert all(torch.equal(w[:, here], p) for w, p in zip(whole, alone, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_of_junctions_in_float64(variant: str) -> None:
    choose(variant)
    a, b, c = torch.tensor([[1.0, -2.0] * 20]), torch.ones(1, 40), torch.tensor([[[1.0, 1 / 3] * 20]])
    c_a, c_b, _, _ = ops.junction(c, a, b, False, torch.float64)  # by vectors and a tail
    assert torch.equal(c_a, torch.tensor([[[2.0, 0.0] * 20]]))
    assert torch.equal(c_b, 2 * c.double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_n_is_zero_it_stays_zero(variant: str) -> None:
    """D that is P to the last bit stays so: what rounds the two apart would grow to a map of its own."""
    choose(variant)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        shape = 2, 3, 37, 40  # vectors and a tail

        def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def pair(shape: tuple[int, ...] = shape) -> Tensor:
            p, d = drawn(*shape), drawn(*shape)
            d[..., ::2] = p[..., ::2]
            return torch.cat((p, d))

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale, other, n_scale = (drawn(n, 3, dtype=wide).abs() for n in (4, 4, 2))
        a, b = drawn(3, 37, 40), drawn(3, 37, 40)
        gain, shift = drawn(40, dtype=wide), drawn(40, dtype=wide)
        heads = 2, 3, 5, 4, 40
        weights = drawn(5, 4, 40, dtype=wide), drawn(5, 4, 40, dtype=wide)  # partners are 20 apart: of one kind
        results = [
            ops.rescale(pair(), scale, True),
            ops.rescale_parts(pair(heads), drawn(4, 3, 4, dtype=wide), True),
            ops.merge(pair(), scale, pair(), other, True),
            ops.scale_by(pair(), a, n_scale),
            ops.gate(pair(), a, n_scale),
            ops.affine_pullback(pair(), a, gain, shift, True, n_scale),
            *ops.merge_junction(pair(), scale, pair(), other, a, b, True, relu=True)[:2],
            *ops.residual_pullback(pair(), scale, pair(), other, a.relu(), b, gain, shift, True)[:2],
            ops.merge_pieces([pair(), pair(), pair()], drawn(3, 4, 3, dtype=wide), True),
            ops.rescale_pieces([pair(heads), pair(heads)], drawn(2, 4, 3, dtype=wide), True),
            *ops.gating_pullback(pair(), a, b, None, None, True)[:2],
            ops.rotary_pullback(pair(heads), drawn(3, 5, 4, 40), None, *weights, 20, scale, True)[0],
        ]
        for c in results:
            p, d = c.chunk(2)
            assert torch.equal(p[..., ::2], d[..., ::2])
            assert not torch.equal(p, d)
