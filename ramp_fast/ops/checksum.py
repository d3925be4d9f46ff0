"""Checksums of memory, of 64 bits, which tell whether weights have changed."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._registry import extension

_LINE, _PAGE = 64, 4096  # bytes
# Bytes that have a checksum of their own.
PIECE = 1 << 17


def pieces(tensor: Tensor) -> list[tuple[int, int]]:
    """Addresses and sizes of pieces of the memory that a strided tensor's elements lie in."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first, total = tensor.data_ptr(), (last + 1) * tensor.element_size()
    return [(first + at, min(PIECE, total - at)) for at in range(0, total, PIECE)]


def checksum(addresses: Any, sizes: Any, sampled: Any, threads: int) -> Any:
    """Checksums of pieces of memory.

    Parameters
    ----------
    addresses : ndarray of uint64 [n]
        Of memory that can be read.
    sizes : ndarray of int64 [n]
        In bytes.
    sampled : ndarray of uint8 [n]
        0: all bytes count, and no single word of four changes unnoticed. 1: one line of 64 bytes in 4 KB counts.
    threads : int

    Returns
    -------
    ndarray of uint64 [n]
        They depend on the processor's byte order and on whether there is a C++ extension.
    """
    out = np.zeros(len(addresses), np.uint64)
    if extension is not None:
        extension.checksum(addresses, sizes, sampled, out, threads)
        return out
    for i, (address, size) in enumerate(zip(addresses.tolist(), sizes.tolist(), strict=True)):
        data = np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)
        pages = size // _PAGE
        if sampled[i] and pages:
            lines = data[: pages * _PAGE].reshape(pages, _PAGE // _LINE, _LINE)
            chosen = np.arange(pages) * 37 % (_PAGE // _LINE)
            data = np.concatenate((lines[np.arange(pages), chosen].ravel(), data[pages * _PAGE :]))
        out[i] = zlib.crc32(data.tobytes())
    return out


def whole_checksum(tensor: Tensor) -> int:
    """The checksum of all elements of a tensor, on any device. On a GPU this waits for it."""
    dense = tensor.detach().cpu().contiguous()
    if not dense.numel():
        return 0
    addresses, sizes = zip(*pieces(dense), strict=True)
    count = len(sizes)
    sums = checksum(
        np.array(addresses, np.uint64), np.array(sizes, np.int64), np.zeros(count, np.uint8), get_num_threads()
    )
    return hash(sums.tobytes())


class TensorIdentity(NamedTuple):
    """Where a tensor lies, how often PyTorch knows that it was written to, and what it looks like."""

    address: int
    version: int | None
    layout: tuple[Any, ...]  # what a captured graph depends on


def tensor_identity(tensor: Tensor) -> TensorIdentity:
    """What changes where a tensor is replaced, and with most writes to it."""
    plain = tensor.layout == torch.strided and not tensor.is_meta
    return TensorIdentity(
        tensor.data_ptr() if plain else id(tensor),
        None if tensor.is_inference() else tensor._version,
        (tensor.shape, tensor.dtype, tensor.device, tensor.stride() if plain else ()),
    )


def content_key(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What tells apart tensors with other values: packed weights are shared where it is the same."""
    return tuple((tensor_identity(t), whole_checksum(t)) for t in tensors)
