"""Names of classes: ImageNet's where the number of classes identifies the variant, else ``class K``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ramp_fast._checks import positive
from ramp_fast._files import read_text, reason
from ramp_fast.errors import InputError

__all__ = ["MAX_NAME", "ClassNames"]

MAX_NAME = 1000
"""Characters: every result holds all names, in an array as wide as the longest."""


class ClassNames:
    """Names of a classifier's outputs.

    Parameters
    ----------
    count : int
        Number of classes, at least 1.
    names : sequence of str, optional
        One name per class; None when they are not known.

    Raises
    ------
    InputError
        The number of names differs from the number of classes.
    """

    def __init__(self, count: int, names: Sequence[str] | None = None) -> None:
        positive("ClassNames", "count", count)
        if names is not None and len(names) != count:
            raise InputError(f"{len(names)} class names for a model with {count} classes; give one per class")
        self.count = count
        self.known = names is not None
        self._names = tuple(names) if names is not None else None

    @classmethod
    def imagenet(cls, count: int) -> ClassNames:
        """Names from timm for the ImageNet variant with this many classes.

        Parameters
        ----------
        count : int
            Number of classes. 1000 (1k), 11221 (21k, MIIL), 11821 (12k), 21841 (22k), 21842 (22k, Microsoft)
            and 21843 (21k, Google) are known.

        Returns
        -------
        ClassNames
            Without names (``known`` is False) for any other number.
        """
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset({"num_classes": count})
        if subset is None:
            return cls(count)
        names = [str(name) for name in ImageNetInfo(subset).label_descriptions()]
        # A table of another length than the head would name every class after the difference wrongly.
        return cls(count, names if len(names) == count else None)

    @classmethod
    def from_file(cls, path: str | Path, count: int) -> ClassNames:
        """Names from a text file, one per line, in the order of the classes.

        Parameters
        ----------
        path : str or pathlib.Path
            UTF-8 text, with a byte order mark or without; empty lines at the end are ignored, others are classes
            without a name.
        count : int
            Number of classes of the model.

        Raises
        ------
        InputError
            The file cannot be read as text, does not have ``count`` lines, or has one beyond ``MAX_NAME``.
        """
        try:
            text = read_text(path).rstrip()
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read class names from {path}: {reason(error)}") from error
        names = [line.strip() for line in text.split("\n")] if text else []
        long = next((number for number, name in enumerate(names, 1) if len(name) > MAX_NAME), None)
        if long is not None:
            raise InputError(f"{path}: line {long} has more than {MAX_NAME} characters, which is no name of a class")
        try:
            return cls(count, names)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        """Name of class ``index``, ``class K`` where it is not known.

        Raises
        ------
        IndexError
            ``index`` is not in ``[0, count)``.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"class {index} of {self.count}")
        name = self._names[index] if self._names is not None else ""
        return name or f"class {index}"

    def all(self) -> list[str]:
        """Every name, in the order of the classes."""
        return [self[i] for i in range(self.count)]

    def digest(self) -> str:
        """SHA-256 of the names: a result that shows other names is another one."""
        return hashlib.sha256(json.dumps(self.all()).encode()).hexdigest()
