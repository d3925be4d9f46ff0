"""Which classes of every image are explained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ramp_fast.errors import InputError
from ramp_fast.explainer import Attribution

__all__ = ["Engine", "Targets"]


class Engine(Protocol):
    """What a run needs of :class:`ramp_fast.Engine`."""

    def attribute(
        self, images: Tensor, target: int | Tensor | None = ..., contrast: str = ..., normalize: str = ...
    ) -> Attribution:
        """Maps of images."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits of images."""


@dataclass(frozen=True)
class Targets:
    """Classes to explain: ``predicted``, ``label``, ``top:K``, numbers, or several of these.

    Attributes
    ----------
    names : tuple of str
        One for each map of an image: ``predicted``, ``label``, ``top 2``, ``class 17``.
    """

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, classes: int | None = None) -> Targets:
        """Targets of a command line, ``predicted,label`` for instance.

        Parameters
        ----------
        text : str
            Parts with commas between them.
        classes : int, optional
            Of the model.

        Raises
        ------
        InputError
            A part is unknown, there twice, or no class of the model.
        """
        names: list[str] = []
        for part in (p.strip() for p in text.split(",")):
            top = re.fullmatch(r"top:([0-9]+)", part)
            if part in ("predicted", "label"):
                names.append(part)
            elif top and int(top[1]) > 0:
                _check(int(top[1]) - 1, classes, part)
                names += [f"top {place}" for place in range(1, int(top[1]) + 1)]
            elif re.fullmatch(r"[0-9]+", part):
                _check(int(part), classes, part)
                names.append(f"class {int(part)}")
            else:
                raise InputError(f"targets are predicted, label, top:K or numbers of classes; got {part!r}")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"targets: {twice} is there twice")
        return cls(tuple(names))

    def needs_labels(self) -> bool:
        """Whether every image must have a label."""
        return "label" in self.names

    def of(self, engine: Engine, images: Tensor, labels: Sequence[int]) -> Tensor | None:
        """What ``attribute`` takes for some images: None for predicted classes alone, else ``[B]`` or ``[B, K]``.

        A place without an image (a failure) has label -1; it gets class 0.
        """
        if self.names == ("predicted",):
            return None
        ranked: Tensor | None = None
        columns = []
        for name in self.names:
            kind, _, number = name.partition(" ")
            if kind == "label":
                columns.append(torch.tensor(labels, device=images.device).clamp(min=0))
            elif kind == "class":
                columns.append(torch.full((len(images),), int(number), device=images.device))
            else:
                if ranked is None:  # stable: of equal logits the first, as argmax says
                    ranked = engine.logits(images).argsort(dim=1, descending=True, stable=True)
                columns.append(ranked[:, 0 if kind == "predicted" else int(number) - 1])
        return columns[0] if len(columns) == 1 else torch.stack(columns, 1)


def _check(number: int, classes: int | None, part: str) -> None:
    if classes is not None and number >= classes:
        raise InputError(f"targets: {part} is out of range: the model has classes 0 to {classes - 1}")
