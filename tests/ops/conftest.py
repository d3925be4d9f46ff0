"""Fixtures for the operators: poisoned memory, backends and instruction sets put back after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ramp_fast import ops
from ramp_fast.ops import _registry


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill every tensor that torch allocates with NaN, so that an element that is never written shows.

    (The extension's own scratch is always full of NaN.)
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _defaults_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    backend = ops.forced_backend()
    isa = _registry.extension.active_isa() if _registry.extension is not None else None
    yield
    torch.set_num_threads(threads)
    ops.set_backend(backend)
    if isa is not None:
        ops.set_cpu_isa(isa)
