"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from shared_exports import shared

from ramp_fast.capture import export

# Files that are about capture: each of their models is exported by itself.
OWN_EXPORTS = {
    "test_model_checks",
    "test_models",
    "test_no_trace",
    "test_patched",
    "test_preserve",
    "test_batch_axes",
    "test_batch_branches",
    "test_graph_cache",
    "test_vocabulary",
    "test_written_out",
}
_shared = shared(export._exported)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in one process for every core, unless ``-n`` says how many; chosen files in this one.

    Most of the time goes into torch.export, which is Python on one core.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ:
        return  # one of those processes, or a pytest that a test starts
    if not whole or getattr(config.option, "numprocesses", 0) is not None or config.option.usepdb:
        return
    config.option.numprocesses = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    config.option.dist = "loadfile"  # tests of a file share models
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started


@pytest.fixture(autouse=True, scope="module")  # so that fixtures of modules share them too
def _exports(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.rpartition(".")[2] in OWN_EXPORTS:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_exported", _shared)
        yield
