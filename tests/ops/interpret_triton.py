"""Run by test_triton.py with TRITON_INTERPRET=1: the Triton kernels on odd shapes against the float64 reference.

A third of the cases, or with ``--all`` all of them.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
sys.path.insert(0, str(Path(__file__).parent))

import cases as cases_of_all
import pytest
import torch
import triton
from cases import CASES, DTYPES, OF_ATTENTION, Options, as_tuple, batch_axes, check_case, of_sample
from tolerances import COMPUTE, STORE

from ramp_fast import ops
from ramp_fast.kernels import common, linear, product

# Around the block sizes that kernels have here; seeds choose depths and optional arguments.
ELEMENTWISE = [
    {"batch": 0},
    {"batch": 1, "inner": (1,), "rows": (1, 1)},
    {"batch": 2, "inner": (0,), "rows": (0, 4)},
    {"batch": 2, "inner": (5, 7), "rows": (3, 33), "zeros": True},
    {"batch": 3, "inner": (2051,), "rows": (2, 4099)},
]
# Tiles are 32 rows (16 each of P and D with contrast) and 128 columns, steps 16 deep.
LINEAR = [
    {"batch": 0},
    {"batch": 2, "rows": (0, 4)},
    {"batch": 1, "rows": (1,)},
    {"batch": 2, "rows": (3, 33), "zeros": True},
    {"batch": 3, "rows": (11, 131)},
]
# Channels of 5 x 8 inputs with windows of 2 x 3 (a line and two columns are left over): blocks of 64 hold several
# windows of few channels, and a part of one with many.
MAX_POOL = [
    {"batch": 0},
    {"batch": 1, "inner": (1,)},
    {"batch": 2, "inner": (5, 7), "zeros": True},
    {"batch": 2, "inner": (70,)},
]
# Heads, queries, keys, head size: tiles are 16 rows of queries or keys by 32 of the other, columns 16, 32, 64 ...
cases_of_all.ATTENTION[:] = [
    (1, 1, 1, 1),
    (1, 7, 5, 24),
    (1, 33, 17, 16),
    (1, 18, 35, 40),
    (1, 0, 5, 4),
    (1, 5, 0, 4),
    (1, 5, 5, 0),
    (2, 13, 13, 3),
    (1, 3, 4, 130),
]
SHAPES: dict[str, list[dict[str, Any]]] = {
    "mass": ELEMENTWISE,
    "rescale": ELEMENTWISE,
    "rescale_parts": ELEMENTWISE,
    "merge": ELEMENTWISE,
    "junction": ELEMENTWISE,
    "merge_junction": ELEMENTWISE,
    "scale_by": ELEMENTWISE,
    "ratio": ELEMENTWISE,
    "gate": ELEMENTWISE,
    "activation_factor": [*ELEMENTWISE, *({"batch": 2, "inner": (3, 4, 5), "seed": seed} for seed in range(6))],
    "activation_share": ELEMENTWISE,
    "affine_factor": [*ELEMENTWISE[1:4], {"batch": 2, "inner": (3, 4, 5)}, {"batch": 3, "inner": (17, 31, 3)}],
    "max_pool_pullback": MAX_POOL,
    "softmax_pullback": ELEMENTWISE,
    "norm_pullback": ELEMENTWISE,
    "norm_gradient": ELEMENTWISE,
    "linear_pullback": LINEAR,
    "linear_norm_pullback": LINEAR,
    "product": LINEAR,
    "centring": ELEMENTWISE,
    "share": ELEMENTWISE,
    "scale_to": ELEMENTWISE,
    "attention_pullback": [{"batch": 1, "zeros": True}, {"batch": 2}],
    "attention_gradient": [{"batch": 1, "zeros": True}, {"batch": 2}],
}
WITHOUT_CONTRAST = {"norm_pullback", "norm_gradient", "linear_pullback", "softmax_pullback", "attention_gradient"}


def cases(names: Iterable[str] = tuple(SHAPES)) -> Iterator[tuple[str, Options]]:
    for name in names:
        for seed, (shape, (c_dtype, x_dtype), contrast) in enumerate(
            itertools.product(SHAPES[name], DTYPES, [False, True])
        ):
            if contrast and name in WITHOUT_CONTRAST:
                continue
            rhs = (2, 4)[seed % 3 == 0] if contrast else (1, 3)[seed % 3 == 0]
            own = {"seed": seed, **shape}  # some say it
            yield name, Options(rhs, c_dtype=c_dtype, x_dtype=x_dtype, contrast=contrast, **own)


def check_batch(name: str, shape: dict[str, Any]) -> None:
    """A sample's result has the same bits without its neighbours, in which it lies elsewhere in the tiles."""
    for dtype in (torch.float32, torch.bfloat16):
        o = Options(2, **{"c_dtype": dtype, "seed": 2, **shape})
        args = CASES[name].arguments(o)
        whole = as_tuple(getattr(ops, name)(*args))
        part = as_tuple(getattr(ops, name)(*of_sample(args, name, 1, 2)))
        for expected, own, axis in zip(whole, part, batch_axes(name, len(whole)), strict=True):
            assert torch.equal(expected.narrow(axis, 1, 1), own), (name, dtype)


