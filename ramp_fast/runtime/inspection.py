"""What is read of a pull-back on its way: relevance of inner layers, restricted to some of it, and where it stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast.capture.observe import names_by_node
from ramp_fast.graph import Node
from ramp_fast.plan import Plan, Step
from ramp_fast.rules.base import Flow, Values


@dataclass
class Inspection:
    """What is asked of one pull-back besides its maps, and what was found.

    Attributes
    ----------
    plan : Plan
    images : Tensor
        ``[B, C, H, W]``.
    targets : int
        Maps of every sample.
    layers : sequence of str
        Modules whose relevance is asked for.
    masks : mapping of str to Tensor
        What is kept of a module's relevance: ``[K, *shape]``, in the shape of one sample; one for all maps, or each.
    balanced : bool
        Whether to note how much relevance arrives at every step and how much leaves it. The values of all nodes are
        needed then.
    """

    plan: Plan
    images: Tensor
    targets: int
    layers: Sequence[str] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    balanced: bool = False

    def __post_init__(self) -> None:
        self.batch = self.images.shape[0]
        self._names = names_by_node(self.plan.graph)
        self._relevance: dict[Node, Tensor] = {}
        self._totals: dict[Node, list[Tensor]] = {}

    def arrived(self, step: Step, parts: list[Any], values: Values, conservation: Any) -> list[Any]:
        """Note what has arrived at a step, and return what goes on."""
        node, operation = step.node, step.operation
        names = self._names.get(node, ())
        balanced = self.balanced and _balances(step)
        if not (names or balanced):
            return parts
        assert operation is not None
        part = operation.merged(parts, values, conservation)
        for name in names:
            if name in self.masks:
                part = conservation.restricted(
                    values[node], part, self._spread(self.masks[name], part.c, node), node.batch
                )
        if any(name in self.layers for name in names):
            self._relevance[node] = self._of_samples(node, part, values, conservation)
        if balanced:
            self._totals[node] = [self._total(node, part, values, conservation)]
        return [part]

    def left(self, step: Step, flows: Sequence[Flow], values: Values, conservation: Any) -> None:
        """Note what has left a step."""
        if self.balanced and step.node in self._totals:
            zero = torch.zeros_like(self._totals[step.node][0])
            left = sum((self._total(f.node, f.contribution, values, conservation) for f in flows), zero)
            self._totals[step.node].append(left)

    def results(self) -> list[Tensor]:
        """Relevance of every layer ``[targets, B, *shape]``; where balanced, totals ``[targets, B, steps, 2]`` last."""
        found = [self._relevance_of(self.plan.graph.observed[name]) for name in self.layers]
        if self.balanced:
            some = next(iter(self._totals.values()))[0]
            none = [torch.zeros_like(some)] * 2
            steps = [self._totals.get(s.node, none) for s in Balance.steps(self.plan)]
            found.append(torch.stack([torch.stack(pair, -1) for pair in steps], -2))
        return found

    def _relevance_of(self, node: Node) -> Tensor:
        if node in self._relevance:
            found: Tensor = self.plan.rule.conservation.maps_of(self._relevance[node], self.targets)
            return found
        # None has arrived.
        size = self.targets, self.batch, *shape_of_sample(self.plan, node)
        return torch.zeros(size, dtype=self.plan.precision.accumulate, device=self.images.device)

    def _of_samples(self, node: Node, part: Any, values: Values, conservation: Any) -> Tensor:
        wide, rule = self.plan.precision.accumulate, self.plan.rule
        relevance = conservation.within(values[node], part, node.batch, wide, rule.relevance)
        return node.batch.samples_first(relevance, self.batch)

    def _total(self, node: Node, part: Any, values: Values, conservation: Any) -> Tensor:
        return self._of_samples(node, part, values, conservation).flatten(2).sum(-1, dtype=torch.float64)

    def _spread(self, mask: Tensor, c: Tensor, node: Node) -> Tensor:
        """Masks ``[K, *shape]`` in the layout of the coefficients of ``node``, whose maps they are for in turn."""
        mask = mask.to(c.device).repeat(c.shape[0] // len(mask), *[1] * (mask.dim() - 1))
        return node.batch.samples_back(mask.unsqueeze(1).expand(-1, self.batch, *mask.shape[1:]))


def _balances(step: Step) -> bool:
    """Whether totals before and after a step are compared: not where tensors are taken apart and put together."""
    apart = step.node.kind in (g.SPLIT, g.SPLIT_OUTPUT)
    return step.carries and step.operation is not None and not apart


@dataclass(frozen=True)
class Balance:
    """How much relevance every operation has handed on; the rest stays in biases, stabilizers and constants.

    Attributes
    ----------
    operations : list of (str, str)
        Module and kind of every operation, from the logits down.
    arrived, left : Tensor
        Sums of the relevance of an operation's output and of its inputs, ``[B, operations]`` (``[B, K, operations]``
        for K targets), float64.
    """

    operations: list[tuple[str, str]]
    arrived: Tensor
    left: Tensor

    @staticmethod
    def steps(plan: Plan) -> list[Step]:
        """The steps that are compared, from the logits down."""
        return [step for step in reversed(plan.steps) if _balances(step)]

    @classmethod
    def of(cls, plan: Plan, totals: Tensor) -> Balance:
        """Of totals ``[..., operations, 2]`` as :meth:`Inspection.results` has them."""
        operations = [(step.node.module or "(model)", step.node.kind) for step in cls.steps(plan)]
        return cls(operations, totals[..., 0], totals[..., 1])

    @property
    def kept(self) -> Tensor:
        """What stayed in every operation, ``[..., operations]``."""
        return self.arrived - self.left

    def __str__(self) -> str:
        """A table of the means over images: what arrived at every module, what left it, and what stayed there."""
        rows = [("module", "operation", "arrived", "left", "stayed")]
        count = len(self.operations)
        arrived, left = (t.reshape(-1, count).mean(0).tolist() for t in (self.arrived, self.left))
        for (module, kind), before, after in zip(self.operations, arrived, left, strict=True):
            rows.append((module, kind, f"{before:.6g}", f"{after:.6g}", f"{before - after:.3g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def shape_of_sample(plan: Plan, node: Node) -> tuple[int, ...]:
    """Shape of one sample of a node's value, as :meth:`BatchAxis.samples_first` has it."""
    like = torch.empty(node.example, device="meta")
    return tuple(node.batch.samples_first(like, plan.graph.input.example[0], 0).shape[1:])
