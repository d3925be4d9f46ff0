"""Writing a store of maps: whole shards, on the disk before the journal names them, by one run or parts of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ramp_fast._files import reason, sync_folder, temporary_name, write_whole
from ramp_fast.results.maps import (
    FAILURES,
    IMAGES,
    MAPS,
    PLAN,
    RUNS,
    ImageLine,
    JournalLine,
    Plan,
    StoredMaps,
)
from ramp_fast.results.shard_folder import BusyError, ShardFolder, reported
from ramp_fast.results.store import StoreError, fingerprint
from ramp_fast.results.tables import csv_text
from ramp_fast.results.zarr_files import ArraySpec, group_document, shard_index

__all__ = ["BusyError", "MapWriter", "ShardWriter", "images_digest"]


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


class MapWriter(ShardFolder):
    """The store that a run writes; see :class:`ramp_fast.results.shard_folder.ShardFolder`."""

    what = "store of maps"
    plan_name = PLAN
    own = frozenset({PLAN, IMAGES, MAPS, FAILURES, RUNS})
    plan: Plan | None = None

    def places(self) -> Iterable[Path]:
        return self.folder, self.folder / MAPS, *(self.folder / MAPS).glob("*/")

    def _enter(self) -> None:
        self.look()

    def look(self) -> Plan | None:
        """Read the plan, if there is one, and the journals: other parts may have written them."""
        self.read_journals()
        if (self.folder / PLAN).exists():
            self.plan = Plan.read(self.folder)
            if _digest(self.folder / IMAGES) != self.plan.images_digest:
                raise StoreError(f"{self.folder / IMAGES}: damaged: its hash is not the one in {PLAN}")
        return self.plan

    def create(self, plan: Plan, images: Sequence[ImageLine]) -> None:
        """Write a plan; it comes last, so that a store with a plan has all that belongs to it."""
        maps = self.folder / MAPS
        lines = "".join(image.text() for image in images)
        with reported(self.folder):
            write_whole(self.folder / IMAGES, lines.encode())
            attributes = {
                "software": "ramp_fast",
                "relevance": "maps * scale",
                "names": f"../{IMAGES}, in this order",
            }
            write_whole(maps / "zarr.json", group_document(attributes).encode())
            for spec in plan.arrays.values():
                document = spec.document(plan.count, plan.shard_size)
                write_whole(maps / spec.name / "zarr.json", document.encode())
            write_whole(self.folder / PLAN, (json.dumps(plan.document(), indent=1) + "\n").encode())
        self.plan = plan

    def failed(self, shard: int) -> Mapping[int, str]:
        """Images of a finished shard that failed, by place within it."""
        return self._journal[shard].failed

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
            with reported(self.folder):
                write_whole(path, data)

    @staticmethod
    def _shown(name: str) -> str:
        return name.encode("utf-8", "backslashreplace").decode()

    def append_run(self, about: Mapping[str, Any]) -> None:
        """Add a line to ``runs.jsonl``."""
        with reported(self.folder), open(self.folder / RUNS, "a", encoding="utf-8") as file:
            file.write(json.dumps(about) + "\n")


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
        with reported(self.store.folder):
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
        with reported(self.store.folder):
            self._digest.update(index)
            self._file.write(index)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, folder / self._maps.file(self.shard))
            sync_folder(folder / self._maps.name)
            digests = {self._maps.name: self._digest.hexdigest()}
            for name, array in self._rest.items():
                data = array.tobytes()
                digests[name] = hashlib.sha256(data).hexdigest()
                write_whole(folder / self._specs[name].file(self.shard), data)
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
