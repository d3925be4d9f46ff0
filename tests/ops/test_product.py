"""Products on tile registers: float32 in int8 slices, panels, blocks, ranges of the depth and tails."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import gemm, ops
from ramp_fast.ops import _registry
from ramp_fast.ops.linear import unpack_panels
from ramp_fast.ops.product import _pack_parts, unpack_parts, unpack_tiles

needs_tiles = pytest.mark.skipif("amx" not in ops.cpu_isas(), reason="the processor has no tile registers (AMX)")

# Rows around tiles of 16, pairs of them and tasks; depths around steps of 32 and 64 and (of bfloat16) ranges; widths
# around panels of 16 and 32.
SHAPES = [
    *itertools.product([1, 15, 33], [1, 31, 65], [1, 33]),
    (197, 768, 100),
    (500, 96, 33),
    (230, 3000, 300),
    (225, 6400, 40),
    (225, 6401, 40),
]


Draw = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _on_tiles() -> None:
    torch.manual_seed(0)
    if "amx" in ops.cpu_isas():
        ops.set_cpu_isa("amx")  # conftest.py puts it back


def wide(*shape: int) -> Tensor:
    """Numbers of many magnitudes."""
    return torch.randn(shape) * torch.randn(shape).mul(3).exp()


def error(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """The largest error, in units of the sum of the magnitudes of the terms."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    return float(((actual - F.linear(x, weight, bias)) / F.linear(x.abs(), weight.abs(), bias.abs())).abs().max())


def lost(x: Tensor, weight: Tensor) -> Tensor:
    """What rounding both operands to 24 bits of their rows' largest numbers may change in ``x weight^T``."""
    x, weight = x.double().abs(), weight.double().abs()
    most_x, most_w = x.amax(-1, keepdim=True), weight.amax(-1)
    return (most_x * weight.sum(-1) + most_w * x.sum(-1, keepdim=True)) * 2**-24


def test_tiles_hold_the_weights() -> None:
    weight, bias = wide(33, 70), torch.randn(33)
    half = weight.bfloat16()
    tiles = ops.pack_tiles(half)
    assert tiles.shape == (2, 3, 2, 16, 32)
    assert torch.equal(unpack_tiles(tiles, 70, 33), half)
    x = wide(5, 70).bfloat16()
    assert torch.equal(
        _registry.equation("product")(x, tiles, bias, 33), F.linear(x.float(), half.float(), bias).bfloat16()
    )

    tiles = ops.pack_tiles(weight)
    assert tiles.shape == (3, 3 * 2 + 1, 16, 16)
    unpacked = unpack_tiles(tiles, 70, 33)
    assert ((unpacked - weight).abs() <= weight.abs().amax(1, keepdim=True) * 1.005 * 2**-24).all()
    expected = F.linear(x.float(), unpacked.float(), bias)
    torch.testing.assert_close(_registry.equation("product")(x.float(), tiles, bias, 33), expected)


