"""What exporting and translating share: quiet loggers, and short words for errors and sizes."""

from __future__ import annotations

import linecache
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    from torch.export import _trace
except ImportError:  # a private module, which needs not be there
    _trace = None  # type: ignore[assignment]

_CHATTY = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's warnings about the model's internals from the user's terminal."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def unprinted() -> Iterator[None]:
    """Keep the exporter from printing the graph so far on standard error, as it does where a model decides by values.

    It gets a ``print`` of its own: what others print meanwhile, the model among them, is printed.
    """
    names = {} if _trace is None else vars(_trace)
    names["print"] = lambda *_, **__: None
    try:
        yield
    finally:
        names.pop("print", None)


def known_size(size: int | torch.SymInt) -> int | None:
    """A size that the exporter took for fixed, if it did: then it may still come as a symbol."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def source_line(file: str, line: int) -> str:
    """A line of source, in words."""
    return f"line {line} of {Path(file).name}: {linecache.getline(file, line).strip()}"


class _Turns:
    """Many may look at models at once; whoever exports one is alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._looking, self._exporting = 0, False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Wait until nobody exports."""
        with self._condition:
            self._condition.wait_for(lambda: not self._exporting)
            self._looking += 1
        try:
            yield
        finally:
            with self._condition:
                self._looking -= 1
                self._condition.notify_all()

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """Wait until nobody looks or exports."""
        with self._condition:
            self._condition.wait_for(lambda: not (self._exporting or self._looking))
            self._exporting = True
        try:
            yield
        finally:
            with self._condition:
                self._exporting = False
                self._condition.notify_all()


TURNS = _Turns()
"""The exporter changes the state of the process and, while it runs, parameters that several models may share."""
