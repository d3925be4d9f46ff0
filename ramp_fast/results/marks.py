"""How files that this package wrote are told from others, by their content, also where it is damaged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ramp_fast._files import open_regular

__all__ = [
    "CSV_HEADERS",
    "JPEG_COMMENT",
    "JSON_HEAD",
    "NPZ_EXTRA",
    "NPZ_TAIL",
    "PNG_CHUNK",
    "SHEET_PREFIX",
    "SOFTWARE",
    "is_own",
    "is_replaceable",
]

SOFTWARE = "ramp_fast"
"""The ``Software`` entry of every PNG this package writes, by which it is told from a photograph."""

_NAME = SOFTWARE.encode()

PNG_CHUNK = b"rfMp"
"""A private chunk behind the pixels, which holds :data:`SOFTWARE`: a second mark, should the first be damaged."""

NPZ_EXTRA = b"rf" + len(_NAME).to_bytes(2, "little") + _NAME
"""An extra field of the first entry's header, at the beginning of an archive."""

NPZ_TAIL = _NAME + b" sha256 "
"""The comment of an archive, at its end; the digest of all that comes before the digest follows."""

JPEG_COMMENT = _NAME + b" report"
"""The comment of the sheets of pictures in a report."""

SHEET_PREFIX = "report-"
"""How names of these sheets begin."""

JSON_HEAD = '{"software": "' + SOFTWARE + '"'

CSV_HEADERS = (
    "method,metric,mean,standard_error,low_95,high_95,count,higher_is_better",
    "method,metric,mean,standard_error,count,higher_is_better",
    "method,metric,entry,image,value",
)
"""First lines of the tables: a CSV has no room for another mark."""

_EDGE = 128
"""Bytes at both ends of a file that are looked at."""


_MOST_ZEROS = 2**30
"""No result is larger, and a sparse file may hold any number of zeros."""


@dataclass(frozen=True)
class _Marks:
    """What files of one suffix have: ``magic`` at the start, and ours ``head`` near the start or ``tail`` near the end.

    A file that begins with ``magic`` and is shorter than ``shortest`` is the beginning of one, and whole in no format.
    """

    magic: bytes
    shortest: int
    head: bytes
    tail: bytes | None = None

    def are_in(self, first: bytes, last: bytes) -> bool:
        return self.head in first or (self.tail is not None and self.tail in last)

    def begins_in(self, first: bytes, size: int) -> bool:
        return size < self.shortest and (first.startswith(self.magic) or self.magic.startswith(first))


_OF_SUFFIX = {
    # The smallest PNG is 67 bytes, the smallest archive with a file in it 98.
    ".png": (_Marks(b"\x89PNG\r\n\x1a\n", 67, b"tEXtSoftware\0" + _NAME, PNG_CHUNK + _NAME),),
    ".npz": (_Marks(b"PK\x03\x04", 98, NPZ_EXTRA, NPZ_TAIL),),
    # A comment is a segment of its own, near the start; the smallest JPEG is 107 bytes.
    ".jpg": (_Marks(b"\xff\xd8\xff", 107, b"\xff\xfe" + (len(JPEG_COMMENT) + 2).to_bytes(2, "big") + JPEG_COMMENT),),
    ".json": (_Marks(JSON_HEAD.encode(), len(JSON_HEAD), JSON_HEAD.encode()),),
    ".csv": tuple(_Marks(f"{line}\n".encode(), len(line) + 1, f"{line}\n".encode()) for line in CSV_HEADERS),
}


def is_own(path: str | Path) -> bool:
    """Whether this package wrote the file.

    Parameters
    ----------
    path : str or pathlib.Path
        Its suffix says which marks count; links are followed.

    Raises
    ------
    OSError
        It cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        first, last, _ = _edges(file)
    return any(marks.are_in(first, last) for marks in _of(path))


def is_replaceable(path: str | Path) -> bool:
    """Whether this package wrote the file, or nothing would be lost with it.

    Empty files, those of zeros only and the first bytes of a file of the format are what a crash leaves of ours.

    Parameters
    ----------
    path : str or pathlib.Path
        As for `is_own`.

    Raises
    ------
    OSError
        It cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        first, last, size = _edges(file)
        if any(marks.are_in(first, last) for marks in _of(path)):
            return True
        if not first.strip(b"\0"):
            file.seek(0)
            blocks = iter(lambda: file.read(1 << 20), b"")
            return size <= _MOST_ZEROS and not any(block.strip(b"\0") for block in blocks)
    return any(marks.begins_in(first, size) for marks in _of(path))


def _of(path: str | Path) -> tuple[_Marks, ...]:
    return _OF_SUFFIX.get(Path(path).suffix, ())


def _edges(file: BinaryIO) -> tuple[bytes, bytes, int]:
    """First and last bytes of a file, and its size."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(_EDGE)
    file.seek(max(0, size - _EDGE))
    return first, file.read(_EDGE), size
