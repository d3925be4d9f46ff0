"""Writing a store of maps: whole shards, on the disk before the journal names them, by one run or parts of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ramp_fast._files import reason
from ramp_fast.results.maps import (
    FAILURES,
    IMAGES,
    JOURNAL,
    JOURNALS,
    MAPS,
    PLAN,
    RUNS,
    ImageLine,
    JournalLine,
    Plan,
    StoredMaps,
    read_journal,
    read_journals,
)
from ramp_fast.results.store import StoreError, check_writable, fingerprint, remove_leftovers, temporary_name
from ramp_fast.results.tables import csv_text
from ramp_fast.results.zarr_files import ArraySpec, group_document, shard_index

__all__ = ["BusyError", "MapWriter", "ShardWriter", "images_digest"]

LOCKS = "locks"
"""Files that processes lock; nothing is in them that matters."""

_OWN = frozenset({PLAN, IMAGES, MAPS, FAILURES, RUNS, LOCKS})


class BusyError(StoreError):
    """Another run is writing the store."""


def images_digest(images: Sequence[ImageLine]) -> str:
    """SHA-256 of ``images.jsonl``."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.text().encode())
    return digest.hexdigest()


def _digest(path: Path) -> str | None:
    try:
        return str(fingerprint(path)["sha256"])
    except OSError:
        return None


class MapWriter:
    """The store that a run writes; a context manager, which holds its lock.

    Parameters
    ----------
    folder : str or pathlib.Path
        Made when missing.
    part : (int, int), optional
        (I, N): this run does the I-th of N parts (from 1), beside others, also on other machines. Each has a journal of
        its own. Without it there may be no other run.

    Raises
    ------
    BusyError
        Another run is writing it.
    StoreError
        It cannot be written to, or holds something else.
    """

    def __init__(self, folder: str | Path, part: tuple[int, int] | None = None) -> None:
        self.folder, self.part = Path(folder), part
        check_writable(folder)
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        foreign = [name for name in names if name not in _OWN and not Path(name).match(JOURNALS)]
        if PLAN not in names and foreign:
            raise StoreError(f"{folder} holds other files ({foreign[0]}) and no store of maps: choose another --out")
        self._locks: list[IO[str]] = []
        self._journal_path = self.folder / (JOURNAL if part is None else f"journal-{part[0]}-of-{part[1]}.jsonl")
        self.plan: Plan | None = None
        try:
            self._locks.append(_locked(self.folder / LOCKS / "run", shared=part is not None))
            if part is not None:
                self._locks.append(_locked(self.folder / LOCKS / f"{part[0]}-of-{part[1]}"))
            for path in [self._journal_path] if part is not None else sorted(self.folder.glob(JOURNALS)):
                _cut(path, read_journal(path)[1])
            for place in (self.folder, self.folder / MAPS, *(self.folder / MAPS).glob("*/")):
                remove_leftovers(place)
            self.look()
        except BaseException:
            self.close()
            raise

    def look(self) -> Plan | None:
        """Read the plan, if there is one, and the journals: other parts may have written them."""
        self._journal = read_journals(self.folder)
        if (self.folder / PLAN).exists():
            self.plan = Plan.read(self.folder)
            if _digest(self.folder / IMAGES) != self.plan.images_digest:
                raise StoreError(f"{self.folder / IMAGES}: damaged: its hash is not the one in {PLAN}")
        return self.plan

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other part is in here: while a plan is made, or what concerns all parts is written."""
        with _locked(self.folder / LOCKS / "plan", wait=True):
            yield

    def __enter__(self) -> MapWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write it."""
        for lock in self._locks:
            lock.close()  # the lock goes with it; the file stays, for removing it would race with another run
        self._locks = []

    def create(self, plan: Plan, images: Sequence[ImageLine]) -> None:
        """Write a plan; it comes last, so that a store with a plan has all that belongs to it."""
        maps = self.folder / MAPS
        lines = "".join(image.text() for image in images)
        with _reported(self.folder):
            _write_whole(self.folder / IMAGES, lines.encode())
            attributes = {
                "software": "ramp_fast",
                "relevance": "maps * scale",
                "names": f"../{IMAGES}, in this order",
            }
            _write_whole(maps / "zarr.json", group_document(attributes).encode())
            for spec in plan.arrays.values():
                document = spec.document(plan.count, plan.shard_size)
                _write_whole(maps / spec.name / "zarr.json", document.encode())
            _write_whole(self.folder / PLAN, (json.dumps(plan.document(), indent=1) + "\n").encode())
        self.plan = plan

    def failed(self, shard: int) -> Mapping[int, str]:
        """Images of a finished shard that failed, by place within it."""
        return self._journal[shard].failed

    def turn(self, shard: int) -> int:
        """How often a shard has been finished before."""
        return self._journal[shard].turn + 1 if shard in self._journal else 0

    def writer(self, shard: int) -> ShardWriter:
        """What writes a shard."""
        return ShardWriter(self, shard)

    @cached_property
    def stored(self) -> StoredMaps:
        """The store, for reading."""
        return StoredMaps(self.folder)

    def write_failures(self) -> None:
        """Write ``failures.csv`` as the journal has them, where it says something else."""
        path = self.folder / FAILURES
        with self.alone():
            rows = ((self._shown(name), why) for name, why in self.stored.failures().items())
            data = csv_text(("image", "why"), rows).encode()
            with contextlib.suppress(OSError):
                if path.read_bytes() == data:
                    return
            with _reported(self.folder):
                _write_whole(path, data)

    @staticmethod
    def _shown(name: str) -> str:
        return name.encode("utf-8", "backslashreplace").decode()

    def append_run(self, about: Mapping[str, Any]) -> None:
        """Add a line to ``runs.jsonl``."""
        with _reported(self.folder), open(self.folder / RUNS, "a", encoding="utf-8") as file:
            file.write(json.dumps(about) + "\n")

    def commit(self, line: JournalLine) -> None:
        """Name a finished shard in the journal, for good."""
        path = self._journal_path
        with _reported(self.folder):
            created = not path.exists()
            with open(path, "ab") as file:
                before = file.tell()
                try:
                    file.write(line.text().encode())
                    file.flush()
                    os.fsync(file.fileno())
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.truncate(path, before)
                    raise
            if created:
                _sync_folder(self.folder)
        self._journal[line.shard] = line


