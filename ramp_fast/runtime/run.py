"""Runtime: runs a plan on a batch, forward and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ramp_fast.graph import Node
from ramp_fast.plan import Plan
from ramp_fast.rules.base import Flow, Values
from ramp_fast.rules.masses import Bookkeeping, Contribution, total, unit_mass
from ramp_fast.rules.rearrange import Parts

# From the logits [B, classes] to coefficients at the logits [T, B, classes] and whether they are a contrast.
Seed = Callable[[Tensor], tuple[Tensor, bool]]


def run(plan: Plan, images: Tensor, seed: Seed) -> tuple[Tensor, Tensor]:
    """Forward pass and pull-back of one micro-batch.

    Parameters
    ----------
    plan : Plan
        Prepared.
    images : Tensor
        ``[B, C, H, W]`` in the plan's forward dtype, on the weights' device.
    seed : callable
        Called once with the logits.

    Returns
    -------
    relevance : Tensor
        ``[T, B, C, H, W]``; P and N of every pair have mass 1 (or 0 where there is none), with contrast the
        second half is their difference.
    logits : Tensor
        ``[B, classes]``.
    """
    kept: dict[Node, Any] = {}
    values = _forward(plan, images, kept)
    wide = values[plan.graph.output].to(plan.precision.accumulate)
    c, contrast = seed(wide)
    book = Bookkeeping(images.shape[0], c.shape[0], contrast)
    heap_grows = plan.heap.grows(images.device, book.batch * book.sides)
    target = c.new_ones(c.shape[:2])
    pending: dict[Node, list[Contribution]] = {plan.graph.output: [Contribution(c, target, None)]}
    pieces: dict[Node, dict[int, Contribution]] = {}

    for step in reversed(plan.steps):
        node, operation = step.node, step.operation
        if operation is not None and step.carries:
            if isinstance(operation, Parts):
                flows = [_joined(operation, pieces.pop(node, {}), kept.pop(node))]
            else:
                parts = pending.pop(node, [])
                saved = kept.pop(node)
                flows = list(operation.pullback(parts, values, saved, book)) if parts else []
            for flow in flows:
                if flow is None:
                    continue
                contribution = plan.rule.leave(node, flow.contribution)
                if flow.part is None:
                    pending.setdefault(flow.node, []).append(contribution)
                else:
                    pieces.setdefault(flow.node, {})[flow.part] = contribution
            del flows
        if heap_grows:
            plan.heap.hold()
        for done in step.drop_pullback:
            values.drop(done)

    source = plan.graph.input
    arrived = pending.get(source)
    if not arrived:
        return torch.zeros(c.shape[0], *images.shape, dtype=plan.precision.accumulate, device=c.device), wide
    final = book.merge(images, arrived, source.batch)
    wide_c = final.c.to(plan.precision.accumulate)
    one = Contribution(wide_c, unit_mass(final.target))
    return plan.rule.finish(book.exact(images, one, source.batch).c, images.to(wide_c.dtype)), wide


def forward(plan: Plan, images: Tensor) -> Tensor:
    """The logits of :func:`run`, ``[B, classes]``, to the last bit; nothing is kept for a pull-back."""
    logits: Tensor = _forward(plan, images, None)[plan.graph.output]
    return logits.to(plan.precision.accumulate)


def _forward(plan: Plan, images: Tensor, kept: dict[Node, Any] | None) -> Values:
    """Values of the nodes; with ``kept`` those that the pull-back needs, and in it what operations keep besides."""
    values = Values(plan.constants)
    values[plan.graph.input] = images
    for step in plan.steps:
        node = step.node
        if step.operation is None:
            constant = values.call(node)
            floating = isinstance(constant, Tensor) and constant.is_floating_point()
            values[node] = constant.to(plan.precision.forward) if floating else constant
        else:
            values[node], saved = step.operation.forward(values)
            if step.carries and kept is not None:
                kept[node] = saved
            del saved
        for done in step.drop_read if kept is None else step.drop_forward:
            values.drop(done)
    return values


def _joined(operation: Parts, parts: dict[int, Contribution], kept: Any) -> Flow | None:
    if not parts:
        return None
    c = operation.join({i: p.c for i, p in parts.items()}, kept)
    target = total(p.target for p in parts.values())
    return Flow(operation.node.operands[0], Contribution(c, target, target))
