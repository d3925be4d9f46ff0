"""Processes that read and decode images ahead of the computation, into memory that they share with it.

A decoder is an interpreter of its own, started without torch (some 40 MB), which gets locations through a pipe and
writes pixels into a ring of batches. Processes, not threads: decoding and resizing hold Python's lock between their
steps, and the computation needs it too. The ring is an anonymous file that both map, so nothing is left anywhere when a
run is killed, and decoders end when the pipe does.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ramp_fast._files import reason
from ramp_fast.data.images import ImageError
from ramp_fast.data.locations import Location
from ramp_fast.data.pixels import Framing
from ramp_fast.errors import RampFastError

__all__ = ["Decoded", "Decoders"]

DEPTH = 4
"""Batches of the ring: one in the computation, one behind it whose copy to a device may be under way, two ahead."""

_MOST_DEATHS = 2
"""How often a process may end over one task before what it decodes is given up."""

_LEAST_PRIORITY = 19
"""Of processes, as ``nice`` counts."""

_HELD_BYTES = 16 * 2**20
"""Encoded images up to this size are read once, into memory."""

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ramp_fast.data.decoders import serve; serve()"


@dataclass
class Decoded:
    """A batch.

    Attributes
    ----------
    pixels : numpy.ndarray [N, H, W, 3]
        uint8, in the shared memory: of this batch until the one after the next is asked for. Black where one failed.
    failures : dict of int to str
        Place within the batch -> why its image could not be read.
    checksums : numpy.ndarray [N]
        uint32, CRC-32 of the encoded images; 0 where one failed.
    seconds : float
        Processor time that reading and decoding took.
    """

    pixels: npt.NDArray[np.uint8]
    failures: dict[int, str]
    checksums: npt.NDArray[np.uint32]
    seconds: float


@dataclass
class _Task:
    """Images that one process decodes; ``places`` within their batch, the ``slot`` of the ring."""

    batch: int
    slot: int
    places: list[int]
    locations: list[Location]
    deaths: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)
    ready: bool = False


class Decoders:
    """Decoding ahead of the computation; a context manager, which ends the processes.

    Parameters
    ----------
    framing : Framing
    batch_size : int
        Images of a batch at most.
    workers : int
        Processes; 0 decodes in the caller's, when asked.
    yielding : bool
        Leave the processor to whatever else wants it. For a computation on all cores, whose threads wait for one
        another: one that has to share its core holds up all others, while decoding takes as long at any time.

    Raises
    ------
    RampFastError
        Processes cannot be started here.
    """

    def __init__(self, framing: Framing, batch_size: int, workers: int, *, yielding: bool = False) -> None:
        self.framing, self.batch_size, self.yielding = framing, batch_size, yielding
        shape = (DEPTH, batch_size, *framing.size, 3)
        self._file = _anonymous_file(int(np.prod(shape)))
        self._memory = mmap.mmap(self._file, 0)
        self.ring: npt.NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8).reshape(shape)
        self._log = tempfile.TemporaryFile()  # what processes complain of  # noqa: SIM115  # closed by __exit__
        self._batches: dict[int, Decoded] = {}
        self._missing: dict[int, int] = {}  # batch -> images of it that are under way
        self._failed_starts = 0
        self._turn = 0
        self._workers: list[_Worker] = []
        try:
            self._workers += [self._started() for _ in range(workers)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers = []
        if self._file >= 0:
            os.close(self._file)
            self._log.close()
            self._file = -1
        # The mapping itself goes with the last array that looks at it.

    def batches(self, batches: Iterable[Sequence[Location]]) -> Iterator[Decoded]:
        """Decode batches, in order, some of them ahead of time.

        Parameters
        ----------
        batches : iterable of sequences of Location
            Taken one by one, no sooner than there is room.
        """
        while any(self._missing.values()):  # of batches that nobody came for
            self._receive()
        self._missing.clear()
        self._batches.clear()
        source = iter(batches)
        sent: deque[int] = deque()
        number = 0
        while True:
            # The batch that was given last is still looked at, and the one before it too while it is on its way to a
            # device.
            while len(sent) < DEPTH - 1:
                batch = next(source, None)
                if batch is None:
                    break
                self._send(number, batch)
                sent.append(number)
                number += 1
            if not sent:
                return
            first = sent.popleft()
            while self._missing[first]:
                self._receive()
            del self._missing[first]
            yield self._batches.pop(first)

    def _send(self, number: int, locations: Sequence[Location]) -> None:
        count = len(locations)
        if not 1 <= count <= self.batch_size:
            raise ValueError(f"a batch of {count} images; room for {self.batch_size}")
        slot = number % DEPTH
        pixels = self.ring[slot, :count]
        self._batches[number] = Decoded(pixels, {}, np.zeros(count, np.uint32), 0.0)
        self._missing[number] = count
        if not self._workers:
            task = _Task(number, slot, list(range(count)), list(locations))
            self._take(task, _decode(task.locations, task.places, self.framing, pixels))
            return
        size = -(-count // len(self._workers))
        for start in range(0, count, size):
            places = list(range(start, min(start + size, count)))
            # Of a small batch always another process has the larger part.
            worker = self._workers[self._turn % len(self._workers)]
            self._turn += 1
            self._give(worker, _Task(number, slot, places, [locations[p] for p in places]))

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.tasks.append(task)
        try:
            worker.connection.send((task.slot, task.places, task.locations))
        except OSError:  # it has ended: noticed when it is listened to, which gives its tasks to another
            return

    def _receive(self) -> None:
        """Wait for a process, and take what it says."""
        for ready in wait([worker.connection for worker in self._workers]):
            worker = next(w for w in self._workers if w.connection is ready)
            try:
                said = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker)
                return
            if said is None:
                worker.ready = True
                self._failed_starts = 0
            else:
                self._take(worker.tasks.popleft(), said)

    def _take(self, task: _Task, said: tuple[list[tuple[int, int, str | None]], float]) -> None:
        batch = self._batches[task.batch]
        found, seconds = said
        batch.seconds += seconds
        for place, checksum, failure in found:
            batch.checksums[place] = checksum
            if failure is not None:
                batch.failures[place] = failure
        self._missing[task.batch] -= len(found)

    def _replace(self, worker: _Worker) -> None:
        """Start another process for one that has ended, for its tasks, unless its first one has ended several."""
        status = worker.process.wait()
        worker.connection.close()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MOST_DEATHS * len(self._workers):
                self._log.seek(0)
                said = self._log.read()[-2000:].decode(errors="replace").strip().splitlines()
                raise RampFastError(f"processes that decode images end at once: {said[-1] if said else status}")
        tasks = list(worker.tasks)
        self._workers[self._workers.index(worker)] = other = self._started()
        if tasks and worker.ready:
            first = tasks.pop(0)
            first.deaths += 1
            if first.deaths < _MOST_DEATHS:
                tasks.insert(0, first)
            elif len(first.places) > 1:  # one of them alone may be the reason
                pairs = zip(first.places, first.locations, strict=True)
                tasks[:0] = [_Task(first.batch, first.slot, [p], [at], _MOST_DEATHS - 1) for p, at in pairs]
            else:
                how = f"signal {-status}" if status < 0 else f"exit code {status}"
                self.ring[first.slot, first.places[0]] = 0
                self._take(first, ([(first.places[0], 0, f"decoding it ended the process ({how})")], 0.0))
        for task in tasks:
            self._give(other, task)

    def _started(self) -> _Worker:
        if not hasattr(os, "set_inheritable") or os.name == "nt":
            raise RampFastError("decoding in processes needs Linux or macOS; pass --workers 0")
        ours, theirs = Pipe()
        setting = json.dumps({
            **{"pipe": theirs.fileno(), "memory": self._file, "shape": self.ring.shape},
            "yielding": self.yielding,
        })  # fmt: skip
        inherited = theirs.fileno(), self._file
        # A thread of its own for each call of a library would take the cores from the computation.
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), setting],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                pass_fds=inherited,
                env={**os.environ, **alone},
            )
        except OSError as error:
            ours.close()
            raise RampFastError(f"cannot start a process that decodes images: {reason(error)}") from error
        finally:
            theirs.close()
        ours.send(self.framing)
        return _Worker(process, ours)


def _anonymous_file(size: int) -> int:
    """The descriptor of a file without a name, in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("ramp_fast")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file


