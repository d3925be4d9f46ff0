"""What a source of images holds: for each image its name, where its bytes are, and what is said of its class."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ramp_fast.data.classes import ClassNames
from ramp_fast.data.files import Problem
from ramp_fast.data.labels import class_indices
from ramp_fast.data.locations import Location, WholeFile

__all__ = ["Record", "Region", "Source"]

Region = Callable[[tuple[int, int]], npt.NDArray[np.bool_]]
"""The size (height, width) of a photograph -> where its object is, bool ``[height, width]``."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of an image before it is read.

    Attributes
    ----------
    name : str
        Distinct within the source: its path from the top, without suffix.
    location : Location
        Where its bytes are, relative to the source's root.
    group : str, optional
        What the source says of its class: the name of a folder, a WordNet id, or a number.
    region : Region, optional
        Where its object is.
    target : int, optional
        The model's class, where the caller has said it.
    """

    name: str
    location: Location
    group: str | None = None
    region: Region | None = None
    target: int | None = None


@dataclass
class Source:
    """Images that are read one by one; made by :func:`ramp_fast.data.open_source`.

    Attributes
    ----------
    root : str
        The folder or archive, to which locations are relative.
    layout : str
        One of :data:`ramp_fast.data.LAYOUTS`.
    records : sequence of Record
        One per image.
    groups : sequence of str
        All that records may say of classes, sorted: where they are numbered by order, this is the order.
    problems : list of Problem
        Files that cannot be used, as far as opening tells.
    """

    root: str
    layout: str
    records: Sequence[Record]
    groups: Sequence[str] = ()
    problems: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        """Images, those included that turn out to be unreadable."""
        return len(self.records)

    @property
    def names(self) -> list[str]:
        """One per image, distinct."""
        return [record.name for record in self.records]

    def labels(self, class_names: ClassNames | None) -> list[int] | None:
        """The model's class of every image; None where the source says nothing of classes.

        Raises
        ------
        InputError
            The names of classes that the source uses cannot be told.
        """
        if not self.records or (self.records[0].group is None and self.records[0].target is None):
            return None
        classes = class_indices(self.root, self.groups, class_names) if self.groups else {}
        return [classes[r.group] if r.target is None else r.target for r in self.records]  # type: ignore[index]  # group

    def locate(self, index: int) -> Location:
        """Where an image lies."""
        return self.records[index].location.below(self.root)

    def shown(self, index: int) -> str:
        """What messages call an image: its file, or its archive and its name."""
        where = self.locate(index)
        return where.path if isinstance(where, WholeFile) else f"{where.path}: {self.records[index].name}"

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises
        ------
        ImageError, OSError
            It cannot be read.
        """
        return self.locate(index).read()

    def evenly(self, limit: int | None) -> Source:
        """So many of the images, evenly spaced, so that of folders sorted by class all classes are there."""
        count = len(self.records)
        if limit is None or limit >= count:
            return self
        chosen = [self.records[i * count // limit] for i in range(limit)]
        return Source(self.root, self.layout, chosen, self.groups, self.problems)

    def digest(self) -> str:
        """SHA-256 of names and sizes, in order; times of modification are not in it, for copies have others."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps([record.name, record.location.size]).encode())
        return digest.hexdigest()


def distinct(records: Iterable[tuple[str, str]]) -> list[str]:
    """A distinct name for each of (name without suffix, whole name): the first where no other has it."""
    pairs = list(records)
    counts = Counter(short.casefold() for short, _ in pairs)
    whole = Counter(long.casefold() for _, long in pairs)
    names: list[str] = []
    seen: Counter[str] = Counter()
    for short, long in pairs:
        name = short if counts[short.casefold()] == 1 and short.casefold() not in whole else long
        seen[name.casefold()] += 1
        again = seen[name.casefold()]
        names.append(name if again == 1 else f"{name}~{again}")
    return names
