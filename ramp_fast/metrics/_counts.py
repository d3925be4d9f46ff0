"""Checks of counts that time and memory grow with."""

from __future__ import annotations

from typing import Any

from ramp_fast._checks import positive
from ramp_fast.errors import InputError

MOST = 2**18
"""More than the entries of an image of 224 x 224 pixels, each a step of its own."""

MOST_BYTES = 2**33


def checked_count(name: str, setting: str, value: Any, least: int = 1) -> None:
    """Refuse a setting of ``name`` that is not an integer from ``least`` to :data:`MOST`."""
    positive(name, setting, value, least)
    if value > MOST:
        raise InputError(f"{name}: {setting} must be at most {MOST}, got {value}")


def check_bytes(name: str, what: str, size: int) -> None:
    """Refuse what would hold more than :data:`MOST_BYTES` at once, for which the system may kill the process."""
    if size > MOST_BYTES:
        raise InputError(
            f"{name}: {what} would take {size / 2**30:.0f} GB of memory, more than {MOST_BYTES / 2**30:.0f}: "
            f"take fewer, or fewer images together"
        )
