"""Where the bytes of an image lie: a file, a part of an archive, a cell of a table. Small enough to send to processes.

Nothing here imports torch: processes that decode images use it.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeVar

from ramp_fast._files import open_regular, reason
from ramp_fast.data.images import ImageError
from ramp_fast.errors import RampFastError

if TYPE_CHECKING:
    import pyarrow.parquet

__all__ = ["Location", "Packed", "Part", "TableCell", "WholeFile", "from_fields", "open_table"]

MAX_ENTRY_BYTES = 400_000_000
"""Of an image within an archive, which is read into memory; no image that can be decoded needs more."""

_ZIP_HEADER_BYTES = 30

L = TypeVar("L", bound="Location")


@dataclass(frozen=True, slots=True)
class Location:
    """Where one image lies.

    Attributes
    ----------
    path : str
        The file that holds it.
    """

    kind: ClassVar[str]

    path: str

    @property
    def size(self) -> int | None:
        """Bytes of the encoded image, where that is known without reading it."""
        return None

    def open(self) -> BinaryIO:
        """The encoded image, for reading from its first byte.

        Raises
        ------
        ImageError
            It is damaged, or too large.
        OSError
            It cannot be read.
        """
        raise NotImplementedError

    def read(self) -> bytes:
        """All bytes of the encoded image; errors are those of :meth:`open`."""
        with self.open() as file:
            data = file.read(MAX_ENTRY_BYTES + 1)
        if len(data) > MAX_ENTRY_BYTES:
            raise ImageError("too large a file; scale it down first")
        return data

    def below(self: L, folder: str) -> L:
        """The same, with a path that is relative to a folder made whole."""
        return replace(self, path=os.path.join(folder, self.path) if self.path else folder)

    def fields(self) -> list[Any]:
        """In plain JSON types, for :func:`from_fields`."""
        return [self.kind, *astuple(self)]


@dataclass(frozen=True, slots=True)
class WholeFile(Location):
    """A file of its own."""

    kind = "file"

    length: int
    modified: int
    """Nanoseconds, as ``os.stat`` says; not part of what tells one image from another."""

    @property
    def size(self) -> int:
        return self.length

    def open(self) -> BinaryIO:
        return open_regular(self.path)


@dataclass(frozen=True, slots=True)
class Part(Location):
    """Bytes within a file, as they are: an entry of a tar, also of one within a tar."""

    kind = "part"

    offset: int
    length: int

    @property
    def size(self) -> int:
        return self.length

    def open(self) -> BinaryIO:
        return io.BytesIO(_bytes_at(self.path, self.offset, self.length))


@dataclass(frozen=True, slots=True)
class Packed(Location):
    """An entry of a zip archive, stored or deflated."""

    kind = "zip"

    offset: int
    """Of the entry's own header."""
    packed: int
    length: int
    checksum: int
    """CRC-32 of the image's bytes, as the archive says."""
    deflated: bool

    @property
    def size(self) -> int:
        return self.length

    def open(self) -> BinaryIO:
        header = _bytes_at(self.path, self.offset, _ZIP_HEADER_BYTES)
        if not header.startswith(b"PK\x03\x04"):
            raise ImageError("the archive is damaged, or has changed: no entry where its index says")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = _bytes_at(self.path, self.offset + _ZIP_HEADER_BYTES + names, self.packed)
        if self.deflated:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.length + 1)
            except zlib.error as error:
                raise ImageError(f"the archive is damaged: {reason(error)}") from error
        if len(data) != self.length or zlib.crc32(data) != self.checksum:
            raise ImageError("the archive is damaged: the checksum of this entry is wrong")
        return io.BytesIO(data)


@dataclass(frozen=True, slots=True)
class TableCell(Location):
    """The bytes in a row of a Parquet file, in the layout of Hugging Face's data sets."""

    kind = "cell"

    column: str
    group: int
    row: int
    """Within the row group."""

    def open(self) -> BinaryIO:
        cells = _row_group(self.path, self.column, self.group)
        value = cells[self.row].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if not data:
            raise ImageError("the table has no bytes for it")
        return io.BytesIO(data)


_KINDS: dict[str, type[Location]] = {c.kind: c for c in (WholeFile, Part, Packed, TableCell)}


def from_fields(fields: Sequence[Any]) -> Location:
    """A location from what :meth:`Location.fields` gave."""
    kind, *values = fields
    return _KINDS[kind](*values)


def _bytes_at(path: str, offset: int, length: int) -> bytes:
    if length > MAX_ENTRY_BYTES:
        raise ImageError(f"too large: {length} bytes; scale it down first")
    with open_regular(path) as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise ImageError("the archive ends too early: it is damaged, or has changed")
    return data


def parquet_module() -> Any:
    """``pyarrow.parquet``.

    Raises
    ------
    RampFastError
        It is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RampFastError("Parquet files need pyarrow: pip install 'ramp_fast[store]'") from error
    return pyarrow.parquet


@lru_cache(maxsize=2)  # images are read in order: the group in use, and the one that another reader began
def _row_group(path: str, column: str, group: int) -> Any:
    with open_table(path) as table:
        return table.read_row_group(group, columns=[column], use_threads=False).column(0)


def open_table(path: str) -> pyarrow.parquet.ParquetFile:
    """A Parquet file, for reading.

    Raises
    ------
    RampFastError
        pyarrow is not installed.
    ImageError
        It is no such file.
    OSError
        It cannot be read.
    """
    module = parquet_module()
    try:
        return module.ParquetFile(path)
    except OSError:
        raise
    except Exception as error:  # pyarrow's own kinds of errors
        raise ImageError(f"not a Parquet file that can be read: {reason(error)}") from error
