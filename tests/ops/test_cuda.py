"""The CUDA sources compile for three architectures, without spills; and on a GPU: that the kernels agree.

``test_cuda_on_host.py`` runs the kernels' logic where there is no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import CASES, Options, odd_options

from ramp_fast import ops

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def newest(nvcc: str) -> tuple[int, ...]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"release (\d+)\.(\d+)", text)[0]))


@pytest.mark.compile
@pytest.mark.skipif(NVCC is None, reason="compiles with nvcc")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles(source: Path, architecture: int, tmp_path: Path) -> None:
    if architecture >= 100 and newest(NVCC) < (12, 8):
        pytest.skip("this nvcc does not know the architecture")
    command = [NVCC, "-std=c++17", "-O3", f"-I{CSRC}", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    command += ["-Werror", "all-warnings", "-o", str(tmp_path / "out.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = re.split(r"Compiling entry function ", done.stderr)[1:]
    assert kernels
    for text in kernels:
        name = re.sub(r".*?(\d+)([a-z_]+_kernelI\w*?)EE.*", r"\2", text.split("'")[1])
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        shared = int((re.search(r"(\d+) bytes smem", text) or [0, 0])[1])
        spilt = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", text)]
        print(f"sm_{architecture} {name}: {registers} registers, {shared} bytes shared")
        assert spilt == [0, 0, 0], f"{name} spills: {text}"
        assert shared <= 48 * 1024
        # all threads of a block fit into a multiprocessor: 65,536 registers, given out by eights
        assert registers <= (64 if "select" in name else 256)


@needs_gpu
@pytest.mark.skipif(bool(ops.unavailable("cuda")) and torch.cuda.is_available(), reason="built without CUDA kernels")
@pytest.mark.parametrize("name", ["mask_steps", "masked_copies"])
def test_agrees(name: str) -> None:
    ops.set_backend("cuda")
    for o in [*odd_options(), Options(batch=5, inner=(9, 4099), seed=1, zeros=True)]:
        args = CASES[name].arguments(o)
        on_device = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        actual = getattr(ops, name)(*on_device)
        ops.set_backend("reference")
        expected = getattr(ops, name)(*args)
        ops.set_backend("cuda")
        assert torch.equal(actual.cpu(), expected), o
        assert actual.stride() == expected.stride()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device() -> None:
    scores = torch.randn(2, 5000)
    with torch.cuda.device(0):
        steps = ops.mask_steps(scores.to("cuda:1"), [10, 20], True)
        assert torch.cuda.current_device() == 0
    assert torch.equal(steps.cpu(), ops.mask_steps(scores, [10, 20], True))
