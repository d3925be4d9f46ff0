"""Runs a plan on a batch: the forward pass, and the pull-back of relevance through it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramp_fast.graph import Node
from ramp_fast.plan import Plan
from ramp_fast.rules.base import Flow, Values
from ramp_fast.rules.rearrange import Split
from ramp_fast.runtime.heap import HeapPin
from ramp_fast.runtime.inspection import Inspection


@dataclass
class Forward:
    """What a forward pass leaves for the pull-back.

    Attributes
    ----------
    images : Tensor
    logits : Tensor
        ``[B, classes]``, in the plan's dtype for masses and scalings.
    values : Values
        Of the nodes that pull-backs read; they are dropped on the way back.
    kept : dict of Node to object
        What operations keep besides.
    """

    images: Tensor
    logits: Tensor
    values: Values
    kept: dict[Node, Any]


def run_forward(plan: Plan, images: Tensor, *, keep_all: bool = False) -> Forward:
    """The forward pass of one micro-batch, for :func:`pull_back`.

    Parameters
    ----------
    plan : Plan
        Prepared.
    images : Tensor
        ``[B, C, H, W]`` in the plan's forward dtype, on the weights' device.
    keep_all : bool
        Keep the values of all nodes.
    """
    kept: dict[Node, Any] = {}
    values = _forward(plan, images, kept, keep_all)
    return Forward(images, values[plan.graph.output].to(plan.precision.accumulate), values, kept)


# One for every plan that has run, and as long as it lives.
_PINS: weakref.WeakKeyDictionary[Plan, HeapPin] = weakref.WeakKeyDictionary()


def pull_back(plan: Plan, forward: Forward, c: Tensor, contrast: bool, inspection: Inspection | None = None) -> Tensor:
    """Relevance of the images, ``[maps, B, C, H, W]``; ``forward`` is used up.

    Parameters
    ----------
    plan : Plan
    forward : Forward
        Of :func:`run_forward`.
    c : Tensor
        Coefficients at the logits, ``[maps, B, classes]``, as the rule's conservation starts.
    contrast : bool
        Whether they are a contrast.
    inspection : Inspection, optional
        What to read on the way. A balanced one needs the values of all nodes.

    Returns
    -------
    Tensor
        As the rule's conservation scales it: of absLRP every P and N has mass 1 (or 0 where there is none), or, under
        a condition, the mass that is left.
    """
    images, values, kept, rule = forward.images, forward.values, forward.kept, plan.rule
    conservation = rule.conservation(images.shape[0], c.shape[0], contrast)
    pin = _PINS.setdefault(plan, HeapPin())
    heap_grows = pin.may_grow(images.device, images.shape[0] * c.shape[0])
    pending: dict[Node, list[Any]] = {plan.graph.output: [conservation.begin(c)]}
    pieces: dict[Node, dict[int, Any]] = {}

    for step in reversed(plan.steps):
        node, operation = step.node, step.operation
        if operation is not None and step.carries:
            if isinstance(operation, Split):
                parts, flows = pieces.pop(node, {}), []
                saved = kept.pop(node)
                if parts:
                    parts = dict(zip(parts, conservation.aligned(list(parts.values())), strict=True))
                    joined = operation.join(parts, saved, conservation)
                    flows.append(Flow(node.operands[0], conservation.together(joined, parts.values())))
            else:
                arrived = pending.pop(node, [])
                saved = kept.pop(node)
                if inspection is not None and arrived:
                    arrived = inspection.arrived(step, arrived, values, conservation)
                flows = list(operation.pullback(arrived, values, saved, conservation)) if arrived else []
                if inspection is not None:
                    inspection.left(step, flows, values, conservation)
            for flow in flows:
                contribution = rule.leave(operation, flow, values, conservation)
                if flow.part is None:
                    pending.setdefault(flow.node, []).append(contribution)
                else:
                    pieces.setdefault(flow.node, {})[flow.part] = contribution
            del flows
        if heap_grows:
            pin.pin()
        for done in step.drop_pullback if inspection is None or not inspection.balanced else ():
            values.drop(done)

    source, wide = plan.graph.input, plan.precision.accumulate
    last = pending.get(source)
    if not last:
        return torch.zeros(c.shape[0], *images.shape, dtype=wide, device=c.device)
    final = conservation.merge(images, last, source.batch)
    if inspection is not None and inspection.masks:  # relevance that was left out is missing in the end
        return conservation.within(images, final, source.batch, wide, rule.relevance)
    return conservation.finish(images, final, source.batch, wide, rule.relevance)


def run_logits(plan: Plan, images: Tensor) -> Tensor:
    """The logits of :func:`run_forward`, ``[B, classes]``, to the last bit; nothing is kept for a pull-back."""
    logits: Tensor = _forward(plan, images, None, False)[plan.graph.output]
    return logits.to(plan.precision.accumulate)


def _forward(plan: Plan, images: Tensor, kept: dict[Node, Any] | None, keep_all: bool) -> Values:
    """Values of the nodes; with ``kept`` those that the pull-back needs, and in it what operations keep besides.

    ``keep_all``: of all nodes.
    """
    values = Values(plan.constants, pulled_back=kept is not None)
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
        if not keep_all:
            for done in step.drop_read if kept is None else step.drop_forward:
                values.drop(done)
    return values
