"""Splitting a number of things into parts that are handled together."""

from __future__ import annotations

from collections.abc import Iterator


def ranges(count: int, most: int) -> Iterator[tuple[int, int]]:
    """``[0, count)`` in ranges of at most ``most``: as equal as can be, no small rest, larger ones first.

    Parameters
    ----------
    count : int
        At least 0.
    most : int
        At least 1.
    """
    size, larger = divmod(count, max(1, -(-count // most)))
    start = 0
    while start < count:
        stop = start + size + (larger > 0)
        yield start, stop
        start, larger = stop, larger - 1