class ShardWriter:
    """Writes the images of one shard, in order, and then finishes it."""

    def __init__(self, store: MapWriter, shard: int) -> None:
        assert store.plan is not None
        self.store, self.shard = store, shard
        self._plan = store.plan
        self._images = self._plan.range(shard)
        self._specs = dict(self._plan.arrays)
        self._maps = self._specs.pop("maps")
        self._rest = {
            name: np.full((self._plan.shard_size, *spec.one), spec.fill, spec.stored_dtype)
            for name, spec in self._specs.items()
        }
        self._failed: dict[int, str] = {}
        self._written = 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._path = store.folder / MAPS / self._maps.name / temporary_name()

    def write(self, arrays: Mapping[str, npt.NDArray[Any]], failed: Mapping[int, str]) -> None:
        """Take the next images.

        Parameters
        ----------
        arrays : mapping
            All arrays of the plan but ``done``, each ``[n, ...]``.
        failed : mapping of int to str
            Places within these images -> why there is nothing. Their entries are those of images that are not done.
        """
        count = len(arrays["maps"])
        here = slice(self._written, self._written + count)
        bad = sorted(failed)
        values = np.ascontiguousarray(arrays["maps"], self._maps.stored_dtype)
        if bad:
            values = values.copy()
            values[bad] = self._maps.fill
        with _reported(self.store.folder):
            if self._file is None:
                self._file = open(self._path, "xb")  # noqa: SIM115  # closed by finish or abandon
            data = values.reshape(-1).view(np.uint8).data
            self._digest.update(data)
            self._file.write(data)
        for name, array in self._rest.items():
            if name == "done":
                array[here] = True
            else:
                array[here] = arrays[name]
            if bad and name != "label":
                array[[self._written + place for place in bad]] = self._specs[name].fill
        self._failed.update({self._written + place: failed[place] for place in bad})
        self._written += count

    def finish(self) -> Mapping[int, str]:
        """Bring the shard to the disk, under its names and into the journal; returns what failed."""
        assert self._file is not None
        assert self._written == len(self._images)
        folder = self.store.folder / MAPS
        index = shard_index(self._plan.shard_size, self._written, self._maps.item_bytes)
        with _reported(self.store.folder):
            self._digest.update(index)
            self._file.write(index)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, folder / self._maps.file(self.shard))
            _sync_folder(folder / self._maps.name)
            digests = {self._maps.name: self._digest.hexdigest()}
            for name, array in self._rest.items():
                data = array.tobytes()
                digests[name] = hashlib.sha256(data).hexdigest()
                _write_whole(folder / self._specs[name].file(self.shard), data)
        self.store.commit(JournalLine(self.shard, digests, self._failed, self.store.turn(self.shard)))
        return self._failed

    def abandon(self) -> None:
        """Remove what has been written of an unfinished shard."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing writes what is left, for which there may be no room
                self._file.close()
        self._path.unlink(missing_ok=True)


def check_file(path: Path, spec: ArraySpec, plan: Plan, shard: int, digest: str) -> str | None:
    """What is wrong with a file of a finished shard; None where nothing is."""
    found = hashlib.sha256()
    size = 0
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                found.update(block)
                size += len(block)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    wanted = spec.file_bytes(plan.shard_size, len(plan.range(shard)))
    if size != wanted:
        return f"damaged: {size} bytes, not {wanted}"
    return None if found.hexdigest() == digest else "damaged: its SHA-256 is not the journal's"


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Say what cannot be written as an error of this package."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write to {folder}: {reason(error)}; what is finished is kept, the same command goes on from there"
        ) from error


def _write_whole(path: Path, data: bytes) -> None:
    """A file that has its name only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / temporary_name()
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut(path: Path, whole: int) -> None:
    """Remove the torn end of a journal, so that the next line begins as one."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > whole:
            os.truncate(path, whole)


def _locked(path: Path, *, shared: bool = False, wait: bool = False) -> IO[str]:
    """An open file that no other process has locked; the lock goes with the process, however it ends."""
    try:
        path.parent.mkdir(exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # it stays open while the lock is held
    except OSError as error:
        raise StoreError(f"cannot write to {path.parent}: {reason(error)}") from error
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        file.seek(0)
        who = file.read(200).strip()
        file.close()
        store = path.parent.parent
        raise BusyError(f"{store} is being written by another run ({who or 'unknown'}): wait for it") from error
    except OSError:  # a file system without locks: shards are written whole all the same
        return file
    if not shared and not wait:
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
    return file
