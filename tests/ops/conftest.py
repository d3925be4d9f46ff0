"""Fixtures for the operators: poisoned memory, backends and instruction sets put back after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import poison_memory

from ramp_fast import ops
from ramp_fast.ops import _registry


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Every tensor that torch allocates and the scratch of every kernel are full of NaN."""
    poison_memory(True)
    assert torch.empty(7).isnan().all()
    yield
    poison_memory(False)


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
