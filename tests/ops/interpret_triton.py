"""Run by test_triton.py with TRITON_INTERPRET=1: the Triton kernels on odd shapes against the float64 reference."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
sys.path.insert(0, str(Path(__file__).parent))

import torch
from cases import CASES, DTYPES, Options, as_tuple, in_float64
from tolerances import STORE, assert_close

from ramp_fast import ops

OPERATORS = ["junction", "norm_pullback"]
SHAPES = [
    {"batch": 0},
    {"batch": 1, "inner": (1,), "rows": (1, 1)},
    {"batch": 2, "inner": (0,), "rows": (0, 4)},
    {"batch": 2, "inner": (5, 7), "rows": (3, 33), "zeros": True},
    {"batch": 3, "inner": (2051,), "rows": (2, 4099)},
]


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    ops.set_backend("triton")
    STORE[torch.bfloat16] = 2.0**-7  # the interpreter truncates to bfloat16; compiled kernels round to nearest
    checked = 0
    for name, shape, (c_dtype, x_dtype), contrast in itertools.product(OPERATORS, SHAPES, DTYPES, [False, True]):
        if name == "norm_pullback" and contrast:
            continue  # it takes no notice
        o = Options(rhs=2, c_dtype=c_dtype, x_dtype=x_dtype, contrast=contrast, seed=checked, **shape)
        case = CASES[name]
        args = case.arguments(o)
        actual = as_tuple(getattr(ops, name)(*args))
        magnitudes = as_tuple(case.magnitude(*in_float64(args)))
        for index, outputs in enumerate(zip(actual, case.expected(args), magnitudes, strict=True)):
            assert_close(name, index, *outputs, o.arithmetic)
        checked += 1
    print(f"{checked} cases agree")


if __name__ == "__main__":
    main()