def check_descriptors() -> None:
    """Tiles that are loaded by descriptors, where rows are multiples of 16 bytes, beyond the edges too."""
    plain = linear.CONFIGS, product.CONFIGS
    linear.CONFIGS = dict.fromkeys(linear.CONFIGS, (linear._config(32, 128, 16, 4, 1, True),))
    of_product = triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "DESCRIBED": True})
    product.CONFIGS = dict.fromkeys(product.CONFIGS, (of_product,))
    for name, dtype, contrast in itertools.product(
        ("linear_pullback", "linear_norm_pullback"), (torch.float32, torch.bfloat16), (False, True)
    ):
        shape = {"batch": 3, "rows": (11, 131), "c_dtype": dtype, "contrast": contrast}
        check_case(name, Options(2, seed=4, **shape), True)  # 64 deep
        check_case("product", Options(2, seed=4, **shape), True)
    linear.CONFIGS, product.CONFIGS = plain


def check_refusals() -> None:
    x, c = torch.zeros(2, 4), torch.zeros(2, 2, 5)
    ops.set_backend("reference")
    panels = ops.pack_panels(torch.zeros(5, 4))
    ops.set_backend("triton")
    for problem, call in [
        ("panels [1, 5, 32, 1] must have shape [4, 2, 5]", lambda: ops.linear_pullback(c, panels, x, c.dtype)),
        ("must have the same dtype", lambda: ops.linear_pullback(c.bfloat16(), panels, x, c.dtype)),
        ("must be even", lambda: ops.linear_norm_pullback(c[:1], _zeros(5, 4), x, None, None, 0.0, True)),
        ("weight [3] must", lambda: ops.linear_norm_pullback(c, _zeros(5, 4), x, c[0, 0, :3], None, 0.0, True)),
        ("k [1, 2, 5, 5] must have shape [1, 2, 5, 4]", lambda: _attention_of(keys=(1, 2, 5, 5))),
        ("c [2, 1, 2, 4, 4] must have", lambda: _attention_of(coefficients=(2, 1, 2, 4, 4))),
        ("must be even", lambda: _attention_of(coefficients=(3, 1, 2, 3, 4))),
        ("must be even", lambda: ops.mass(c[0], c[:1], True)),
        ("must have shape [2, 2]", lambda: ops.rescale(c, c[:, :1, 0], False)),
        ("must be [T, B, rows, parts, width]", lambda: ops.rescale_parts(c, c, False)),
        ("must have shape [1, 2]", lambda: ops.scale_by(c, c[0], c[0])),
        ("must have the same shape", lambda: ops.merge(c, c[..., 0], c[..., :3], c[..., 0], False)),
        ("do not fit together", lambda: ops.softmax_pullback(x, c)),
        ("gain [3] and shift [C]", lambda: ops.affine_factor(x, c[0, 0, :3], x[0], False, 0.0, x.dtype)),
        ("c [2, 1, 1, 2, 3] must have shape [2, 1, 2, 2, 3]", lambda: _max_pool_of(1, 2)),
        ("must not be empty", lambda: _max_pool_of(2, 2, kernel=0)),
        ("x must be [B, H, W, C]", lambda: ops.max_pool_pullback(c, x, 2, 2, True)),
        ("must not be negative", lambda: _attention_of(scale=-1.0)),
        ("tiles torch.bfloat16 [4, 5] must be torch.int32 [4, 6]", lambda: _product_of(torch.bfloat16)),
        ("bias [3] must have shape [4]", lambda: _product_of(torch.float32, c[0, 0, :3])),
        ("must have shape [2, 4]", lambda: ops.share(x, [x, c[0, 0]])),
        ("must have the same shape", lambda: ops.scale_to(x, c[0])),
    ]:
        with pytest.raises(ValueError, match=re.escape(problem)):
            call()


