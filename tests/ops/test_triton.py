"""The Triton kernels without a GPU: interpreted against the reference, and compiled for three architectures.

``TRITON_INTERPRET`` is read when a kernel is decorated, so both run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton exists for Linux on x86_64 and aarch64 only")

HERE = Path(__file__).parent
# Bytes of shared memory that one block may use.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Columns of tensor memory of sm_100: a launch that asks for more fails.
TENSOR_MEMORY = 512


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAMP_FAST_", "TRITON_"))} | environment
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both take a minute on one core: started together."""
    folder = str(tmp_path_factory.mktemp("triton"))
    processes = {
        "interpreted": start("interpret_triton.py", TRITON_INTERPRET="1"),
        "compiled": start("compile_triton.py", *map(str, SHARED), TRITON_CACHE_DIR=folder),
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def checked(lines: str) -> list[dict[str, Any]]:
    reports = [json.loads(line) for line in lines.splitlines()]
    for report in reports:
        assert report["target"], report
        assert report["stack"] == 0, f"registers spill: {report}"
        assert not report["traps"], report
        assert report["tensor_memory"] <= TENSOR_MEMORY, report
        assert report["shared"] <= SHARED[report["capability"]], report
        assert report["wgmma"] == report["wgmma_wanted"], report
        if not report["products"]:
            assert report["registers"] <= 128, report
    return reports


def test_interpreted(side_by_side: dict[str, subprocess.Popen[str]]) -> None:
    assert output(side_by_side["interpreted"]).strip() == "685 cases agree"


def test_compiles(side_by_side: dict[str, subprocess.Popen[str]]) -> None:
    reports = checked(output(side_by_side["compiled"]))
    kernels = {report["kernel"] for report in reports}
    names = {
        "sum_partials",
        "norm_pullback",
        "junction",
        "merge_junction",
        "row_statistics",
        "prepare attention",
        "mass",
    }
    names |= {
        "merge",
        "rescale_parts",
        "scale_by",
        "gelu_factor",
        "gelu_factor, tanh",
        "affine_factor",
        "softmax_pullback",
        "max_pool_pullback",
    }
    names |= {f"attention by {by}, bf16, 64 columns, gated" for by in ("queries", "keys")}
    names |= {f"{n}, {dtype}" for n in ("linear_pullback", "linear_norm_pullback") for dtype in ("bf16", "float32")}
    names |= {f"{n}, of a library's sums" for n in ("linear_pullback", "linear_norm_pullback")}
    assert kernels == names
    assert {(r["kernel"], r["capability"]) for r in reports} == {(k, c) for k in names for c in SHARED}


def test_compiles_where_every_integer_is_one(tmp_path: Path) -> None:
    # a launch makes constants of them: one image, one token
    lines = output(start("compile_triton.py", "--ones", "90", TRITON_CACHE_DIR=str(tmp_path))).splitlines()
    assert len(lines) > 15


@pytest.mark.compile
def test_every_configuration_compiles(tmp_path: Path) -> None:
    command = "compile_triton.py", "--all", *map(str, SHARED)
    assert len(checked(output(start(*command, TRITON_CACHE_DIR=str(tmp_path))))) == 221
