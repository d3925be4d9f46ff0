"""The Triton kernels without a GPU: interpreted against the reference, and compiled for three architectures.

``TRITON_INTERPRET`` is read when a kernel is decorated, so both run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton exists for Linux on x86_64 and aarch64 only")

HERE = Path(__file__).parent


def run(script: str, *arguments: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAMP_FAST_", "TRITON_"))} | environment
    command = [sys.executable, str(HERE / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_interpreted() -> None:
    assert run("interpret_triton.py", TRITON_INTERPRET="1").strip() == "100 cases agree"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(capability: int, tmp_path: Path) -> None:
    report = json.loads(run("compile_triton.py", str(capability), TRITON_CACHE_DIR=str(tmp_path)))
    assert set(report) == {"norm_pullback", "junction"}
    for kernel in report.values():
        assert kernel["target"] or capability == 100  # sm_100 is compiled as sm_100a
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= 48 * 1024
        assert not kernel["spilled"]
