"""What do the fused operators cost? Each group holds the kernel, the equation in plain torch, and a plain copy.

Run: ``pytest bench/test_ops.py --benchmark-group-by=group``. Sizes are those of ViT-B/16 at batch 8 with contrast
(max-pooling: of VGG's first, one image). The ``GB/s`` column (in ``extra_info``) counts every operand and result once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ramp_fast import ops
from ramp_fast.ops import pack_panels

TOKENS, WIDTH, HIDDEN, HEADS, BATCH, RHS = 197, 768, 3072, 12, 8, 2
MASKED, STEPS, SCALARS = 16, 100, 3 * 224 * 224  # images, masking steps, scalars of an image
KS = [(s + 1) * SCALARS // STEPS for s in range(STEPS)]


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
    images = normal(MASKED, 3, 224, 224)
    scores = normal(MASKED, SCALARS)
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
        "mask_steps": (scores, KS, True),
        "masked_copies": (images, ops.mask_steps(scores, KS, True).view_as(images), images[:1] * 0, 0, 4, False),
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


class Masking:
    """All masked copies of 16 images, 100 steps, from scores; each way makes every copy once, keeping a few."""

    def __init__(self) -> None:
        self.scores, _, _ = ARGUMENTS["mask_steps"]
        self.images, _, self.baseline, *_ = ARGUMENTS["masked_copies"]

    def ranges(self, images: int, steps: int) -> Tensor:
        """Batches of so many images and steps, written to the same memory."""
        masked = ops.mask_steps(self.scores, KS, True).view_as(self.images)
        out = torch.empty(steps, images, *self.images.shape[1:])
        for first in range(0, MASKED, images):
            here = slice(first, first + images)
            for step in range(0, STEPS, steps):
                ops.masked_copies(self.images[here], masked[here], self.baseline, step, step + steps, out=out)
        return out[-1, -1]

    def one_image_at_a_time(self) -> Tensor:
        return self.ranges(1, 20)

    def all_images_at_a_time(self) -> Tensor:
        return self.ranges(MASKED, 4)

    def numpy_step_by_step(self) -> Tensor:
        """A copy of the last step's images, the entries of this step set: the loop of Quantus' PixelFlipping."""
        order = np.argsort(-self.scores.numpy(), axis=1)
        x = self.images.numpy().reshape(MASKED, -1)
        for first, last in zip([0, *KS], KS, strict=False):
            x = x.copy()
            np.put_along_axis(x, order[:, first:last], 0.0, 1)
        return torch.from_numpy(x).view_as(self.images)[-1]

    def torch_step_by_step(self) -> Tensor:
        order = self.scores.argsort(dim=1, descending=True)
        x = self.images.flatten(1)
        for first, last in zip([0, *KS], KS, strict=False):
            x = x.clone().scatter_(1, order[:, first:last], 0.0)
        return x.view_as(self.images)[-1]

    def torch_every_step_anew(self) -> Tensor:
        order = self.scores.argsort(dim=1, descending=True)
        for k in KS:
            x = self.images.flatten(1).clone().scatter_(1, order[:, :k], 0.0)
        return x.view_as(self.images)[-1]


@pytest.mark.parametrize("way", [name for name in vars(Masking) if "time" in name or "step" in name])
def test_masking(benchmark: Any, way: str) -> None:
    benchmark.group = "masking"
    last = benchmark.pedantic(getattr(Masking(), way), rounds=5, iterations=1, warmup_rounds=1)
    assert torch.equal(last, torch.zeros_like(last))  # the last step masks everything


@pytest.mark.parametrize("way", ["kernel", "torch.sort", "numpy"])
def test_ranking(benchmark: Any, way: str) -> None:
    """Only the steps of the entries, against sorting all of them."""
    benchmark.group = "ranking"
    scores, ks, descending = ARGUMENTS["mask_steps"]
    call = {
        "kernel": lambda: ops.mask_steps(scores, ks, descending),
        "torch.sort": lambda: scores.sort(dim=1, descending=True, stable=True).indices,
        "numpy": lambda: np.argsort(-scores.numpy(), axis=1),
    }[way]
    assert len(benchmark.pedantic(call, rounds=5, iterations=1, warmup_rounds=1)) == MASKED
