"""How many images go through a plan together on a CPU."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ramp_fast.plan import Plan
from ramp_fast.runtime.run import pull_back, run_forward, run_logits


class Groups:
    """How many images go through a plan together on a CPU: one, or :data:`GROUP` where that is the same and faster.

    A group reads the weights once and makes fewer calls, but its activations need more cache, and library routines
    need not treat a row of a larger problem as they treat it alone. So both are run on noise, once: groups are used
    only if every bit agrees and they took less time, the better of two times each. What is left of a batch goes one
    by one. The trial costs as much as ``5 * GROUP`` images: it waits until ``4 * GROUP`` have been asked for.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._pay: dict[tuple[int, bool], bool] = {}

    def sizes(self, plan: Plan, shape: torch.Size, targets: int, contrast: bool) -> list[int]:
        """Sizes that add up to the batch of images ``shape``, of which ``targets`` are explained (0: logits alone)."""
        batch = shape[0]
        self._asked += batch
        key = targets, contrast
        if batch >= GROUP and self._asked >= 4 * GROUP and key not in self._pay:
            self._pay[key] = _groups_pay(plan, shape, targets, contrast)
        groups = batch // GROUP if self._pay.get(key, False) else 0
        return [GROUP] * groups + [1] * (batch - groups * GROUP)


GROUP = 4


def _groups_pay(plan: Plan, shape: torch.Size, targets: int, contrast: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((GROUP, *shape[1:]), generator=generator, dtype=plan.precision.forward)
    classes = plan.graph.output.example[1]
    size, wide = (targets, GROUP, classes), plan.precision.accumulate
    positive = torch.rand(size, generator=generator, dtype=wide)
    negative = torch.rand(size, generator=generator, dtype=wide) if contrast else None
    c = plan.rule.conservation.start(plan.rule.start, positive, negative, torch.ones(GROUP, classes, dtype=wide))

    def part(first: int, last: int) -> tuple[Tensor, ...]:
        """Maps, of targets, and logits, each with the images first."""
        some = images[first:last].clone()
        if not targets:
            return (run_logits(plan, some),)
        forward = run_forward(plan, some)
        logits = forward.logits
        return pull_back(plan, forward, c[:, first:last], contrast).transpose(0, 1), logits

    part(0, GROUP)  # packs weights for this size where a routine needs it
    together, alone = math.inf, math.inf
    for _ in range(2):
        start = time.perf_counter()
        group = part(0, GROUP)
        middle = time.perf_counter()
        single = [part(i, i + 1) for i in range(GROUP)]
        together, alone = min(together, middle - start), min(alone, time.perf_counter() - middle)
    same = all(
        torch.equal(torch.cat(ones), whole) for ones, whole in zip(zip(*single, strict=True), group, strict=True)
    )
    return together < alone and same
