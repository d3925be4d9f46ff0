"""Operators in several Python threads: the interpreter lock, results, and how many native threads there are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, LARGE, as_tuple, need_kernel

from ramp_fast import ops
from ramp_fast.ops import _registry

pytestmark = pytest.mark.skipif(_registry.extension is None, reason="tests the C++ extension itself")


def kernel_call(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The one call of the extension that an operator makes."""
    kernel = getattr(_registry.extension, name)
    calls: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(_registry.extension, name, lambda *args: calls.append(args))
        getattr(ops, name)(*CASES[name].arguments(LARGE))
    (args,) = calls
    return lambda: kernel(*args)


@pytest.mark.parametrize("name", CASES)
def test_kernels_release_the_interpreter_lock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slowest = "amx" if name == "product" and "amx" in ops.cpu_isas() else "generic"
    need_kernel(name, slowest)
    ops.set_cpu_isa(slowest)
    torch.set_num_threads(1)
    call = kernel_call(name, monkeypatch)
    enough, ticks = 5, 0
    done = threading.Event()

    def work() -> None:
        until = time.monotonic() + 5  # on a busy machine the other thread may be long in coming
        while ticks < enough and time.monotonic() < until:
            call()
        done.set()

    switch = sys.getswitchinterval()
    sys.setswitchinterval(60)  # this thread only runs while the other one gives the lock up of its own accord
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while not done.wait(1e-5):
            ticks += 1
        thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert ticks >= enough


@pytest.mark.parametrize("name", CASES)
def test_calls_from_several_threads(name: str) -> None:
    need_kernel(name, ops.cpu_isas()[-1])
    torch.set_num_threads(2)
    arguments = [CASES[name].arguments(LARGE), CASES[name].arguments(replace(LARGE, batch=1, seed=2))]
    expected = [as_tuple(getattr(ops, name)(*args)) for args in arguments]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda args: as_tuple(getattr(ops, name)(*args)), arguments * 6)
        for got, want in zip(results, expected * 6, strict=True):
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_native_threads() -> None:
    # of torch's one pool, as many as torch is told to use; each Python thread has a team of its own, as torch has it
    code = """
import os, threading, torch
from concurrent.futures import ThreadPoolExecutor
from ramp_fast import ops
from ramp_fast.ops import _registry

def native():
    return len(os.listdir("/proc/self/task"))

def work(_):
    ops.mass(x, c, True)
    together.wait()
    count = native()
    together.wait()
    return count

x, c = torch.randn(4, 500_000), torch.randn(2, 4, 500_000)
before = native()
torch.set_num_threads(1)
ops.mass(x, c, True)
print(native() - before)
torch.set_num_threads(3)
ops.mass(x, c, True)
print(native() - before)
torch.exp(c)
print(native() - before)
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
print(mapped == {_registry.openmp_pool})
together = threading.Barrier(4)
with ThreadPoolExecutor(4) as pool:
    print(max(pool.map(work, range(4))) - before - 2 - 4)  # besides the main thread's team and the Python threads
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAMP_FAST_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.path.abspath(os.sep))
    assert result.stdout.split() == ["0", "2", "2", "True", str(4 * 2)], result.stdout + result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP's limit of threads")
def test_a_team_smaller_than_asked_for_does_every_task() -> None:
    code = """
import ctypes, torch
from ramp_fast import ops
from ramp_fast.ops import _registry

pool = ctypes.CDLL(_registry.openmp_pool)
x, c = torch.randn(4, 500_000), torch.randn(2, 4, 500_000)
torch.set_num_threads(1)
alone = ops.junction(c, x, -x, True, torch.bfloat16)
torch.set_num_threads(3)
assert pool.omp_get_thread_limit() == 2
again = ops.junction(c, x, -x, True, torch.bfloat16)
print(all(torch.equal(a, b) for a, b in zip(alone, again)))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAMP_FAST_")} | {"OMP_THREAD_LIMIT": "2"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.path.abspath(os.sep))
    assert result.stdout.split() == ["True"], result.stdout + result.stderr