def check_channels_last() -> None:
    """The memory order of maps is kept, and results are the same."""
    for name in ("mass", "rescale", "merge", "junction", "merge_junction", "scale_by", "gate"):
        args = CASES[name].arguments(Options(inner=(6, 5, 7)))
        expected = as_tuple(getattr(ops, name)(*args))
        moved = [
            a.movedim(-3, -1).contiguous().movedim(-1, -3) if isinstance(a, torch.Tensor) and a.ndim > 3 else a
            for a in args
        ]
        for e, a in zip(expected, as_tuple(getattr(ops, name)(*moved)), strict=True):
            torch.testing.assert_close(a, e)
            assert a.ndim < 4 or a.movedim(-3, -1).is_contiguous()


def check_extreme_scores() -> None:
    """All scores equal, or all weight on one key; rows beyond the last one hold infinities and must not leak."""
    generator = torch.Generator().manual_seed(0)
    for factor, dtype in ((0.0, torch.float32), (1e4, torch.bfloat16)):
        q, k = (torch.randn(1, 1, n, 8, generator=generator) - 3 for n in (5, 9))  # scores far above and below 0
        c = torch.randn(2, 1, 1, 5, 8, generator=generator).to(dtype)
        for sign in (1, -1):
            for part in ops.attention_pullback(q, sign * k, k.abs(), q, c, factor, False, True):
                assert part.isfinite().all()
            assert all(part.isfinite().all() for part in ops.attention_gradient(q, sign * k, k, c, factor, 0.5, 0.25))
        for part in ops.attention_pullback(q, k, k, q, torch.zeros_like(c), 1.0, True, True):
            assert torch.equal(part, torch.zeros_like(part))
        for part in ops.attention_gradient(q, k, k, torch.zeros_like(c), 1.0, 0.5, 0.25):
            assert torch.equal(part, torch.zeros_like(part))


def check_pooling_at_the_edge() -> None:
    """Windows that the image is too small for, windows of the whole image, and what is not a number."""
    for height, width in ((1, 5), (3, 1)):
        pooled = ops.max_pool_pullback(
            torch.ones(2, 1, height // 2, width // 2, 3), torch.ones(1, height, width, 3), 2, 2, True
        )
        assert torch.equal(pooled, torch.zeros(2, 1, height, width, 3))
    x = torch.randn(2, 7, 9, 4, generator=torch.Generator().manual_seed(0))
    pooled = ops.max_pool_pullback(torch.ones(1, 2, 1, 1, 4), x, 7, 9, False)[0]
    assert torch.equal(pooled, torch.where(x == x.amax((1, 2), keepdim=True), x, 0.0))
    x = torch.full((1, 2, 2, 2), -torch.inf)
    x[..., 1, 0, 1] = torch.nan
    expected = torch.zeros(1, 1, 2, 2, 2)
    expected[0, 0, 0, 0, 0] = expected[0, 0, 1, 0, 1] = 1
    assert torch.equal(ops.max_pool_pullback(torch.ones(1, 1, 1, 1, 2), x, 2, 2, True), expected)


def _max_pool_of(rows: int, columns: int, kernel: int = 2) -> torch.Tensor:
    return ops.max_pool_pullback(torch.zeros(2, 1, rows, columns, 3), torch.zeros(1, 4, 4, 3), kernel, kernel, True)


def _attention_of(
    keys: tuple[int, ...] = (1, 2, 5, 4), coefficients: tuple[int, ...] = (2, 1, 2, 3, 4), scale: float = 1.0
) -> tuple[torch.Tensor, ...]:
    q, k, c = torch.zeros(1, 2, 3, 4), torch.zeros(keys), torch.zeros(coefficients)
    return ops.attention_pullback(q, k, k, q, c, scale, True, True)


def _product_of(dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    return ops.product(torch.zeros(2, 5), ops.pack_tiles(torch.zeros(4, 5, dtype=dtype)), bias, 4)


def _zeros(depth: int, width: int) -> torch.Tensor:
    return ops.pack_panels(torch.zeros(depth, width))


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    ops.set_backend("triton")
    # The interpreter truncates to bfloat16; compiled kernels round to nearest.
    STORE[torch.bfloat16] *= 2
    for name in OF_ATTENTION:
        COMPUTE[name, torch.bfloat16] *= 2
    # every third meets each operator with every pair of dtypes
    chosen = list(cases())[:: 1 if "--all" in sys.argv[1:] else 3]
    for name, options in chosen:
        check_case(name, options, True)
    for name, shapes in SHAPES.items():
        check_batch(name, shapes[-1])
    check_channels_last()
    check_extreme_scores()
    check_pooling_at_the_edge()
    check_refusals()
    if common.DESCRIPTORS:
        check_descriptors()
    print(f"{len(chosen)} cases agree")


if __name__ == "__main__":
    main()
