"""How many images go through a plan together on a CPU."""

from __future__ import annotations

import itertools
import math
import time

import torch
from torch import Tensor

from ramp_fast.plan import Plan
from ramp_fast.runtime.run import pull_back, run_forward, run_logits


class Groups:
    """How many images go through a plan together on a CPU: one, or one of :data:`GROUPS` where that is the same and
    faster.

    A group reads the weights once and makes fewer calls, but its activations need more cache and memory, and library
    routines need not treat a row of a larger problem as they treat it alone. So a size is tried on noise, once: it is
    used only if every bit agrees with images one by one and it took less time than what was used before, the better of
    two times each. What is left of a batch goes in smaller groups, or one by one. The trial of a size costs as much as
    five groups, of small images more: it waits until four have been asked for. Float64 images always go one by one.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._pay: dict[tuple[int, bool], dict[int, bool]] = {}

    def sizes(self, plan: Plan, shape: torch.Size, most: int, targets: int, contrast: bool) -> list[int]:
        """Sizes that add up to the batch of images ``shape``.

        ``most``: no group is larger. ``targets`` of each image are explained (0: logits alone).
        """
        batch = shape[0]
        self._asked += batch
        pay = self._pay.setdefault((targets, contrast), {})
        room = min(batch, most)
        # Two are for two images or three. More go by four, and need not spend a trial's memory on two.
        for size in GROUPS if room < 4 else GROUPS[1:]:
            if size not in pay and size <= room and self._asked >= 4 * size:
                others = _divided(size, [s for s in pay if pay[s]])
                pay[size] = _fits(plan, size) and _pays(plan, shape, size, others, targets, contrast)
        return _divided(batch, [size for size in pay if pay[size] and size <= most])


# The largest one makes fewer calls for networks whose steps are short.
GROUPS = (2, 4, 8)
# Bytes of activations that may be kept by a group of more than four.
_MOST_KEPT = 2**28
# A trial compares at least so many values of noise, in at most so many groups: sums in another order are often equal
# to the last bit, so that a few small maps may agree by chance.
_COMPARED, _MOST_DRAWS = 100_000, 8


def _fits(plan: Plan, size: int) -> bool:
    # Float64 products are MKL's, whose order of sums depends on where in memory a sample begins, and with it on the
    # sample's place in the batch. A trial on noise can miss that: the bits that differ may be lost on the way.
    if plan.precision.forward == torch.float64:
        return False
    return size <= 4 or size * sum(plan.kept_bytes(step) for step in plan.steps) <= _MOST_KEPT


def _divided(count: int, sizes: list[int]) -> list[int]:
    """As few of these sizes as add up to ``count``, or single images, the largest first."""
    found: list[int] = []
    for size in sorted({1, *sizes}, reverse=True):
        found += [size] * (count // size)
        count %= size
    return found


def _pays(plan: Plan, shape: torch.Size, group: int, others: list[int], targets: int, contrast: bool) -> bool:
    """Whether a group is faster than these sizes one after another, which add up to it, and as single images are."""
    generator = torch.Generator().manual_seed(0)
    draws = min(max(1, _COMPARED // (group * math.prod(shape[1:]))), _MOST_DRAWS)
    count = draws * group
    images = torch.randn((count, *shape[1:]), generator=generator, dtype=plan.precision.forward, device="cpu")
    classes = plan.graph.output.example[1]
    size, wide = (targets, count, classes), plan.precision.accumulate
    positive = torch.rand(size, generator=generator, dtype=wide, device="cpu")
    negative = torch.rand(size, generator=generator, dtype=wide, device="cpu") if contrast else None
    c = plan.rule.conservation.start(
        plan.rule.start, positive, negative, torch.ones(count, classes, dtype=wide, device="cpu")
    )

    def part(first: int, last: int) -> tuple[Tensor, ...]:
        """Maps, of targets, and logits, each with the images first."""
        some = images[first:last].clone()
        if not targets:
            return (run_logits(plan, some),)
        forward = run_forward(plan, some)
        logits = forward.logits
        return pull_back(plan, forward, c[:, first:last], contrast).transpose(0, 1), logits

    def parts(start: int) -> list[tuple[Tensor, ...]]:
        """The same of the other sizes, from an image on."""
        ends = list(itertools.accumulate(others, initial=start))
        return [part(first, last) for first, last in itertools.pairwise(ends)]

    def same(whole: tuple[Tensor, ...], several: list[tuple[Tensor, ...]]) -> bool:
        return all(
            torch.equal(torch.cat(each), own) for each, own in zip(zip(*several, strict=True), whole, strict=True)
        )

    part(0, group)  # packs weights for this size where a routine needs it
    together, apart = math.inf, math.inf
    for _ in range(2):
        start = time.perf_counter()
        whole = part(0, group)
        middle = time.perf_counter()
        several = parts(0)
        together, apart = min(together, middle - start), min(apart, time.perf_counter() - middle)
    if together >= apart or not same(whole, several):
        return False
    # Smaller groups have been compared with single images.
    return all(same(part(first, first + group), parts(first)) for first in range(group, count, group))
