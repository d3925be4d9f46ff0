"""Processes that interpret and compile the Triton kernels: ``TRITON_INTERPRET`` is read when a kernel is decorated.

They take a core for a minute. conftest.py starts those that a run needs before its first test, and most tests use one
core: they run beside each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Bytes of shared memory that one block may use.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

Process = subprocess.Popen[str]


def start(script: str, *arguments: str, **environment: str) -> Process:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAMP_FAST_", "TRITON_"))} | environment
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def output(process: Process) -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


class Processes:
    """Those of the default run, by what they do."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        compiles, ones = (str(Path(self._folder.name) / name) for name in ("compiled", "ones"))
        self.started = {
            "interpreted": start("interpret_triton.py", TRITON_INTERPRET="1"),
            "compiled": start("compile_triton.py", "90", TRITON_CACHE_DIR=compiles),
            "of ones": start("compile_triton.py", "--ones", "90", TRITON_CACHE_DIR=ones),
        }

    def stop(self) -> None:
        for process in self.started.values():
            process.kill()
            process.communicate()
        self._folder.cleanup()
