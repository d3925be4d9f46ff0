"""A folder that is written by shards: locks, a journal of what is finished, files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, ClassVar, TypeVar

from ramp_fast._files import reason, sync_folder
from ramp_fast.results.maps import JOURNAL, JOURNALS, JournalLine, read_journal, read_journals
from ramp_fast.results.store import StoreError, check_writable, remove_leftovers

__all__ = ["LOCKS", "BusyError", "ShardFolder", "reported"]

LOCKS = "locks"
"""Files that processes lock; nothing is in them that matters."""


F = TypeVar("F", bound="ShardFolder")


class BusyError(StoreError):
    """Another run is writing the folder."""


class ShardFolder:
    """The folder that a run writes; a context manager, which holds its lock.

    A subclass says what lies in it, and reads it in :meth:`look`.

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

    what: ClassVar[str]
    """What it is, for messages."""
    plan_name: ClassVar[str]
    """The file that is written when all that belongs to an empty one is there."""
    own: ClassVar[frozenset[str]]
    """Names of its other files and folders, beside journals and locks."""

    def __init__(self, folder: str | Path, part: tuple[int, int] | None = None) -> None:
        self.folder, self.part = Path(folder), part
        check_writable(folder)
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        foreign = [name for name in names if name not in self.own | {LOCKS} and not Path(name).match(JOURNALS)]
        if self.plan_name not in names and foreign:
            raise StoreError(f"{folder} holds other files ({foreign[0]}) and no {self.what}: choose another --out")
        self._locks: list[IO[str]] = []
        self._journal_path = self.folder / (JOURNAL if part is None else f"journal-{part[0]}-of-{part[1]}.jsonl")
        self._journal: dict[int, JournalLine] = {}
        try:
            self._locks.append(_locked(self.folder / LOCKS / "run", shared=part is not None))
            if part is not None:
                self._locks.append(_locked(self.folder / LOCKS / f"{part[0]}-of-{part[1]}"))
            for path in [self._journal_path] if part is not None else sorted(self.folder.glob(JOURNALS)):
                _cut(path, read_journal(path)[1])
            for place in self.places():
                remove_leftovers(place)
            self._enter()
        except BaseException:
            self.close()
            raise

    def places(self) -> Iterable[Path]:
        """Folders in which a run that was killed may have left temporary files."""
        return [self.folder]

    def _enter(self) -> None:
        """Read what is there, once the lock is held."""
        self.read_journals()

    def read_journals(self) -> None:
        """Read the journals: other parts may have written them."""
        self._journal = read_journals(self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other part is in here: while a plan is made, or what concerns all parts is written."""
        with _locked(self.folder / LOCKS / "plan", wait=True):
            yield

    def __enter__(self: F) -> F:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write it."""
        for lock in self._locks:
            lock.close()  # the lock goes with it; the file stays, for removing it would race with another run
        self._locks = []

    def journal(self) -> Mapping[int, JournalLine]:
        """Finished shards, as far as the journals have been read."""
        return self._journal

    def own_shards(self, shards: int) -> range:
        """Those that this run does, of so many."""
        number, count = self.part or (1, 1)
        return range(number - 1, shards, count)

    def turn(self, shard: int) -> int:
        """How often a shard has been finished before."""
        return self._journal[shard].turn + 1 if shard in self._journal else 0

    def commit(self, line: JournalLine) -> None:
        """Name a finished shard in the journal, for good."""
        path = self._journal_path
        with reported(self.folder):
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
                sync_folder(self.folder)
        self._journal[line.shard] = line


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Say what cannot be written as an error of this package."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write to {folder}: {reason(error)}; what is finished is kept, the same command goes on from there"
        ) from error


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
