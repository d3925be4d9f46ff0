"""A store of maps: what it holds, and reading it. ``map_writer`` writes it.

====================  ==========================================================================================
``plan.json``         what is computed, by which model and rule; its hash names the run
``images.jsonl``      an image a line: name, class the source says or null, bytes, time of modification
``maps.zarr``         zarr v3: maps, scale, target, logits, label, done, source_crc32, each with images first
``journal.jsonl``     a line for each finished shard, with SHA-256 of its files and the images that failed; of a run in
                      parts ``journal-I-of-N.jsonl``
``failures.csv``      image, why
``runs.jsonl``        a line for each run: images, seconds, shares of time
====================  ==========================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ramp_fast._files import open_regular, reason
from ramp_fast.errors import InputError
from ramp_fast.results.marks import SOFTWARE
from ramp_fast.results.store import StoreError
from ramp_fast.results.zarr_files import ArraySpec

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["ImageLine", "JournalLine", "Plan", "StoredMap", "StoredMaps", "array_specs", "open_maps", "read_journal"]

FORMAT = 1

DTYPES = ("float16", "float32", "int8")

PLAN, IMAGES, MAPS, JOURNAL, FAILURES, RUNS = (
    "plan.json",
    "images.jsonl",
    "maps.zarr",
    "journal.jsonl",
    "failures.csv",
    "runs.jsonl",
)


JOURNALS = "journal*.jsonl"


@dataclass(frozen=True)
class Plan:
    """What a store holds, fixed before anything is computed.

    Attributes
    ----------
    request : mapping
        What was asked for, as far as it decides about values.
    settings : mapping
        What that came to: weights, preprocessing, sizes.
    source : mapping
        ``layout``, ``digest`` of names and sizes, and ``problems`` found in opening.
    count : int
        Images.
    shard_size : int
        Images of a shard, the unit of work.
    classes : list of str
        Names of the model's classes.
    map_shape : tuple of int
        Of one image: ``[K,] [C,] H, W``.
    dtype : str
        One of :data:`DTYPES`.
    targets : list of str
        What is explained: one, or K of them.
    channels : bool
        Whether maps have channels; else they are summed.
    images_digest : str
        SHA-256 of ``images.jsonl``.
    """

    request: Mapping[str, Any]
    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    count: int
    shard_size: int
    classes: Sequence[str]
    map_shape: tuple[int, ...]
    dtype: str
    targets: Sequence[str]
    channels: bool
    images_digest: str

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.count // self.shard_size)

    def range(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """Those of ``maps.zarr`` by name."""
        return array_specs(self.map_shape, self.dtype, len(self.targets), len(self.classes), self.channels)

    def document(self) -> dict[str, Any]:
        """In plain JSON types."""
        document = {
            "software": SOFTWARE,
            "format": FORMAT,
            "count": self.count,
            "shard_size": self.shard_size,
            "maps": {
                "shape": list(self.map_shape),
                "dtype": self.dtype,
                "targets": list(self.targets),
                "channels": self.channels,
            },
            "request": dict(self.request),
            "settings": dict(self.settings),
            "source": dict(self.source),
            "images_sha256": self.images_digest,
            "classes": list(self.classes),
        }
        document["hash"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        return document

    @classmethod
    def read(cls, folder: str | Path) -> Plan:
        """The plan of a store.

        Raises
        ------
        StoreError
            There is none, or it is damaged.
        """
        path = Path(folder) / PLAN
        try:
            with open_regular(path) as file:
                document = json.loads(file.read())
            kept = document.pop("hash")
            if document["software"] != SOFTWARE or document["format"] != FORMAT:
                raise StoreError(f"{path}: a plan of another version: {document.get('format')}; this reads {FORMAT}")
            if hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest() != kept:
                raise StoreError(f"{path}: damaged: its hash is another one")
            maps = document["maps"]
            return cls(
                document["request"],
                document["settings"],
                document["source"],
                document["count"],
                document["shard_size"],
                document["classes"],
                tuple(maps["shape"]),
                maps["dtype"],
                maps["targets"],
                maps["channels"],
                document["images_sha256"],
            )
        except FileNotFoundError as error:
            raise StoreError(f"{folder}: not a store of maps: no {PLAN} in it") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: damaged, or no plan of {SOFTWARE}") from error


def array_specs(
    map_shape: tuple[int, ...], dtype: str, targets: int, classes: int, channels: bool
) -> dict[str, ArraySpec]:
    """The arrays of a store by name; ``map_shape`` is ``[K,] [C,] H, W`` with K where there are several targets."""
    several = (targets,) if targets > 1 else ()
    axes = (("target",) if several else ()) + (("channel",) if channels else ()) + ("y", "x")
    per_target = ("image", *(("target",) if several else ()))
    specs = (
        ArraySpec("maps", map_shape, dtype, ("image", *axes), sharded=True),
        ArraySpec("scale", several, "float32", per_target),
        ArraySpec("target", several, "int32", per_target, fill=-1),
        ArraySpec("logits", (classes,), "float32", ("image", "class")),
        ArraySpec("label", (), "int32", ("image",), fill=-1),
        ArraySpec("done", (), "bool", ("image",), fill=False),
        ArraySpec("source_crc32", (), "uint32", ("image",)),
    )
    return {spec.name: spec for spec in specs}


@dataclass(frozen=True, slots=True)
class ImageLine:
    """A line of ``images.jsonl``: what the plan knows of an image. ``modified``: of its file or archive, in ns."""

    name: str
    label: int | None
    size: int | None
    modified: int | None

    def text(self) -> str:
        """The line, with its end."""
        return json.dumps([self.name, self.label, self.size, self.modified]) + "\n"


def read_images(folder: str | Path) -> list[ImageLine]:
    """The images of a plan, in order.

    Raises
    ------
    StoreError
        They cannot be read.
    """
    path = Path(folder) / IMAGES
    try:
        with open_regular(path) as file:
            return [ImageLine(*json.loads(line)) for line in file]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {reason(error)}") from error
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path}: damaged") from error


@dataclass(frozen=True)
class JournalLine:
    """That a shard is finished: SHA-256 of its files by array, and why images failed, by their place in the shard.

    ``turn`` counts how often it has been finished before; of several lines the one of the last turn holds.
    """

    shard: int
    files: Mapping[str, str]
    failed: Mapping[int, str]
    turn: int = 0

    def text(self) -> str:
        """The line, with its end."""
        failed = {str(place): why for place, why in sorted(self.failed.items())}
        turn = {"turn": self.turn} if self.turn else {}
        return json.dumps({"shard": self.shard, "files": dict(self.files), "failed": failed, **turn}) + "\n"


def read_journal(path: Path) -> tuple[dict[int, JournalLine], int]:
    """Finished shards of a journal, the last line of each, and how many bytes are whole lines.

    What a crash or a loss of power has torn, at the end, is passed over.
    """
    try:
        with open_regular(path) as file:
            data = file.read()
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {reason(error)}") from error
    found: dict[int, JournalLine] = {}
    whole = 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            failed = {int(place): str(why) for place, why in entry["failed"].items()}
            parsed = JournalLine(int(entry["shard"]), dict(entry["files"]), failed, int(entry.get("turn", 0)))
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        found[parsed.shard] = parsed
    return found, whole


def read_journals(folder: Path) -> dict[int, JournalLine]:
    """Finished shards of a store, by the journals of all its runs."""
    found: dict[int, JournalLine] = {}
    for path in sorted(folder.glob(JOURNALS)):
        for shard, line in read_journal(path)[0].items():
            if shard not in found or found[shard].turn <= line.turn:
                found[shard] = line
    return found


@dataclass(frozen=True)
class StoredMap:
    """One image of a store.

    Attributes
    ----------
    name : str
    map : numpy.ndarray
        float32 ``[H, W]``; ``[C, H, W]`` where channels are kept; with K targets these come first. Zero where not done.
    target : numpy.ndarray
        int32, ``[]`` or ``[K]``: classes explained.
    logits : numpy.ndarray [classes]
        float32.
    label : int or None
        The class that the source says.
    done : bool
        False where the image could not be read or attributed, or has not been yet.
    """

    name: str
    map: npt.NDArray[np.float32]
    target: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    label: int | None
    done: bool


class StoredMaps:
    """Maps of a store, read when they are asked for; made by :func:`open_maps`. It can be pickled, and has a length.

    Attributes
    ----------
    folder : pathlib.Path
    plan : Plan
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.plan = Plan.read(folder)

    def __len__(self) -> int:
        """Images of the plan."""
        return self.plan.count

    def __getitem__(self, image: int | str) -> StoredMap:
        """An image by number, also from the end, or by name.

        Raises
        ------
        IndexError, KeyError
            There is none.
        """
        place = self._place(image)
        label = int(self._one("label", place))
        relevance = decoded(self._one("maps", place), self._one("scale", place))
        done = bool(self._one("done", place))
        logits, target = self._one("logits", place), self._one("target", place)
        return StoredMap(self.names[place], relevance, target, logits, None if label < 0 else label, done)

    def __iter__(self) -> Iterator[StoredMap]:
        """Every image, in order."""
        return (self[place] for place in range(len(self)))

    @cached_property
    def images(self) -> list[ImageLine]:
        """What the plan knows of every image."""
        return read_images(self.folder)

    @cached_property
    def names(self) -> list[str]:
        """Of every image."""
        return [image.name for image in self.images]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def stored(self, image: int | str) -> npt.NDArray[Any]:
        """The map as it is stored, to be multiplied by the image's ``scale``."""
        return self._one("maps", self._place(image))

    def array(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """An array of the store, or a part of it along images.

        Parameters
        ----------
        name : str
            "maps" (as stored), "scale", "target", "logits", "label", "done" or "source_crc32".
        start, stop : int
            Images.

        Returns
        -------
        numpy.ndarray [stop - start, ...]
            The fill value of the array (0, -1 for classes, False) where a shard is not finished.
        """
        if name not in self.plan.arrays:
            raise InputError(f"no array {name!r} in a store; there are {', '.join(self.plan.arrays)}")
        spec, size = self.plan.arrays[name], self.plan.shard_size
        first, last, _ = slice(start, stop).indices(len(self))
        result = np.full((max(0, last - first), *spec.one), spec.fill, np.dtype(spec.dtype))
        at = first
        while at < last:
            shard = at // size
            upto = min(last, (shard + 1) * size)
            found = self._read(spec, at, upto - at)
            if found is not None:
                result[at - first : upto - first] = found
            at = upto
        return result

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """Which images have a map."""
        return self.array("done")

    def dataset(self, done_only: bool = True) -> Dataset[dict[str, Any]]:
        """As a PyTorch data set of dicts: ``map`` (float32 Tensor), ``target``, ``logits``, ``label`` (-1: not known),
        ``index`` and ``name``.

        Parameters
        ----------
        done_only : bool
            Leave out images without a map.
        """
        from ramp_fast.results.map_dataset import MapDataset

        return MapDataset(self, np.flatnonzero(self.done) if done_only else np.arange(len(self)))

    def failures(self) -> dict[str, str]:
        """Images that could not be read or attributed -> why."""
        found: dict[str, str] = {}
        for shard, line in sorted(self.journal().items()):
            first = self.plan.range(shard).start
            found.update({self.names[first + place]: why for place, why in sorted(line.failed.items())})
        return found

    def journal(self) -> dict[int, JournalLine]:
        """Finished shards."""
        return read_journals(self.folder)

    def finished(self) -> set[int]:
        """Shards that a journal names and whose files are there, of the right size."""
        return {shard for shard in self.journal() if self._is_there(shard)}

    def _is_there(self, shard: int) -> bool:
        present = len(self.plan.range(shard))
        for spec in self.plan.arrays.values():
            try:
                size = os.stat(self.folder / MAPS / spec.file(shard)).st_size
            except OSError:
                return False
            if size != spec.file_bytes(self.plan.shard_size, present):
                return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "plan": self.plan}

    def _place(self, image: int | str) -> int:
        if isinstance(image, str):
            return self._places[image]
        place = image + len(self) if image < 0 else image
        if not 0 <= place < len(self):
            raise IndexError(f"image {image} of {len(self)}")
        return int(place)

    def _one(self, name: str, place: int) -> npt.NDArray[Any]:
        spec = self.plan.arrays[name]
        found = self._read(spec, place, 1)
        if found is None:
            return np.full(spec.one, spec.fill, np.dtype(spec.dtype))
        return found[0, ...]

    def _read(self, spec: ArraySpec, first: int, count: int) -> npt.NDArray[Any] | None:
        """Images of one file; None where it is not there."""
        shard, place = divmod(first, self.plan.shard_size)
        path = self.folder / MAPS / spec.file(shard)
        try:
            with open(path, "rb") as file:
                file.seek(place * spec.item_bytes)
                data = file.read(count * spec.item_bytes)
        except FileNotFoundError:
            return None
        if len(data) != count * spec.item_bytes:
            raise StoreError(f"{path} is too short: damaged; ramp-fast verify says more")
        found = np.frombuffer(data, spec.stored_dtype).reshape(count, *spec.one)
        return found.astype(spec.dtype, copy=True)


def decoded(values: npt.NDArray[Any], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Relevance from what is stored of an image: ``values * scale``, with a scale for each target."""
    return values.astype(np.float32) * scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))


def open_maps(folder: str | Path) -> StoredMaps:
    """Open a store that ``ramp-fast run`` has written, or is writing.

    Parameters
    ----------
    folder : str or pathlib.Path
        What ``--out`` named.

    Returns
    -------
    StoredMaps

    Raises
    ------
    StoreError
        It is none.

    Examples
    --------
    >>> maps = open_maps("val-maps")
    >>> maps[0].map.shape, maps["ILSVRC2012_val_00000001"].target
    >>> for batch in torch.utils.data.DataLoader(maps.dataset(), 64):
    ...     batch["map"]  # [64, 224, 224]
    """
    if not os.path.isdir(folder):
        raise StoreError(f"{folder}: {'not a folder' if os.path.exists(folder) else 'no such folder'}")
    return StoredMaps(folder)
