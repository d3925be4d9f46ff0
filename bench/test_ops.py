"""What do the fused operators cost? Each group holds the kernel, the equation in plain torch, and a plain copy.

Run: ``pytest bench/test_ops.py --benchmark-group-by=group``. Sizes are those of ViT-B/16 at batch 8 with contrast
(max-pooling: of VGG's first, one image). The ``GB/s`` column (in ``extra_info``) counts every operand and result once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ramp_fast import ops
from ramp_fast.ops import pack_panels

TOKENS, WIDTH, HIDDEN, HEADS, BATCH, RHS = 197, 768, 3072, 12, 8, 2


def _arguments() -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, y = normal(BATCH, TOKENS, WIDTH), normal(BATCH, TOKENS, WIDTH)
    c, d = normal(RHS, BATCH, TOKENS, WIDTH), normal(RHS, BATCH, TOKENS, WIDTH)
    scale = torch.rand(RHS, BATCH, generator=generator)
    weight, bias = normal(WIDTH), normal(WIDTH)
    panels = pack_panels(normal(HIDDEN, WIDTH).bfloat16())
    c_hidden = normal(RHS, BATCH, TOKENS, HIDDEN).bfloat16()
    hidden = normal(BATCH, TOKENS, HIDDEN)
    attention = normal(RHS, BATCH, HEADS, TOKENS, TOKENS).bfloat16()
    qkv = normal(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    heads = torch.nn.functional.scaled_dot_product_attention(*qkv)
    c_heads = normal(RHS, BATCH, TOKENS, HEADS, WIDTH // HEADS).transpose(2, 3)
    return {
        "mass": (x, c, True),
        "rescale": (c, scale, True),
        "merge": (c, scale, d, scale, True),
        "junction": (c, x, y, True, torch.bfloat16),
        "merge_junction": (c, scale, d, scale, x, y, True, torch.bfloat16),
        "norm_pullback": (c, x, weight, 1e-6),
        "linear_norm_pullback": (c_hidden, panels, x, weight, bias, 1e-6, True),
        "linear_pullback": (c_hidden, panels, x, torch.bfloat16),
        "scale_by": (c_hidden, hidden),
        "gelu_factor": (hidden, False, torch.bfloat16),
        "softmax_pullback": (normal(BATCH, HEADS, TOKENS, TOKENS), attention),
        "max_pool_pullback": (normal(RHS, 1, 112, 112, 64).bfloat16(), normal(1, 224, 224, 64), 2, 2, True),
        "attention_pullback": (*qkv, heads, c_heads, 0.125, True, True),
    }


ARGUMENTS = _arguments()


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in (values if isinstance(values, tuple | list) else (values,)) if isinstance(v, Tensor)]


def _bytes(args: Any, result: Any) -> int:
    return sum(t.numel() * t.element_size() for t in [*_tensors(args), *_tensors(result)])


def _measure(benchmark: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    result = benchmark.pedantic(function, args=args, rounds=15, iterations=1, warmup_rounds=3)
    benchmark.extra_info["GB/s"] = round(_bytes(args, result) / benchmark.stats.stats.median / 1e9, 2)
    return result


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_operator(benchmark: Any, name: str, backend: str) -> None:
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    benchmark.group = name
    args = ARGUMENTS[name]
    ops.set_backend("reference")
    expected = _tensors(getattr(ops, name)(*args))
    ops.set_backend(backend)
    try:
        actual = _tensors(_measure(benchmark, getattr(ops, name), args))
    finally:
        ops.set_backend(None)
    for e, a in zip(expected, actual, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm()
        assert error < 1e-3, f"relative error {error:.2g}"


@pytest.mark.parametrize("name", ["junction", "merge_junction", "norm_pullback", "scale_by"])
def test_copy(benchmark: Any, name: str) -> None:
    """A plain copy that moves as many bytes as the operator: its time over the operator's is the bandwidth reached."""
    benchmark.group = name
    args = ARGUMENTS[name]
    source = torch.ones(_bytes(args, getattr(ops, name)(*args)) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    assert torch.equal(_measure(benchmark, target.copy_, (source,)), source)


@pytest.mark.parametrize("name", ["mass", "junction", "norm_pullback", "scale_by", "softmax_pullback"])
def test_call_overhead(benchmark: Any, name: str) -> None:
    """A call on a handful of elements: dispatch, views, checks, allocation."""
    benchmark.group = "overhead"
    x = torch.ones(1, 2, 3)
    c = torch.ones(2, 1, 2, 3)
    args: dict[str, tuple[Any, ...]] = {
        "mass": (x, c, True),
        "junction": (c, x, x, True),
        "norm_pullback": (c, x, None, 1e-6),
        "scale_by": (c, x),
        "softmax_pullback": (x, c),
    }
    result = benchmark(getattr(ops, name), *args[name])
    assert not any(t.isnan().any() for t in _tensors(result))
