"""CUDA graphs: a batch of one shape is recorded once and replayed, without the launch of hundreds of kernels.

A function of device tensors is called as it is the first time, which lets libraries and Triton choose and build their
kernels, recorded the second time, and replayed from then on.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

# Recordings that an engine keeps per image shape: their activations stay allocated.
LIMIT = 4


def record(function: Function, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Record ``function(*inputs)``: its outputs, and what computes them again from what ``inputs`` hold then."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return outputs, graph.replay


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make ``device`` the current one: kernels, streams and graphs belong to that."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def records(tensor: Tensor) -> bool:
    """Whether runs on its device can be recorded."""
    return tensor.device.type == "cuda" and tensor.numel() > 0


def stream_of(device: torch.device) -> int:
    """The current stream, by number; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Recordings:
    """The recordings of one plan, those used last; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def call(self, key: Hashable, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``function(*inputs)``.

        Parameters
        ----------
        key : hashable
            Everything that ``function`` depends on besides its inputs. Their shapes and dtypes and the current stream
            are added: a recording's memory is written in the order of one stream.
        function : callable
            Of device tensors alone; it must not wait for the device.
        inputs : tuple of Tensor
            At least one, all on the same device.

        Returns
        -------
        tuple of Tensor
            The caller's own.
        """
        full = (key, tuple((t.shape, t.dtype) for t in inputs), stream_of(inputs[0].device))
        with self._lock:
            again = full in self._seen
            self._seen.add(full)
            if again:
                if full not in self._recorded:
                    self._recorded[full] = _recorded(function, inputs)
                self._recorded.move_to_end(full)
                if len(self._recorded) > LIMIT:
                    self._recorded.popitem(last=False)
                recording = self._recorded[full]
                if recording is not None:
                    return recording(inputs)  # copied into, replayed and copied from as one
        return function(*inputs)


class _Recording:
    def __init__(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(t.clone() for t in inputs)
        self.outputs, self.replay = record(function, self.inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return tuple(t.clone() for t in self.outputs)


def _recorded(function: Function, inputs: tuple[Tensor, ...]) -> _Recording | None:
    """None where an operation cannot be recorded: it is called as it is, then."""
    try:
        return _Recording(function, inputs)
    except RuntimeError as error:
        warnings.warn(
            f"this model cannot be recorded as a CUDA graph, it runs without: {error}", RuntimeWarning, stacklevel=5
        )
        return None
