"""Files of zarr v3 as plainly as the format allows: no compression, one shard or chunk per file, written whole.

Written here and not by the zarr package so that a file has the same bytes whichever version of anything is installed,
reaches the disk before it gets its name, and can be written on Python 3.10, which zarr 3 does not support. Any reader
of zarr v3 reads it: maps are ``sharding_indexed``, the other arrays have plain chunks. Specification: zarr-specs, core
3.0 and the sharding codec 1.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ArraySpec", "crc32c", "group_document", "shard_index"]

_MISSING = 2**64 - 1

INDEX_ENTRY_BYTES = 16


@dataclass(frozen=True)
class ArraySpec:
    """One array, whose first axis counts images.

    Attributes
    ----------
    name : str
    one : tuple of int
        Shape of what belongs to one image.
    dtype : str
        As zarr and NumPy call it.
    dimensions : tuple of str
        Names of all axes.
    sharded : bool
        Whether an image is a chunk of its own within the file, which can be read alone.
    fill : float, int or bool
        What has not been written is.
    """

    name: str
    one: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    sharded: bool = False
    fill: float | int | bool = 0

    @property
    def item_bytes(self) -> int:
        """Of one image."""
        return int(np.prod(self.one, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of the bytes in the files."""
        little_endian: np.dtype[Any] = np.dtype(self.dtype).newbyteorder("<")
        return little_endian

    def document(self, count: int, per_file: int) -> str:
        """``zarr.json`` of the array for ``count`` images, ``per_file`` of them in every file."""
        to_bytes: dict[str, object] = {"name": "bytes"}
        if np.dtype(self.dtype).itemsize > 1:
            to_bytes["configuration"] = {"endian": "little"}
        codecs: list[dict[str, object]] = [to_bytes]
        if self.sharded:
            configuration = {
                "chunk_shape": [1, *self.one],
                "codecs": [to_bytes],
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": configuration}]
        return _json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [count, *self.one],
                "data_type": self.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [per_file, *self.one]}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": self.fill,
                "codecs": codecs,
                "attributes": {},
                "dimension_names": list(self.dimensions),
            }
        )

    def file(self, number: int) -> str:
        """Where file ``number`` of the array lies, relative to the group."""
        return f"{self.name}/" + ".".join(["c", str(number), *("0" for _ in self.one)])

    def file_bytes(self, per_file: int, present: int) -> int:
        """The size of a file that holds ``present`` of ``per_file`` images."""
        if self.sharded:
            return present * self.item_bytes + per_file * INDEX_ENTRY_BYTES + 4
        return per_file * self.item_bytes


def group_document(attributes: Mapping[str, object]) -> str:
    """``zarr.json`` of the group."""
    return _json({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def _json(document: object) -> str:
    return json.dumps(document, indent=1) + "\n"


def shard_index(per_file: int, present: int, chunk_bytes: int) -> bytes:
    """The index at the end of a shard whose first ``present`` chunks lie one after the other."""
    entries: npt.NDArray[np.uint64] = np.full((per_file, 2), _MISSING, np.uint64)
    entries[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(chunk_bytes)
    entries[:present, 1] = chunk_bytes
    index = entries.astype("<u8").tobytes()
    return index + crc32c(index).to_bytes(4, "little")


def _table() -> Sequence[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _table()


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, which zarr takes for the index of a shard (RFC 3720, appendix B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _CRC32C[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