def test_weights_at_the_ends_of_float32() -> None:
    largest, smallest = torch.finfo(torch.float32).max, 1e-40
    weight = torch.tensor([[largest, -largest / 2], [smallest, 0.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    unpacked = unpack_tiles(ops.pack_tiles(weight), 2, 5)
    torch.testing.assert_close(unpacked[0], weight[0].double(), rtol=2**-23, atol=0)
    assert (unpacked[1:3].abs() <= 1e-37).all()
    assert unpacked[3:].isnan().all()


def test_parts_hold_the_weights() -> None:
    weight, bias, x = wide(33, 70), torch.randn(33), wide(5, 70)
    tiles = _pack_parts(weight)
    assert tiles.shape == (33, 71)
    unpacked, largest = unpack_tiles(tiles, 70, 33), weight.double().abs().amax(1, keepdim=True)
    assert ((unpacked - weight).abs() <= 2**-23 * weight.double().abs() + 2**-39 * largest).all()
    scales = unpack_parts(tiles)[1].double()
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))  # powers of two
    torch.testing.assert_close(_registry.equation("product")(x, tiles, bias, 33), F.linear(x, unpacked.float(), bias))


def test_parts_at_the_ends_of_float32() -> None:
    largest, smallest = torch.finfo(torch.float32).max, 1e-40
    weight = torch.tensor([[largest, -largest / 2], [smallest, 0.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    unpacked = unpack_tiles(_pack_parts(weight), 2, 5)
    torch.testing.assert_close(unpacked[0], weight[0].double(), rtol=2**-23, atol=0)
    torch.testing.assert_close(unpacked[1:3], weight[1:3].double(), rtol=0, atol=1e-44)
    assert unpacked[3:, 0].isnan().all()
    assert _pack_parts(torch.zeros(3, 0)).shape == (3, 1)


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "float32 or bfloat16, not torch.float64"),
        (torch.zeros(1, 2**15 + 1), "32769 inputs; tiles of float32 take up to 32768"),
    ],
)
def test_weights_that_are_not_packed(weight: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ops.pack_tiles(weight)


@needs_tiles
@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
@pytest.mark.parametrize("draw", [torch.randn, wide], ids=["normal", "wide"])
def test_float32_products_lose_24_bits_of_the_largest(draw: Draw, rows: int, depth: int, width: int) -> None:
    x, weight, bias = draw(rows, depth), draw(width, depth), draw(width)
    tiles = ops.pack_tiles(weight)
    y = ops.product(x, tiles, bias, width)
    assert y.shape == (rows, width)
    exact = F.linear(x.double(), weight.double(), bias.double())
    # what scales and the least product of slices add, and the rounding of the result
    allowed = 1.03 * lost(x, weight) + 2**-22 * (exact.abs() + bias.abs())
    assert ((y - exact).abs() <= allowed).all()
    y = ops.product(x, tiles, None, width)
    assert ((y - F.linear(x.double(), weight.double())).abs() <= allowed).all()


@needs_tiles
@pytest.mark.parametrize(("rows", "depth", "width"), [(197, 768, 768), (64, 3072, 100), (50, 64, 64)])
def test_float32_products_are_as_exact_as_sums_in_float32(rows: int, depth: int, width: int) -> None:
    x, weight = torch.randn(rows, depth), torch.randn(width, depth)
    exact = F.linear(x.double(), weight.double())
    ours, theirs = ops.product(x, ops.pack_tiles(weight), None, width), F.linear(x, weight)
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


@needs_tiles
def test_rows_that_are_not_finite_are_nan_and_alone() -> None:
    x, weight = torch.randn(40, 70), torch.randn(33, 70)
    x[3, 5], x[20, 69], x[39, 0] = torch.inf, torch.nan, 3e38
    weight[7, 3], weight[32, 1] = torch.nan, -torch.inf
    y = ops.product(x, ops.pack_tiles(weight), None, 33)
    bad = torch.zeros(40, 33, dtype=torch.bool)
    bad[[3, 20]], bad[:, [7, 32]] = True, True
    assert torch.equal(y.isnan(), bad)
    panels = ops.pack_panels(weight.t().contiguous())
    pulled = ops.linear_pullback(x[None, None], panels, torch.ones(1, 40, 33), torch.float32)
    assert torch.equal(pulled[0, 0].isnan(), bad)
    nothing = ops.product(torch.zeros(2, 70), ops.pack_tiles(torch.zeros(33, 70)), None, 33)
    assert torch.equal(nothing, torch.zeros(2, 33))


@needs_tiles
@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
def test_bfloat16_products_round_once(rows: int, depth: int, width: int) -> None:
    x, weight, bias = wide(rows, depth).bfloat16(), wide(width, depth).bfloat16(), wide(width)
    y = ops.product(x, ops.pack_tiles(weight), bias, width)
    assert y.dtype == torch.bfloat16
    assert error(y, x, weight, bias) < 2**-8 + 1e-6


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others_or_on_threads(dtype: torch.dtype) -> None:
    x, weight = wide(450, 3000).to(dtype), wide(70, 3000).to(dtype)
    tiles = ops.pack_tiles(weight)
    y = ops.product(x, tiles, None, 70)
    for first, last in ((0, 1), (449, 450), (7, 40), (100, 400)):
        assert torch.equal(ops.product(x[first:last], tiles, None, 70), y[first:last])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.product(x, tiles, None, 70), y)
    finally:
        torch.set_num_threads(threads)


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_have_the_same_bits(dtype: torch.dtype) -> None:
    # Rows of 4000 bytes: every second one begins amid a cache line.
    width = 1000 if dtype == torch.float32 else 2000
    x, weight, bias = wide(900, 40).to(dtype), wide(width, 40).to(dtype), wide(width)
    tiles = ops.pack_tiles(weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # 3.6 MB, more than a thread's caches keep
        y = ops.product(x, tiles, bias, width)
        for first, last in ((0, 100), (100, 500), (500, 900)):
            assert torch.equal(ops.product(x[first:last], tiles, bias, width), y[first:last])
    finally:
        torch.set_num_threads(threads)


@needs_tiles
def test_leading_axes_strides_and_nothing() -> None:
    x, weight = torch.randn(3, 40, 5), torch.randn(7, 40)
    tiles = ops.pack_tiles(weight)
    torch.testing.assert_close(ops.product(x.mT, tiles, None, 7), F.linear(x.mT, weight))
    assert ops.product(torch.zeros(2, 0, 40), tiles, None, 7).shape == (2, 0, 7)
    nothing = ops.product(torch.zeros(3, 0), ops.pack_tiles(torch.zeros(7, 0)), torch.ones(7), 7)
    assert torch.equal(nothing, torch.ones(3, 7))


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rhs", "contrast"), [(1, False), (2, True), (4, True)])
@pytest.mark.parametrize("depth", [1088, 1109])
def test_linear_pullback_over_blocks_and_chunks(rhs: int, contrast: bool, dtype: torch.dtype, depth: int) -> None:
    # several blocks of the depth, with and without a tail, several tasks of rows and of panels
    rows, width = 300, 170
    c, x = torch.randn(rhs, 2, rows, depth).to(dtype), torch.randn(2, rows, width)
    panels = ops.pack_panels(torch.randn(depth, width).to(dtype))
    if contrast:
        c = c.abs()
    pulled = ops.linear_pullback(c, panels, x, torch.float32)
    weight, wide_c = unpack_panels(panels, depth, width).double(), c.double()
    upper, lower = wide_c @ weight.clamp_min(0), wide_c @ weight.neg().clamp_min(0)
    expected = torch.where(x > 0, upper, lower)
    assert ((pulled - expected) / (wide_c.abs() @ weight.abs())).abs().max() < 1e-6

    norm = torch.rand(width) + 0.5, torch.zeros(width), 1e-6, contrast
    through, mass = ops.linear_norm_pullback(c, panels, x, *norm)
    alone, mass_alone = ops.linear_norm_pullback(c[:, 1:], panels, x[1:], *norm)
    assert torch.equal(through[:, 1:], alone)
    assert torch.equal(mass[:, 1:], mass_alone)
    n = F.layer_norm(x, (width,))
    factor = ops.norm_pullback(torch.ones(1, *x.shape), x, norm[0], 1e-6)
    torch.testing.assert_close(
        through, factor.float() * torch.where(n > 0, upper, lower).float(), rtol=1e-4, atol=1e-4 * float(upper.max())
    )


@needs_tiles
def test_matrices_use_tiles_and_other_instruction_sets_give_the_same() -> None:
    x, weight = torch.randn(9, 40), torch.randn(7, 40)
    matrix = gemm.Matrix(weight)
    assert matrix.kernel == "product-float32"
    assert matrix.nbytes == (3 + 1) * 1024
    assert gemm.Matrix(torch.randn(2, ops.INT8_DEPTH + 1)).kernel == "onednn-float32"
    y = matrix(x)
    ops.set_cpu_isa("generic")
    assert gemm.Matrix(weight).kernel == "onednn-float32"
    torch.testing.assert_close(matrix(x), y)  # packed before: the equation
    assert _registry.extension is not None
    with pytest.raises(ValueError, match="'amx' only; in use: 'generic'"):
        _registry.extension.product(x, ops.pack_tiles(weight), None, torch.empty(9, 7), 1)


HALF = ops.pack_tiles(torch.zeros(7, 40).bfloat16())


@needs_tiles
@pytest.mark.parametrize(
    ("x", "tiles", "problem"),
    [
        (torch.zeros(2, 40), ops.pack_tiles(torch.zeros(7, 70)), r"tiles .* must have shape \[1, 4, 16, 16\]"),
        (torch.zeros(2, 40).bfloat16(), HALF.mT.contiguous(), r"must have shape \[1, 2, 2, 16, 32\]"),
        (torch.zeros(2, 40).bfloat16(), ops.pack_tiles(torch.zeros(7, 40)), "tiles must be float32"),
        (torch.zeros(2, 40), HALF, "tiles must be int32"),
    ],
)
def test_wrong_operands(x: Tensor, tiles: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ops.product(x, tiles, None, 7)
