"""The package builds without a compiler, and refuses to where the extension is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="the build backend is part of the dev extra")

ROOT = Path(__file__).parents[2]


def build(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAMP_FAST_", "CMAKE_", "SKBUILD_"))}
    env |= environment
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    command += [f"--config-settings=build-dir={out / 'build'}", "--wheel-dir", str(out), str(ROOT)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def build_without_compiler(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return build(out, CC=str(out / "no-cc"), CXX=str(out / "no-c++"), **environment)


def test_without_a_compiler_the_wheel_is_pure_python(tmp_path: Path) -> None:
    result = build_without_compiler(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WITHOUT its C++ extension" in result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ramp_fast/__init__.py", "ramp_fast/py.typed", "ramp_fast/_C.pyi", "ramp_fast/kernels/norm.py"} <= {*names}
    assert {f"ramp_fast/report/page/{name}" for name in ("index.html", "report.css", "report.js")} <= {*names}
    assert not any(name.startswith(("kernels/", "csrc/", "tests/")) for name in names)


def test_a_required_extension_fails_the_build(tmp_path: Path) -> None:
    result = build_without_compiler(tmp_path, RAMP_FAST_REQUIRE_EXTENSION="1")
    assert result.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="configures the extension")
@pytest.mark.parametrize(
    ("value", "problem"),
    [("on", "RAMP_FAST_CUDA is on and no nvcc was found"), ("yes please", "supported: auto, on, off")],
)
def test_required_cuda_kernels_fail_the_build(tmp_path: Path, value: str, problem: str) -> None:
    compilers = {"CC": "cc", "CXX": "c++", "CUDACXX": str(tmp_path / "no-nvcc")}
    result = build(
        tmp_path, RAMP_FAST_CUDA=value, RAMP_FAST_REQUIRE_EXTENSION="1" if value != "on" else "", **compilers
    )
    assert result.returncode != 0
    assert problem in " ".join((result.stdout + result.stderr).split())
    assert not list(tmp_path.glob("*.whl"))


def test_metadata() -> None:
    (script,) = entry_points(group="console_scripts", name="ramp-fast")
    assert script.value == "ramp_fast.cli:main"
    triton = [r for r in requires("ramp-fast") or () if r.startswith("triton")]
    assert len(triton) == 1
    assert "platform_system" in triton[0]


def test_diagnostics(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ramp_fast"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    for line in (
        "ramp_fast 0.",
        "torch 2.",
        "  cpu: ",
        "  reference: available",
        "  triton: ",
        "  cuda: ",
        "  forced: ",
    ):
        assert line in result.stdout
