"""Checks of arguments that all parts of the package share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ramp_fast.errors import InputError

if TYPE_CHECKING:  # processes that decode images go without torch
    from torch import Tensor


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an integer of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive(name: str, setting: str, value: Any, least: int = 1) -> None:
    """Refuse a setting of ``name`` that is not a positive integer, or is below ``least``."""
    if not is_whole(value, least):
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise InputError(f"{name}: {setting} must be {what}, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def fraction(name: str, setting: str, value: Any, *, zero: bool = True) -> None:
    """Refuse a setting of ``name`` that is not a number from 0 to 1, or that is 0 where that is no value."""
    if not is_number(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        raise InputError(f"{name}: {setting} must be a number in {'[' if zero else '('}0, 1], got {value!r}")


def flag(name: str, setting: str, value: Any) -> None:
    """Refuse a setting of ``name`` that is neither True nor False; any other text or number would count as one."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: {setting} must be True or False, got {value!r}")


def finite_samples(values: Tensor) -> Tensor:
    """Which of ``values`` ``[N, ...]`` are finite throughout, bool ``[N]``.

    By the extremes, which are NaN where a value is: far faster on CPUs than ``isfinite().all()``, which makes copies.
    """
    if not values.numel():  # of nothing there are none
        return values.isfinite().flatten(1).all(1)
    axes = tuple(range(1, values.dim()))
    return (values.amax(axes) < math.inf) & (values.amin(axes) > -math.inf)


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise a ValueError where ``value`` is not one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(repr(k) for k in known)}; got {value!r}")


def nearest(name: Any, known: Iterable[str]) -> str:
    """The question "did you mean ...?", with the known name that is most like this one, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
