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
    assert run("interpret_triton.py", TRITON_INTERPRET="1").strip() == "75 cases agree"


def test_compiles(tmp_path: Path) -> None:
    capabilities = [80, 90, 100]
    lines = run("compile_triton.py", *map(str, capabilities), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    reports = [json.loads(line) for line in lines]
    compiled = {(report["kernel"], report["capability"]) for report in reports}
    assert compiled == {(k, c) for k in ("norm_pullback", "junction") for c in capabilities}
    for report in reports:
        assert report["target"], report
        assert report["cubin"] > 0, report
        assert report["shared"] <= 48 * 1024, report
        assert report["resources"]["STACK"] == 0, f"registers spill: {report}"
        assert report["resources"]["REG"] <= 128, report
