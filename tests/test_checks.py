"""Checks that all parts share."""

from __future__ import annotations

import math

import pytest
import torch

from ramp_fast._checks import finite_samples


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 5, 6)])
def test_which_samples_are_finite(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert finite_samples(values).all()
    for place, wrong in enumerate((math.nan, math.inf, -math.inf)):
        values[place].view(-1)[place + 1] = wrong
    values[3].view(-1)[:2] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert finite_samples(values).tolist() == [False, False, False, True]


def test_samples_of_nothing() -> None:
    assert finite_samples(torch.empty(0, 3, 4, 4)).tolist() == []
    assert finite_samples(torch.empty(2, 0)).tolist() == [True, True]
