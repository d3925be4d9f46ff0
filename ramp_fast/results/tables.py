"""Tables as CSV that no spreadsheet computes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from typing import Any

from ramp_fast._files import printable

__all__ = ["csv_text"]

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""What spreadsheets take for the start of a formula, full-width forms included."""


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table: text that a spreadsheet would take for a formula gets an apostrophe in front, and is in one line."""
    lines = _Lines()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_inert(value) for value in row] for row in rows)
    return "".join(lines)


def _inert(value: Any) -> Any:
    """Text as a cell in one line; numbers as they are."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


class _Lines(list[str]):
    """What csv writes to."""

    def write(self, line: str) -> None:
        self.append(line)
