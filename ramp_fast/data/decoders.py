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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, TypeVar

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

_LOOK = 0.002
"""Seconds between two looks at whether decoding is held up."""

_HELD_BYTES = 16 * 2**20
"""Encoded images up to this size are read once, into memory."""

_AHEAD_BYTES = 64 * 2**20
"""Of encoded images that one process holds before it decodes them, but for the last."""

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

    Raises
    ------
    RampFastError
        Processes cannot be started here.
    """

    def __init__(self, framing: Framing, batch_size: int, workers: int) -> None:
        self.framing, self.batch_size = framing, batch_size
        shape = (DEPTH, batch_size, *framing.size, 3)
        self._file = _anonymous_file(int(np.prod(shape)) + 1)
        self._memory = mmap.mmap(self._file, 0)
        self.ring, self._held = _mapped(self._memory, shape)
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

    @contextmanager
    def held(self) -> Iterator[None]:
        """Decode nothing meanwhile; files are read.

        For a computation on all cores, whose threads wait for one another: one that has to share its core holds up all
        of them, while decoding takes as long afterwards, when it has all cores.
        """
        self._held[0] = 1
        try:
            yield
        finally:
            self._held[0] = 0

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
        places = {"pipe": theirs.fileno(), "memory": self._file, "shape": self.ring.shape}
        setting = json.dumps({**places, "parent": os.getpid()})
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
    pipe = Connection(setting["pipe"])
    ring, held = _mapped(mmap.mmap(setting["memory"], 0), setting["shape"])

    def wait_while_held() -> None:
        while held[0] and os.getppid() == setting["parent"]:
            time.sleep(_LOOK)

    try:
        framing = pipe.recv()
        pipe.send(None)
        while True:
            slot, places, locations = pipe.recv()
            pipe.send(_decode(locations, places, framing, ring[slot], wait_while_held))
    except (EOFError, OSError):
        return


def _mapped(memory: mmap.mmap, shape: Sequence[int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The ring of batches, and behind it the byte that holds decoding up."""
    whole = np.frombuffer(memory, np.uint8)
    return whole[:-1].reshape(shape), whole[-1:]


def _decode(
    locations: Sequence[Location],
    places: Sequence[int],
    framing: Framing,
    batch: npt.NDArray[np.uint8],
    pause: Callable[[], None] = lambda: None,
) -> tuple[list[tuple[int, int, str | None]], float]:
    """Decode images into their places of a batch: places, checksums and failures, and the processor time.

    Files are read first; ``pause`` is called before each of them is decoded.
    """
    started = time.thread_time()
    read, total = [], 0
    for location in locations:
        ahead, failure = _tried(partial(_read, location, total < _AHEAD_BYTES))
        total += 0 if ahead is None or ahead.data is None else len(ahead.data)
        read.append((ahead, failure))
    found: list[tuple[int, int, str | None]] = []
    for place, location, (ahead, failure) in zip(places, locations, read, strict=True):
        if ahead is not None:
            pause()
            pixels, failure = _tried(partial(_pixels, location, ahead, framing))
            ahead.data = None
            if pixels is not None:
                batch[place] = pixels
                found.append((place, ahead.checksum, None))
                continue
        batch[place] = 0
        found.append((place, 0, failure))
    return found, time.thread_time() - started


_T = TypeVar("_T")


def _tried(call: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """What a call gives, or why it failed."""
    try:
        return call(), None
    except OSError as error:
        return None, "no such file" if isinstance(error, FileNotFoundError) else reason(error)
    except ImageError as error:
        return None, str(error)
    except Exception as error:  # of a library that reads tables: one image is no reason to end all
        return None, f"{type(error).__name__}: {reason(error)}"


@dataclass
class _Read:
    """An encoded image: its CRC-32, and the bytes unless they are many."""

    checksum: int
    data: bytes | None


def _read(location: Location, hold: bool) -> _Read:
    with location.open() as file:
        data = file.read(_HELD_BYTES + 1)
        checksum = zlib.crc32(data)
        if hold and len(data) <= _HELD_BYTES:
            return _Read(checksum, data)
        for block in iter(lambda: file.read(1 << 20), b""):
            checksum = zlib.crc32(block, checksum)
        return _Read(checksum, None)


def _pixels(location: Location, read: _Read, framing: Framing) -> npt.NDArray[np.uint8]:
    if read.data is not None:
        return framing(io.BytesIO(read.data))
    with location.open() as file:
        return framing(file)
