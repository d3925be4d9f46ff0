"""A fixture for tests that build several engines of one model: torch.export, most of their time, runs once for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ramp_fast.capture import export as exporting


@pytest.fixture(scope="module")
def export_once() -> Iterator[None]:
    """Let :func:`ramp_fast.capture.capture` reuse the program that it exported last, for the same model and shape."""
    export = exporting._export
    last: list[Any] = []

    def cached(model: torch.nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
        if not (last and last[0] is model and last[1] == shape):
            last[:] = [model, shape, export(model, shape)]
        program: torch.export.ExportedProgram = last[2]
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_export", cached)
        yield
