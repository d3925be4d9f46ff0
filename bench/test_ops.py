"""What do the fused operators cost? Each group holds the kernel, the equation in plain torch, and a plain copy.

Run: ``pytest bench/test_ops.py --benchmark-group-by=group``. Sizes are those of ViT-B/16 at batch 8 with contrast
(max-pooling: of VGG's first). The ``GB/s`` column (in ``extra_info``) counts every operand and result once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from operands import Sizes, count_bytes, operands, tensors
from torch import Tensor

from ramp_fast import ops
from ramp_fast.runtime.heap import keep_freed_memory

keep_freed_memory()  # as an engine does: results would be fresh pages, cleared one by one, each time
SIZES = Sizes()
MASKED, STEPS, KS = SIZES.masked, SIZES.steps, SIZES.ks
ARGUMENTS = {name: draw() for name, draw in operands(SIZES).items()}


# Compared with a copy of as many bytes.
COPIED = ["junction", "merge_junction", "residual_pullback", "norm_pullback", "scale_by"]


def _measure(benchmark: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    result = benchmark.pedantic(function, args=args, rounds=15, iterations=1, warmup_rounds=3)
    benchmark.extra_info["GB/s"] = round(count_bytes(args, result) / benchmark.stats.stats.median / 1e9, 2)
    return result


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_operator(benchmark: Any, name: str, backend: str) -> None:
    if ops.unavailable(backend):
        pytest.skip(ops.unavailable(backend))
    benchmark.group = name
    args = ARGUMENTS[name]
    ops.set_backend("reference")
    expected = tensors(getattr(ops, name)(*args))
    ops.set_backend(backend)
    try:
        actual = tensors(_measure(benchmark, getattr(ops, name), args))
    finally:
        ops.set_backend(None)
    for e, a in zip(expected, actual, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm()
        assert error < 1e-3, f"relative error {error:.2g}"


@pytest.mark.parametrize("name", COPIED)
def test_copy(benchmark: Any, name: str) -> None:
    """A plain copy that moves as many bytes as the operator, in turns with it: ``of_a_copy`` is the bandwidth reached.

    The median of so many turns of both. A turn is long enough for the caches to know the operands, and its first half
    does not count; results are dropped before the next call, since the copy writes to the same memory, too.
    """
    benchmark.group = name
    args, turns, calls = ARGUMENTS[name], 9, 60
    operator = getattr(ops, name)
    source = torch.ones(count_bytes(args, operator(*args)) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)

    def turn(function: Callable[..., Any], *operands: Any) -> float:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            function(*operands)
            times.append(time.perf_counter() - start)
        return statistics.median(times[calls // 2 :])

    reached = []

    def both() -> None:
        ours = turn(operator, *args)
        reached.append(turn(target.copy_, source) / ours)

    benchmark.pedantic(both, rounds=turns, iterations=1, warmup_rounds=1)
    found = sorted(reached[1:])
    benchmark.extra_info.update(of_a_copy=statistics.median(found), least=found[0], most=found[-1])
    print(f"\n{name}: {statistics.median(found):.2f} of a copy's bytes/s ({found[0]:.2f} to {found[-1]:.2f})")
    assert torch.equal(target, source)


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
    assert not any(t.isnan().any() for t in tensors(result))


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

    def in_turn_eight_images_at_a_time(self) -> Tensor:
        masked = ops.mask_steps(self.scores, KS, True).view_as(self.images)
        for first in range(0, MASKED, 8):
            here = slice(first, first + 8)
            for copies in ops.copies_in_turn(self.images[here], masked[here], self.baseline, STEPS, 1):
                last = copies[-1, -1]
        return last

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
