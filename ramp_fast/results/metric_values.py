"""Values of metrics of a store's maps, written shard by shard beside a journal.

========================  =====================================================================================
``evaluation-plan.json``  which store, which metrics with which settings
``values/NUMBER.npz``     of a shard: for each map and metric the metric and its components, an entry per image
``journal.jsonl``         a line for each finished shard; of a run in parts ``journal-I-of-N.jsonl``
========================  =====================================================================================
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramp_fast._files import open_regular, reason, write_whole
from ramp_fast.results.maps import JournalLine
from ramp_fast.results.marks import SOFTWARE
from ramp_fast.results.shard_folder import ShardFolder, reported
from ramp_fast.results.store import StoreError

__all__ = ["FORMAT", "ValueWriter", "shard_digest"]

FORMAT = 1

PLAN, VALUES = "evaluation-plan.json", "values"


def shard_digest(line: JournalLine) -> str:
    """What tells whether a shard of a store still has the maps that values were computed of."""
    return hashlib.sha256(json.dumps([dict(line.files)], sort_keys=True).encode()).hexdigest()


class ValueWriter(ShardFolder):
    """Values that an evaluation writes; see :class:`ramp_fast.results.shard_folder.ShardFolder`."""

    what = "evaluation of stored maps"
    plan_name = PLAN
    own = frozenset({PLAN, VALUES})

    def places(self) -> Iterable[Path]:
        return self.folder, self.folder / VALUES

    def plan(self) -> dict[str, Any] | None:
        """What is evaluated; None before :meth:`create`.

        Raises
        ------
        StoreError
            It cannot be read.
        """
        path = self.folder / PLAN
        try:
            with open_regular(path) as file:
                document: dict[str, Any] = json.loads(file.read())
            if document.pop("software") != SOFTWARE or document.pop("format") != FORMAT:
                raise StoreError(f"{path}: an evaluation of another version; this reads {FORMAT}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: damaged, or none of {SOFTWARE}") from error
        return document

    def create(self, plan: Mapping[str, Any]) -> None:
        """Write what is going to be evaluated, in plain JSON values."""
        document = {"software": SOFTWARE, "format": FORMAT, **plan}
        with reported(self.folder):
            write_whole(self.folder / PLAN, (json.dumps(document, indent=1) + "\n").encode())

    def is_finished(self, shard: int, maps: str) -> bool:
        """Whether there are values of a shard, of maps with that digest."""
        line = self.journal().get(shard)
        return line is not None and line.files.get("maps") == maps and self._path(shard).is_file()

    def write(self, shard: int, values: Mapping[str, npt.NDArray[Any]], maps: str) -> None:
        """Finish a shard: its values by name, and the digest of the maps they are of."""
        buffer = io.BytesIO()
        np.savez(buffer, **dict(values))  # type: ignore[arg-type]  # names are the caller's
        data = buffer.getvalue()
        with reported(self.folder):
            write_whole(self._path(shard), data)
        files = {VALUES: hashlib.sha256(data).hexdigest(), "maps": maps}
        self.commit(JournalLine(shard, files, {}, self.turn(shard)))

    def read(self, shard: int) -> dict[str, npt.NDArray[Any]]:
        """Values of a finished shard.

        Raises
        ------
        StoreError
            The file is damaged.
        """
        path = self._path(shard)
        try:
            with open_regular(path) as file:
                data = file.read()
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {reason(error)}") from error
        if hashlib.sha256(data).hexdigest() != self.journal()[shard].files[VALUES]:
            raise StoreError(
                f"{path}: damaged: its SHA-256 is not the journal's; remove it, and the same command computes shard "
                f"{shard} again"
            )
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def _path(self, shard: int) -> Path:
        return self.folder / VALUES / f"{shard:06d}.npz"
