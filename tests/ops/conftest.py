"""Fixtures for the operators: poisoned memory, backends and instruction sets put back after every test."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from cases import poison_memory
from triton_processes import Process, Processes

from ramp_fast import ops
from ramp_fast.ops import _registry

_processes = pytest.StashKey[Processes]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the processes that tests of this run wait for."""
    waiting = any("triton" in getattr(item, "fixturenames", ()) for item in session.items)
    if waiting and not session.config.option.collectonly and importlib.util.find_spec("triton"):
        session.stash[_processes] = Processes()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _processes in session.stash:
        session.stash[_processes].stop()


@pytest.fixture
def triton(request: pytest.FixtureRequest) -> dict[str, Process]:
    """The processes of this run, by what they do."""
    return request.session.stash[_processes].started


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
