"""Run by test_triton.py with TRITON_INTERPRET=1: the Triton kernels on odd shapes against the float64 reference."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from cases import CASES, DTYPES, Options, as_tuple, batch_axes, in_float64, of_sample
from tolerances import STORE, assert_close

from ramp_fast import ops

# Around the block sizes that kernels have here; seeds choose depths and optional arguments.
ELEMENTWISE = [
    {"batch": 0},
    {"batch": 1, "inner": (1,), "rows": (1, 1)},
    {"batch": 2, "inner": (0,), "rows": (0, 4)},
    {"batch": 2, "inner": (5, 7), "rows": (3, 33), "zeros": True},
    {"batch": 3, "inner": (2051,), "rows": (2, 4099)},
]
# Tiles are 32 rows (16 of each side with contrast) and 128 columns, steps 16 deep.
LINEAR = [
    {"batch": 0},
    {"batch": 2, "rows": (0, 4)},
    {"batch": 1, "rows": (1,)},
    {"batch": 2, "rows": (3, 33), "zeros": True},
    {"batch": 3, "rows": (11, 131)},
]
SHAPES: dict[str, list[dict[str, Any]]] = {
    "junction": ELEMENTWISE,
    "norm_pullback": ELEMENTWISE,
    "linear_pullback": LINEAR,
    "linear_norm_pullback": LINEAR,
}
WITHOUT_CONTRAST = {"norm_pullback", "linear_pullback"}


def cases() -> Iterator[tuple[str, Options]]:
    for name, shapes in SHAPES.items():
        for seed, (shape, (c_dtype, x_dtype), contrast) in enumerate(itertools.product(shapes, DTYPES, [False, True])):
            if contrast and name in WITHOUT_CONTRAST:
                continue
            rhs = (2, 4)[seed % 3 == 0] if contrast else (1, 3)[seed % 3 == 0]
            yield name, Options(rhs, c_dtype=c_dtype, x_dtype=x_dtype, contrast=contrast, seed=seed, **shape)


def check(name: str, o: Options) -> None:
    case = CASES[name]
    args = case.arguments(o)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    actual = as_tuple(getattr(ops, name)(*args))
    for kept, a in zip(before, (a for a in args if isinstance(a, torch.Tensor)), strict=True):
        assert torch.equal(kept, a), "an argument was written to"
    magnitudes = as_tuple(case.magnitude(*in_float64(args)))
    for index, outputs in enumerate(zip(actual, case.expected(args), magnitudes, strict=True)):
        assert_close(name, index, *outputs, o.arithmetic)


def check_batch(name: str, shape: dict[str, Any]) -> None:
    """A sample's result has the same bits without its neighbours, in which it lies elsewhere in the tiles."""
    for dtype in (torch.float32, torch.bfloat16):
        o = Options(2, **shape, c_dtype=dtype, seed=2)
        args = CASES[name].arguments(o)
        whole = as_tuple(getattr(ops, name)(*args))
        part = as_tuple(getattr(ops, name)(*of_sample(args, name, 1, 2)))
        for expected, own, axis in zip(whole, part, batch_axes(name, len(whole)), strict=True):
            assert torch.equal(expected.narrow(axis, 1, 1), own), (name, dtype)


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
    ]:
        with pytest.raises(ValueError, match=re.escape(problem)):
            call()


def _zeros(depth: int, width: int) -> torch.Tensor:
    return ops.pack_panels(torch.zeros(depth, width))


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    ops.set_backend("triton")
    STORE[torch.bfloat16] = 2.0**-7  # the interpreter truncates to bfloat16; compiled kernels round to nearest
    checked = 0
    for name, options in cases():
        check(name, options)
        checked += 1
    for name, shapes in SHAPES.items():
        check_batch(name, shapes[-1])
    check_refusals()
    print(f"{checked} cases agree")


if __name__ == "__main__":
    main()