def serve() -> None:
    """What a process does: decode what it is told until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives the work
    warnings.simplefilter("ignore")  # what matters of a file is an error
    setting: dict[str, Any] = json.loads(sys.argv[2])
    if setting["yielding"]:
        os.nice(_LEAST_PRIORITY)
    shape = setting["shape"]
    pipe = Connection(setting["pipe"])
    ring = np.frombuffer(mmap.mmap(setting["memory"], 0), np.uint8).reshape(shape)
    try:
        framing = pipe.recv()
        pipe.send(None)
        while True:
            slot, places, locations = pipe.recv()
            pipe.send(_decode(locations, places, framing, ring[slot]))
    except (EOFError, OSError):
        return


def _decode(
    locations: Sequence[Location], places: Sequence[int], framing: Framing, batch: npt.NDArray[np.uint8]
) -> tuple[list[tuple[int, int, str | None]], float]:
    """Decode images into their places of a batch: places, checksums and failures, and the processor time."""
    started = time.thread_time()
    found: list[tuple[int, int, str | None]] = []
    for place, location in zip(places, locations, strict=True):
        try:
            with location.open() as file:
                checksum, file_or_bytes = _summed(file)
                batch[place] = framing(file_or_bytes)
        except OSError as error:
            failure = "no such file" if isinstance(error, FileNotFoundError) else reason(error)
        except ImageError as error:
            failure = str(error)
        except Exception as error:  # of a library that reads tables: one image is no reason to end all
            failure = f"{type(error).__name__}: {reason(error)}"
        else:
            found.append((place, checksum, None))
            continue
        batch[place] = 0
        found.append((place, 0, failure))
    return found, time.thread_time() - started


def _summed(file: BinaryIO) -> tuple[int, BinaryIO]:
    """CRC-32 of a file, and the file once more, in memory where it is small."""
    data = file.read(_HELD_BYTES + 1)
    checksum = zlib.crc32(data)
    if len(data) <= _HELD_BYTES:
        return checksum, io.BytesIO(data)
    for block in iter(lambda: file.read(1 << 20), b""):
        checksum = zlib.crc32(block, checksum)
    file.seek(0)
    return checksum, file
