"""The CUDA kernels without a GPU: compiled as C++ with a stand-in for CUDA's header, threads as fibers.

What this cannot see is how fast they are, and races between threads that no order of whole runs between barriers shows.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import CASES, Options
from torch import Tensor

from ramp_fast import ops
from ramp_fast.ops import masking

pybind11 = pytest.importorskip("pybind11", reason="compiles bindings")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("c++") is None, reason="compiles with c++ and uses ucontext"
    ),
]

SOURCES = Path(__file__).parent / "cuda_on_host"
ORDERS = [0, 1, 7]  # threads ascending, descending, shuffled


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    library = tmp_path_factory.mktemp("cuda_on_host") / "cuda_on_host.so"
    includes = SOURCES, SOURCES.parents[2] / "csrc", pybind11.get_include(), sysconfig.get_path("include")
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    command += [*(f"-I{folder}" for folder in includes), str(SOURCES / "module.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("cuda_on_host", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def kernels(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The operators' own CUDA implementations call them; tensors on the CPU stand for those on device 1."""
    monkeypatch.setattr(masking, "C", module)
    monkeypatch.setattr(masking, "_current_stream", lambda tensor: (1, 0))
    module.set_order(0)
    ops.set_backend("reference")
    yield module
    assert module.current_device() == 0  # the device is put back


def mask_steps(scores: Tensor, ks: list[int], descending: bool) -> Tensor:
    return masking._mask_steps_cuda(scores, ks, descending)


def masked_copies(images: Tensor, *args: Tensor | int | bool, skip: int = 0) -> Tensor:
    """The kernel's result, its memory ``skip`` elements behind a multiple of 16 bytes, with nothing written around."""
    expected = ops.masked_copies(images, *args)
    room = torch.full((expected.numel() + 32 + skip,), 77.0, dtype=images.dtype)
    out = room.as_strided(expected.shape, expected.stride(), 16 + skip)
    masking._masked_copies_cuda(out, images, *args)
    assert (room[: 16 + skip] == 77).all()
    assert (room[16 + skip + expected.numel() :] == 77).all()
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_cases(kernels: ModuleType, order: int) -> None:
    kernels.set_order(order)
    shapes = [(), (1,), (5, 7), (3, 4, 5), (3, 4, 8), (513,)]
    for seed in range(24):
        dtype = (torch.float32, torch.float64, torch.bfloat16)[seed % 3]
        o = Options(batch=1 + seed % 3, inner=shapes[seed % 6], x_dtype=dtype, contrast=seed % 2 > 0, seed=seed)
        args = CASES["mask_steps"].arguments(o)
        assert torch.equal(mask_steps(*args), ops.mask_steps(*args)), o
        args = CASES["masked_copies"].arguments(o)
        assert torch.equal(masked_copies(*args), ops.masked_copies(*args)), o
        assert torch.equal(masked_copies(*args, skip=1), ops.masked_copies(*args)), o


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [8, 9])  # rows in packs, and element by element
def test_layouts(kernels: ModuleType, width: int, shared: bool, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(width)
    images, baseline = (torch.randn(2, 3, 5, width, generator=generator) for _ in range(2))
    images = images.contiguous(memory_format=memory_format)
    steps = torch.randint(-1, 9, (2, 1 if shared else 3, 5, width), generator=generator, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for base in (baseline, baseline[:1]):
            for reveal in (False, True):
                args = images.to(dtype), steps, base.to(dtype), 2, 7, reveal
                assert torch.equal(masked_copies(*args), ops.masked_copies(*args))


def _scores(count: int = 5000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, count, generator=generator)
    special = normal.clone()
    special[0, ::5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0] * (count // 25))
    return {
        "normal": normal,
        "float64": normal.double() * 10.0 ** torch.randint(-200, 200, normal.shape, generator=generator),
        "bfloat16": normal.bfloat16(),
        "special": special,
        "cut at zero": normal.relu(),
        "all equal": torch.zeros(1, count),
    }


@pytest.mark.parametrize("name", _scores())
def test_bounds(kernels: ModuleType, name: str) -> None:
    scores = _scores()[name]
    count = scores.shape[1]
    kernels.set_order(3)
    hundred = [k * count // 100 for k in range(101)]
    for ks, descending in [
        ([], True),
        ([0, 0], True),
        ([count], False),
        ([0, 3, 3, count - 1], False),
        (hundred, True),
    ]:
        assert torch.equal(mask_steps(scores, ks, descending), ops.mask_steps(scores, ks, descending))


def test_more_steps_than_a_launch_takes(kernels: ModuleType) -> None:
    scores = (40 * torch.randn(1, 1100, generator=torch.Generator().manual_seed(0))).round()
    for ks in ([0, 0, *range(1101)], [0] * 3000):
        assert torch.equal(mask_steps(scores, ks, False), ops.mask_steps(scores, ks, False))


def test_refused(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="ks must ascend"):
        mask_steps(torch.zeros(1, 3), [2, 1], True)
    with pytest.raises(ValueError, match="not of 1 bytes"):
        kernels.cuda_mask_steps(0, 1, 1, 3, [1], True, 0, 1, 0)
    with pytest.raises(RuntimeError, match="choosing the device on CUDA: invalid device ordinal"):
        kernels.cuda_mask_steps(0, 4, 1, 3, [1], True, 0, 7, 0)
    assert "invalid device" in kernels.cuda_problem(7)
    assert kernels.cuda_problem(1) == ""
