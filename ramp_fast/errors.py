"""Exceptions of ramp_fast: all derive from :class:`RampFastError`."""

from __future__ import annotations

from collections.abc import Sequence


class RampFastError(Exception):
    """Base class of every error this package raises on purpose."""


class UnsupportedModelError(RampFastError):
    """The model cannot be attributed as it is.

    Parameters
    ----------
    message : str
        What was found and what to do.
    operations : sequence of (str, str), optional
        Every unsupported operation with the dotted name of the module it runs in.
    """

    def __init__(self, message: str, operations: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.operations = tuple(operations)


class InputError(RampFastError, ValueError):
    """An argument has the wrong shape, dtype, range or device."""


class BackendError(RampFastError, RuntimeError):
    """A backend that was asked for (environment variable or argument) cannot run here."""
