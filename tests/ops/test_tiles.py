"""Products on tile registers: float32 as three bfloat16 parts, panels, ranges and tails."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import gemm, ops
from ramp_fast.ops import _registry
from ramp_fast.ops.linear import unpack_panels, unpack_tiles

needs_tiles = pytest.mark.skipif("amx" not in ops.cpu_isas(), reason="the processor has no tile registers (AMX)")

# Rows around tiles of 16, pairs of them and tasks; depths around steps of 32 and ranges; widths around panels of 32.
SHAPES = [
    *itertools.product([1, 15, 33], [1, 31, 33], [1, 33]),
    (197, 768, 100),
    (500, 96, 33),
    (230, 3000, 300),
]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_hold_the_weights(dtype: torch.dtype) -> None:
    weight = wide(33, 70).to(dtype)
    tiles = ops.pack_tiles(weight)
    assert tiles.shape == (2, 3, 3 if dtype == torch.float32 else 1, 2, 16, 32)
    assert torch.equal(unpack_tiles(tiles, 70, 33), weight.float())
    x, bias = wide(5, 70).to(dtype), torch.randn(33)
    assert torch.equal(
        ops.linear.product_equation(x, tiles, bias, 33), F.linear(x.float(), weight.float(), bias).to(dtype)
    )


def test_what_rounds_to_infinity_is_not_nan() -> None:
    weight = torch.tensor([[3.4e38, float("inf"), -float("inf"), 1.0]])
    assert unpack_tiles(ops.pack_tiles(weight), 4, 1).tolist() == [[float("inf"), float("inf"), -float("inf"), 1.0]]


@needs_tiles
@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
def test_float32_products_are_exact_to_float32(rows: int, depth: int, width: int) -> None:
    x, weight, bias = wide(rows, depth), wide(width, depth), wide(width)
    tiles = ops.pack_tiles(weight)
    y = ops.product(x, tiles, bias, width)
    assert y.shape == (rows, width)
    # Long sums of such numbers round as a float32 product's do; a part or a product less would be 2^-18 of a term.
    nothing = torch.zeros(width)
    assert error(y, x, weight, bias) < 1.5 * error(F.linear(x, weight, bias), x, weight, bias) + 2**-22
    y = ops.product(x, tiles, None, width)
    assert error(y, x, weight, nothing) < 1.5 * error(F.linear(x, weight), x, weight, nothing) + 2**-22


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
def test_large_results_are_written_past_the_caches_with_the_same_bits(dtype: torch.dtype) -> None:
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
def test_linear_pullback_over_blocks_and_chunks(rhs: int, contrast: bool, dtype: torch.dtype) -> None:
    # several blocks of the depth, several tasks of rows and of panels, tails everywhere
    rows, depth, width = 300, 1109, 170
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
    assert matrix.nbytes == 2 * 3 * 2 * 16 * 32 * 2
    y = matrix(x)
    ops.set_cpu_isa("generic")
    assert gemm.Matrix(weight).kernel == "onednn-float32"
    torch.testing.assert_close(matrix(x), y)  # packed before: the equation
    assert _registry.extension is not None
    with pytest.raises(ValueError, match="'amx' only; in use: 'generic'"):
        _registry.extension.product(x, ops.pack_tiles(weight), None, torch.empty(9, 7), 1)


@needs_tiles
@pytest.mark.parametrize(
    ("x", "tiles", "problem"),
    [
        (torch.zeros(2, 40), ops.pack_tiles(torch.zeros(7, 70)), r"tiles .* must have shape \[1, 2, 3, 2, 16, 32\]"),
        (torch.zeros(2, 40).bfloat16(), ops.pack_tiles(torch.zeros(7, 40)), r"must have shape \[1, 2, 1, 2, 16, 32\]"),
    ],
)
def test_wrong_operands(x: Tensor, tiles: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ops.product(x, tiles, None, 7)
