"""The Triton kernels without a GPU: interpreted against the reference, and compiled.

By default a third of the cases and the first configurations for sm_90; with ``-m compile`` all of both, and with
``-m slow`` every configuration for three architectures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from triton_processes import SHARED, Process, output, start

from ramp_fast.ops.activation import FUNCTIONS, SHARES

pytest.importorskip("triton", reason="triton exists for Linux on x86_64 and aarch64 only")

# Columns of tensor memory of sm_100: a launch that asks for more fails.
TENSOR_MEMORY = 512


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


def test_interpreted(triton: dict[str, Process]) -> None:
    assert output(triton["interpreted"]).strip() == "360 cases agree"


@pytest.mark.compile
def test_every_case_interpreted() -> None:
    assert output(start("interpret_triton.py", "--all", TRITON_INTERPRET="1")).strip() == "1080 cases agree"


def test_compiles(triton: dict[str, Process]) -> None:
    reports = checked(output(triton["compiled"]))
    kernels = {report["kernel"] for report in reports}
    names = {
        "sum_partials",
        "norm_pullback",
        "norm_gradient",
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
        "ratio",
        *(f"activation_factor, {function}{gain}" for function in FUNCTIONS for gain in ("", ", gain")),
        *(f"activation_share, {function}" for function in SHARES),
        "affine_factor",
        "softmax_pullback",
        "max_pool_pullback",
        "split",
        "centring",
        "share",
        "scale_to",
    }
    names |= {f"attention by {by}, bf16, 64 columns, gated" for by in ("queries", "keys")}
    names |= {f"gradient of attention by {by}, bf16, 64 columns" for by in ("queries", "keys")}
    names |= {f"{n}, {dtype}" for n in ("linear_pullback", "linear_norm_pullback") for dtype in ("bf16", "float32")}
    names |= {f"product, {dtype}" for dtype in ("bf16", "float32")}
    assert kernels == names
    assert {r["capability"] for r in reports} == {90}


def test_compiles_where_every_integer_is_one(triton: dict[str, Process]) -> None:
    # a launch makes constants of them: one image, one token
    assert len(output(triton["of ones"]).splitlines()) > 15


@pytest.mark.compile
def test_every_configuration_compiles_for_hopper(tmp_path: Path) -> None:
    assert {report["capability"] for report in every_configuration(tmp_path, 90)} == {90}


@pytest.mark.slow
def test_every_configuration_compiles(tmp_path: Path) -> None:
    reports = every_configuration(tmp_path, *SHARED)
    assert len(reports) == 335
    assert {report["capability"] for report in reports} == set(SHARED)


def every_configuration(cache: Path, *capabilities: int) -> list[dict[str, Any]]:
    """Reports of every kernel in every configuration that it may be launched in."""
    command = "compile_triton.py", "--all", *map(str, capabilities)
    reports = checked(output(start(*command, TRITON_CACHE_DIR=str(cache))))
    assert len(reports) > 100 * len(capabilities)
    return reports
