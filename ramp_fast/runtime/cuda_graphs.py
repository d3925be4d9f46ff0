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

# A process can record one graph at a time.
_RECORDING = threading.Lock()

# Recordings that an engine keeps per image shape: their activations stay allocated.
LIMIT = 4


def record(function: Function, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Record ``function(*inputs)``: its outputs, and what computes them again from what ``inputs`` hold then."""
    graph = torch.cuda.CUDAGraph()
    # A stream of the inputs' device: torch's own for this purpose is that of the first recording in the process. What
    # other threads do meanwhile must not count.
    stream = torch.cuda.Stream(inputs[0].device)
    with _RECORDING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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
        self._warm: set[Hashable] = set()  # have run as they are
        self._refused: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, _Recording] = OrderedDict()

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
            if full in self._warm and full not in self._refused:
                recording = self._recorded.get(full) or self._record(full, function, inputs)
                if recording is not None:
                    self._recorded.move_to_end(full)
                    return recording(inputs)  # copied into, replayed and copied from as one
        outputs = function(*inputs)
        with self._lock:
            self._warm.add(full)
        return outputs

    def _record(self, full: Hashable, function: Function, inputs: tuple[Tensor, ...]) -> _Recording | None:
        """None where it cannot be recorded: it is called as it is, then; where memory was short, only this time."""
        try:
            recording = _Recording(function, inputs)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            self._refused.add(full)
            warnings.warn(
                f"a batch shape could not be recorded as a CUDA graph and runs without: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
            return None
        self._recorded[full] = recording
        if len(self._recorded) > LIMIT:
            self._recorded.popitem(last=False)
        return recording


class _Recording:
    # Not under inference mode, whatever the caller's: its tensors could not be written to outside of it.
    def __init__(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = tuple(t.clone() for t in inputs)
            self.outputs, self.replay = record(function, self.inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)
            self.replay()
            return tuple(t.clone() for t in self.outputs)
