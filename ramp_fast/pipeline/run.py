"""One run: batches decoded ahead, attributed, and written as shards by a thread beside the computation."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ramp_fast.data.decoders import Decoded, Decoders
from ramp_fast.data.locations import Location
from ramp_fast.errors import RampFastError
from ramp_fast.pipeline.encoding import encode
from ramp_fast.pipeline.normalising import Normaliser
from ramp_fast.pipeline.targets import Engine, Targets
from ramp_fast.results.map_writer import MapWriter, ShardWriter
from ramp_fast.results.maps import Plan
from ramp_fast.runtime.host_copies import Results, to_host

__all__ = ["Job", "Tally"]

_QUEUED_BYTES = 64 * 2**20
"""Of results that wait for the writer."""


@dataclass
class Tally:
    """What a run has done so far.

    Attributes
    ----------
    images : int
        Attributed and handed to the writer, failures included.
    failures : int
    reading, computing, writing : float
        Seconds that the run has waited for decoded images, has computed, and has waited for the writer.
    decoding : float
        Seconds of processor time in the processes that decode.
    started, ended : float
        By ``time.perf_counter()``; ``ended`` is None while it runs.
    """

    images: int = 0
    failures: int = 0
    reading: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    decoding: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """That it has taken, so far."""
        return (time.perf_counter() if self.ended is None else self.ended) - self.started

    def shares(self) -> dict[str, float]:
        """Of the time so far: reading, computing, writing."""
        seconds = self.seconds or 1.0
        return {name: getattr(self, name) / seconds for name in ("reading", "computing", "writing")}


@dataclass(frozen=True)
class _Piece:
    """A batch: images of one shard."""

    shard: int
    images: range
    last: bool


class Job:
    """Attributes shards of a plan into its store.

    Parameters
    ----------
    engine : Engine
    store : MapWriter
        With a plan.
    locate : callable
        Number of an image -> where it lies.
    labels : sequence of int
        The source's class of every image; -1 where it says none.
    decoders : Decoders
        Its batch size is that of the run.
    mean, std : sequence of float
        Of the model's channels, for pixels in [0, 1].
    device : torch.device
        Of the model.
    targets : Targets
    contrast, normalize : str
        As for ``Engine.attribute``.
    on_failure : callable, optional
        Told the number of an image and why it failed.
    """

    def __init__(
        self,
        engine: Engine,
        store: MapWriter,
        locate: Callable[[int], Location],
        labels: Sequence[int] | npt.NDArray[np.int32],
        decoders: Decoders,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        targets: Targets,
        contrast: str = "others",
        normalize: str = "max",
        on_failure: Callable[[int, str], None] | None = None,
    ) -> None:
        assert store.plan is not None
        self.engine, self.store, self.locate, self.decoders = engine, store, locate, decoders
        self.plan: Plan = store.plan
        self.labels: npt.NDArray[np.int32] = np.asarray(labels, np.int32)
        self.device, self.targets, self.contrast, self.normalize = device, targets, contrast, normalize
        self.on_failure = on_failure
        self.normalised = Normaliser(mean, std, device)
        self._together = decoders.batch_size  # images that go through the engine at a time: fewer where memory is short
        self.tally = Tally()

    def run(self, shards: Iterable[int], progress: Callable[[Tally], None] | None = None) -> Tally:
        """Attribute shards, in order.

        Parameters
        ----------
        shards : iterable of int
            Taken one by one, a few batches before they are needed.
        progress : callable, optional
            Called after every batch.

        Raises
        ------
        StoreError
            The store cannot be written to. What was finished is kept.
        RampFastError
            The model cannot be attributed, memory is short for a single image, or processes cannot decode.
        """
        tally = self.tally = Tally()
        ahead: deque[_Piece] = deque()  # what is being decoded
        batch_bytes = max(1, self.decoders.batch_size * self.plan.arrays["maps"].item_bytes)
        writer = _Writer(self.store, tally, max(2, _QUEUED_BYTES // batch_bytes))
        try:
            decoded = self.decoders.batches(self._located(shards, ahead))
            waiting: tuple[_Piece, Decoded, Results] | None = None
            while (batch := self._timed("reading", lambda: next(decoded, None))) is not None:
                piece = ahead.popleft()
                tally.decoding += batch.seconds
                explained = self._timed("computing", partial(self._explain, piece, batch))
                # A device works on this batch while the results of the one before are fetched.
                if waiting is not None:
                    self._hand_over(writer, *waiting)
                    if progress is not None:
                        progress(tally)
                waiting = piece, batch, explained
                if self.device.type == "cpu":
                    self._hand_over(writer, *waiting)
                    waiting = None
                    if progress is not None:
                        progress(tally)
            if waiting is not None:
                self._hand_over(writer, *waiting)
            self._timed("writing", writer.close)
            self.store.write_failures()
            tally.ended = time.perf_counter()
            if progress is not None:
                progress(tally)
        except BaseException:
            writer.stop()
            tally.ended = time.perf_counter()
            raise
        return tally

    def recompute(self, images: Sequence[int]) -> Iterator[tuple[int, Mapping[str, npt.NDArray[Any]], str | None]]:
        """Images once more, for comparing: number, arrays as they would be stored, and why it failed."""
        size = self.decoders.batch_size
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        decoded = self.decoders.batches([self.locate(i) for i in part] for part in parts)
        for part in parts:
            batch = next(decoded)
            explained = self._explained(batch.pixels, self.labels[list(part)])
            arrays, failed = self._arrays(batch, explained, self.labels[list(part)])
            for place, number in enumerate(part):
                yield number, {name: array[place] for name, array in arrays.items()}, failed.get(place)

    def _located(self, shards: Iterable[int], ahead: deque[_Piece]) -> Iterator[list[Location]]:
        for piece in self._pieces(shards):
            ahead.append(piece)
            yield [self.locate(number) for number in piece.images]

    def _pieces(self, shards: Iterable[int]) -> Iterator[_Piece]:
        size = self.decoders.batch_size
        for shard in shards:
            images = self.plan.range(shard)
            for start in range(images.start, images.stop, size):
                stop = min(start + size, images.stop)
                yield _Piece(shard, range(start, stop), stop == images.stop)

    def _timed(self, what: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return call()
        finally:
            setattr(self.tally, what, getattr(self.tally, what) + time.perf_counter() - started)

    def _explain(self, piece: _Piece, batch: Decoded) -> Results:
        return self._explained(batch.pixels, self.labels[piece.images.start : piece.images.stop])

    def _explained(self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int32]) -> Results:
        """Values, scale, whether they are finite, targets and logits, on their way to the host."""
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        while start < len(pixels):
            here = slice(start, start + self._together)
            try:
                with self.decoders.held() if self.device.type == "cpu" else nullcontext():
                    parts.append(self._part(pixels[here], labels[here]))
            except torch.OutOfMemoryError as error:
                if self._together == 1:
                    raise RampFastError(f"out of memory on {self.device} for a single image") from error
                self._together = -(-min(self._together, len(pixels)) // 2)
            else:
                start += self._together
                continue
            self._make_room()
        whole = parts[0] if len(parts) == 1 else tuple(torch.cat(some) for some in zip(*parts, strict=True))
        return to_host(whole, self.device)

    def _part(self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int32]) -> tuple[Tensor, ...]:
        images = self.normalised(torch.from_numpy(pixels))
        target = self.targets.of(self.engine, images, labels.tolist())
        found = self.engine.attribute(images, target=target, contrast=self.contrast, normalize=self.normalize)
        values, scale, finite = encode(found.maps, self.plan.dtype, self.plan.channels)
        return values, scale, finite, found.target.to(torch.int32), found.logits.to(torch.float32)

    def _make_room(self) -> None:
        """Give back what the device's memory holds for larger batches."""
        refresh = getattr(self.engine, "refresh", None)
        if refresh is not None:
            refresh()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _hand_over(self, writer: _Writer, piece: _Piece, batch: Decoded, explained: Results) -> None:
        labels = self.labels[piece.images.start : piece.images.stop]
        arrays, failed = self._timed("computing", lambda: self._arrays(batch, explained, labels))
        self.tally.images += len(piece.images)
        self.tally.failures += len(failed)
        if self.on_failure is not None:
            for place, why in sorted(failed.items()):
                self.on_failure(piece.images[place], why)
        self._timed("writing", lambda: writer.put(piece.shard, arrays, failed, piece.last))

    def _arrays(
        self, batch: Decoded, explained: Results, labels: npt.NDArray[np.int32]
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[int, str]]:
        """The arrays of a store for a batch, and why images of it failed."""
        values, scale, sound, target, logits = (tensor.numpy() for tensor in explained.wait())
        finite = sound & np.isfinite(logits).all(1)
        failed = {int(place): "the map or the logits are not finite" for place in np.flatnonzero(~finite)}
        failed.update(batch.failures)
        arrays = {
            "maps": values,
            "scale": scale,
            "target": target,
            "logits": logits,
            "label": labels,
            "source_crc32": batch.checksums,
        }
        return arrays, failed


class _Writer:
    """A thread that writes what it is given, shard by shard."""

    def __init__(self, store: MapWriter, tally: Tally, room: int) -> None:
        self._store, self._tally = store, tally
        self._queue: queue.Queue[tuple[int, dict[str, npt.NDArray[Any]], dict[int, str], bool] | None]
        self._queue = queue.Queue(room)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="ramp-fast-write")
        self._thread.start()

    def put(self, shard: int, arrays: dict[str, npt.NDArray[Any]], failed: dict[int, str], last: bool) -> None:
        """Give a batch; waits where the writer is behind. Raises what the writer has met."""
        if self._error is None:
            self._queue.put((shard, arrays, failed, last))
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for all that was given."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Write what was given; a shard of which images are missing is dropped."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        shard: ShardWriter | None = None
        try:
            while (given := self._queue.get()) is not None:
                if self._error is not None:
                    continue  # take what is left, so that nobody waits to give more
                number, arrays, failed, last = given
                try:
                    shard = shard or self._store.writer(number)
                    shard.write(arrays, failed)
                    if last:
                        if shard.finish():
                            self._store.write_failures()
                        shard = None
                except BaseException as error:
                    self._error = error
        finally:
            if shard is not None:
                shard.abandon()
