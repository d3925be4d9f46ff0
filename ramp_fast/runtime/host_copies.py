"""Images in host memory and a model on a GPU: copies go beside the computation.

While one batch runs, the next one is copied to the device and the results of the one before to the host, each through
page-locked memory (copies of other memory wait for the device) and on a stream of its own. The host waits for a
batch's results only after the next batch has been launched, so that the device never waits for the host; what is in
flight is bounded by that: three batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, cuda

Batch = tuple[Tensor, ...]


def batches(
    given: Iterable[Batch],
    run: Callable[..., Batch],
    device: torch.device,
    dtype: torch.dtype,
    output_device: torch.device,
) -> Iterator[Batch]:
    """``run(*batch)`` for one batch after the other.

    Parameters
    ----------
    given : iterable of tuple of Tensor
        On any device. The first tensor of each is converted to ``dtype``.
    run : callable
        Of contiguous tensors on ``device``, to tensors there. It must not wait for the device.
    device : torch.device
        With a stream on which ``run`` computes, the current one.
    dtype : torch.dtype
    output_device : torch.device
        Where the caller wants the results.

    Yields
    ------
    tuple of Tensor
        On the CPU if that is ``output_device`` and ``device`` is a GPU, complete and valid until the next ones are
        asked for; otherwise on ``device``.
    """
    if _overlaps(device, output_device):
        return _overlapped(given, run, device, dtype)
    return (run(*(t.to(device, _dtype(i, t, dtype)).contiguous() for i, t in enumerate(batch))) for batch in given)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory on a device, for its current stream; a GPU goes on computing meanwhile.

    The tensor itself may be written to as soon as this returns.
    """
    if not _overlaps(device, tensor.device):
        return tensor.to(device)
    computing = cuda.current_stream(device)
    (moved,), arrived = _send((tensor,), device, tensor.dtype, _streams(device)[0], computing)
    computing.wait_event(arrived)
    return moved


def to_host(tensors: Batch, device: torch.device) -> Results:
    """Start copying what the current stream of a device has been told to compute; ``wait()`` returns it.

    What that stream is told afterwards is not waited for.
    """
    if not _overlaps(device, torch.device("cpu")):
        return Results(tuple(tensor.cpu() for tensor in tensors), None)
    return _fetch(tensors, _streams(device)[1], cuda.current_stream(device))


def _overlaps(device: torch.device, output_device: torch.device) -> bool:
    return device.type == "cuda" and output_device.type == "cpu"


def _dtype(index: int, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if index == 0 else tensor.dtype


@functools.cache
def _streams(device: torch.device) -> tuple[Any, Any]:
    """To the device and back. Always the same ones: the allocator keeps memory for every stream apart."""
    return cuda.Stream(device), cuda.Stream(device)


def _page_locked(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """New memory that copies need not wait for; torch hands it out again when the copies it has seen are done."""
    return torch.empty(shape, dtype=dtype, pin_memory=True, device="cpu")


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _overlapped(
    given: Iterable[Batch], run: Callable[..., Batch], device: torch.device, dtype: torch.dtype
) -> Iterator[Batch]:
    computing = cuda.current_stream(device)
    h2d, d2h = _streams(device)
    waiting = iter(given)
    in_flight: Results | None = None
    next_batch = next(waiting, None)
    sent = None if next_batch is None else _send(next_batch, device, dtype, h2d, computing)
    while sent is not None:
        inputs, arrived = sent
        computing.wait_event(arrived)
        results = _fetch(run(*inputs), d2h, computing)
        next_batch = next(waiting, None)
        sent = None if next_batch is None else _send(next_batch, device, dtype, h2d, computing)
        if in_flight is not None:
            yield in_flight.wait()
        in_flight = results
    if in_flight is not None:
        yield in_flight.wait()


def _send(batch: Batch, device: torch.device, dtype: torch.dtype, h2d: Any, computing: Any) -> tuple[Batch, Any]:
    """Start copying what is in host memory; the tensors on the device, and the event after which they are there."""
    moved: list[Tensor] = []
    for index, tensor in enumerate(batch):
        wanted = _dtype(index, tensor, dtype)
        if tensor.device.type != "cpu":
            moved.append(tensor.to(device, wanted).contiguous())
            continue
        source = tensor
        if tensor.dtype != wanted or not tensor.is_contiguous() or not tensor.is_pinned():
            source = _page_locked(tensor.shape, wanted)
            source.copy_(tensor)
        with cuda.stream(h2d):  # its memory too: the computing stream's may be in use until that gets there
            target = torch.empty(tensor.shape, dtype=wanted, device=device)
            _copy(target, source)
        target.record_stream(computing)
        moved.append(target)
    return tuple(moved), h2d.record_event()


@dataclass
class Results:
    """On their way into host memory."""

    values: Batch
    complete: Any  # the event; None where they are there

    def wait(self) -> Batch:
        """They, complete."""
        if self.complete is not None:
            self.complete.synchronize()
        return self.values


def _fetch(results: Batch, d2h: Any, computing: Any) -> Results:
    """Start copying to host memory what is computed by now."""
    d2h.wait_event(computing.record_event())
    values: list[Tensor] = []
    for result in results:
        value = _page_locked(result.shape, result.dtype)
        with cuda.stream(d2h):
            _copy(value, result)
        result.record_stream(d2h)
        values.append(value)
    return Results(tuple(values), d2h.record_event())
