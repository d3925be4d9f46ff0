"""What do the products of linear layers cost, against ``F.linear`` of as many operations in the same rounds?

    pytest bench/test_linear.py -q -s

Sizes are those of ViT-B/16 and ViT-Ti/16, four images at a time; pull-backs have two right-hand sides. Six weights take
turns, as layers do. Below 1 is faster than the default float32 product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import ops
from ramp_fast.gemm import Matrix, Selection

IMAGES, TOKENS, WEIGHTS, ROUNDS = 4, 197, 6, 12

# (inputs, outputs)
LAYERS = {
    "ViT-B qkv": (768, 2304),
    "ViT-B proj": (768, 768),
    "ViT-B fc1": (768, 3072),
    "ViT-B fc2": (3072, 768),
    "ViT-Ti qkv": (192, 576),
    "ViT-Ti fc1": (192, 768),
}


def forward(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """The product of a layer with every one of the weights, and its rows."""
    matrices = [Matrix(torch.randn(outputs, inputs).to(dtype)) for _ in range(WEIGHTS)]
    x = torch.randn(IMAGES, TOKENS, inputs).to(dtype)
    return lambda: [matrix(x) for matrix in matrices], IMAGES * TOKENS


def pullback(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """From outputs to inputs of both signs, through a LayerNorm."""
    selections = [Selection(torch.randn(outputs, inputs).to(dtype)) for _ in range(WEIGHTS)]
    c, x = torch.randn(2, IMAGES, TOKENS, outputs).to(dtype), torch.randn(IMAGES, TOKENS, inputs)
    weight, bias = torch.ones(inputs), torch.zeros(inputs)
    return lambda: [s.through_norm(c, x, weight, bias, 1e-6, True) for s in selections], 2 * IMAGES * TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("direction", [forward, pullback], ids=["forward", "pullback"])
@pytest.mark.parametrize("layer", LAYERS)
def test_against_linear(benchmark: Any, layer: str, direction: Callable[..., Any], dtype: torch.dtype) -> None:
    if ops.unavailable("cpu"):
        pytest.skip(ops.unavailable("cpu"))
    benchmark.group = f"{layer}, {direction.__name__}"
    inputs, outputs = LAYERS[layer]
    call, rows = direction(inputs, outputs, dtype)
    weights, x = [torch.randn(outputs, inputs) for _ in range(WEIGHTS)], torch.randn(rows, inputs)
    default: list[float] = []

    def time_default() -> None:
        start = time.perf_counter()
        for weight in weights:
            F.linear(x, weight)
        default.append(time.perf_counter() - start)

    results: list[Tensor | tuple[Tensor, Tensor]] = benchmark.pedantic(
        call, setup=time_default, rounds=ROUNDS, warmup_rounds=3
    )
    assert all((r if isinstance(r, Tensor) else r[0]).isfinite().all() for r in results)
    seconds = benchmark.stats.stats.median
    ratio = seconds / statistics.median(default[3:])
    gflops = 2 * WEIGHTS * rows * inputs * outputs / seconds / 1e9
    benchmark.extra_info.update(ratio=ratio, gflops=gflops)
    print(f"\n{layer}, {direction.__name__}, {dtype}: {ratio:.2f} of F.linear, {gflops:.0f} GFLOP/s")
