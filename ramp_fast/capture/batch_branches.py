"""What a forward pass decides by the size of the batch: ``if x.shape[0] == 1:``.

A captured graph has one branch of every decision, that of the example's batch. The exporter does not say where it took
one, so that decisions are noted while it runs. What they do to the logits is found out by running the model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch

from ramp_fast.capture.batch_axes import EXAMPLE_BATCH
from ramp_fast.capture.exporter import source_line

MOST_IMAGES = 64
"""The largest batch at which another branch is looked for."""

_TORCH = Path(torch.__file__).parent
_OURS = Path(__file__).parent


class Branch(NamedTuple):
    """A decision by the size of the batch.

    Attributes
    ----------
    sizes : tuple of int
        The smallest batch that takes the other branch, and the one after it.
    place : str
        The line of the model's code, in words.
    """

    sizes: tuple[int, ...]
    place: str


class BatchBranches:
    """While active, decisions that code outside PyTorch takes by a size that is not a number yet are noted.

    In the exporter's trace the size of the batch is the only such size. ``torch.SymBool`` is what a comparison with it
    gives; Python asks it for its truth where code branches. The class has other methods meanwhile: exports are
    made one at a time (:data:`ramp_fast.capture.exporter.TURNS`), and for other threads' they do what they did.
    """

    def __init__(self) -> None:
        self._found: dict[Any, str] = {}  # places by expression
        self._methods: dict[str, Any] = {}

    def __enter__(self) -> BatchBranches:
        for name in ("__bool__", "__int__"):
            self._methods[name] = vars(torch.SymBool)[name]
            setattr(torch.SymBool, name, self._watching(self._methods[name]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, method in self._methods.items():
            setattr(torch.SymBool, name, method)

    def _watching(self, method: Any) -> Any:
        def decide(condition: torch.SymBool) -> Any:
            place = _place(sys._getframe(1))
            if place is not None:
                self._found.setdefault(condition.node.expr, place)
            return method(condition)

        return decide

    def branches(self) -> list[Branch]:
        """The decisions, each with sizes of batches for which it is the other one than for the example's."""
        return [Branch(_other_sizes(expression), place) for expression, place in self._found.items()]


def _place(frame: FrameType | None) -> str | None:
    """The line that asks, if it is neither PyTorch's nor ours. (``bool(size)`` asks by way of a comparison.)"""
    if frame is not None and frame.f_code.co_filename == torch.__file__:
        frame = frame.f_back
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename)
    if _TORCH in path.parents or path.parent == _OURS:
        return None
    return source_line(frame.f_code.co_filename, frame.f_lineno)


def _other_sizes(expression: Any) -> tuple[int, ...]:
    """Where a condition is another than for the example's batch; one image where its size has gone from it."""
    symbols = list(expression.free_symbols)
    if not symbols:  # the exporter has it that there are two images or more
        return (1,)
    if len(symbols) > 1:
        return ()
    here = expression.subs(symbols[0], EXAMPLE_BATCH)
    other = next((n for n in range(1, MOST_IMAGES + 1) if expression.subs(symbols[0], n) != here), None)
    return () if other is None else (other, other + 1)
