"""Plan: a graph under a rule becomes a list of steps with their kernels, and knows how long values live."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ramp_fast import graph as g
from ramp_fast.errors import UnsupportedModelError
from ramp_fast.gemm import Precision
from ramp_fast.graph import Graph, Node
from ramp_fast.rules.base import Fusion, Operation
from ramp_fast.rules.rule import Rule


@dataclass
class Step:
    """One operation of the plan.

    Attributes
    ----------
    node : Node
    operation : Operation or None
        None for sizes and constants that are computed anew in every run.
    carries : bool
        Whether relevance flows through it.
    drop_forward, drop_pullback : list of Node
        Values that nobody needs after this step of the forward pass, of the pull-back.
    drop_read : list of Node
        Values that no later step of the forward pass reads: what to drop where no pull-back follows.
    """

    node: Node
    operation: Operation | None
    carries: bool = False
    drop_forward: list[Node] = field(default_factory=list)
    drop_pullback: list[Node] = field(default_factory=list)
    drop_read: list[Node] = field(default_factory=list)


class Plan:
    """Steps in execution order, with constants and packed weights once :meth:`prepare` has run.

    ``print(plan)`` shows the operations, module names, shapes, kernels, and the bytes each step keeps for the
    pull-back of one image.
    """

    def __init__(self, graph: Graph, rule: Rule, precision: Precision) -> None:
        rule = rule.for_graph(graph)
        self.graph, self.rule, self.precision = graph, rule, precision
        self.constants: dict[Node, Any] = {}
        users = graph.users()
        carries = graph.carriers()
        fusions = rule.fuse(graph, precision)
        self._static = _static_constants(graph)
        self.steps: list[Step] = []
        refused: list[tuple[Node, UnsupportedModelError]] = []
        for node in graph.nodes:
            if node.kind in (g.INPUT, g.PARAM) or node in self._static:
                continue
            if node.constant:
                self.steps.append(Step(node, None))
                continue
            try:
                operation = rule.operation(node, precision, fusions.get(node, Fusion()))
            except UnsupportedModelError as error:
                refused.append((node, error))
                continue
            self.steps.append(Step(node, operation, node in carries))
        _refuse(refused)
        self.fan_out = {n for n in carries if sum(u.sources.count(n) for u in users[n] if u in carries) > 1}
        self.observed = set(graph.observed.values())
        self._schedule()

    def _schedule(self) -> None:
        """Fill in where values are dropped."""
        last_use: dict[Node, int] = {}
        for i, step in enumerate(self.steps):
            for ref in step.node.references():
                last_use[ref] = i
        last_need: dict[Node, int] = {}
        for i, step in enumerate(self.steps):
            if not step.carries or step.operation is None:
                continue
            read = step.node in self.fan_out or step.node in self.observed
            needed = [*step.operation.needs(), *([step.node] if read else [])]
            for node in needed:
                last_need.setdefault(node, i)  # the pull-back runs from the last step to the first
        self.needed = set(last_need)
        ends = {self.graph.output, self.graph.input}
        for node, i in last_use.items():
            if node in ends or node.constant:
                continue
            self.steps[i].drop_read.append(node)
            if node not in self.needed:
                self.steps[i].drop_forward.append(node)
        for node, i in last_need.items():
            if not (node.constant or node is self.graph.input):
                self.steps[i].drop_pullback.append(node)

    def prepare(self) -> None:
        """Evaluate constants in the plan's precision and pack weights."""
        forward = self.precision.forward
        wide: dict[Node, Any] = {}
        values: dict[Node, Any] = {}
        with torch.inference_mode(False), torch.no_grad():
            for node in self.graph.nodes:
                if node.kind == g.PARAM:
                    value = node.params.tensor.detach()
                    if value.is_inference():
                        value = value.clone()  # autograd, which pulls back through small functions, could not keep it
                elif node in self._static:
                    args = g.map_nodes(wide.__getitem__, node.args)
                    value = node.target(*args, **g.map_nodes(wide.__getitem__, node.kwargs))
                else:
                    continue
                # Constants come from each other in float32 at least: its lowest number, a mask, is none of bfloat16's.
                least = torch.promote_types(forward, torch.float32)
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    least = torch.promote_types(value.dtype, least)
                wide[node] = _cast(value, least)
                values[node] = _cast(wide[node], forward)
            for step in self.steps:
                if step.operation is not None:
                    step.operation.prepare(values)
        # Weights that were packed are not needed a second time.
        used = {r for s in self.steps if s.operation is None or not s.operation.packs for r in s.node.references()}
        self.constants = {n: v for n, v in values.items() if n in used}

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""
        return sum(s.operation.weight_bytes for s in self.steps if s.operation is not None)

    def kept_bytes(self, step: Step) -> int:
        """Bytes per image that ``step`` is the first to keep for the pull-back."""
        if step.operation is None:
            return 0
        size = self.precision.forward.itemsize
        alias = step.operation.fusion.fused_into is not None
        stored = step.node in self.needed and _owns_memory(step.node) and not alias
        total = _count(step.node.example) * size if stored else 0
        if step.carries:
            total += sum(_count(shape) * dtype.itemsize for shape, dtype in step.operation.keeps())
        return total // max(_batch(self.graph), 1)

    def __str__(self) -> str:
        header = ("operation", "module", "shape", "forward", "pull-back", "kept/image")
        rows = [header]
        for step in self.steps:
            if step.operation is None:
                continue
            rows.append(
                (
                    step.node.kind,
                    step.node.module or "(model)",
                    "x".join(str(s) for s in step.node.shape),
                    step.operation.forward_kernel,
                    step.operation.pullback_kernel if step.carries else "-",
                    _human(self.kept_bytes(step)),
                )
            )
        widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        kept = sum(self.kept_bytes(s) for s in self.steps)
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(
            f"rule {self.rule}, precision {self.precision.name}: {len(rows) - 1} steps, "
            f"{_human(kept)} kept per image, {_human(self.weight_bytes)} of packed weights"
        )
        return "\n".join(lines)


def _refuse(refused: list[tuple[Node, UnsupportedModelError]]) -> None:
    """Raise one error for all operations that a rule has no pull-back for."""
    if not refused:
        return
    modules: dict[str, list[str]] = {}
    for node, error in refused:
        modules.setdefault(str(error), []).append(node.module or "(model)")
    lines = [f"{message} ({', '.join(dict.fromkeys(names))})" for message, names in modules.items()]
    operations = [(node.kind, node.module) for node, _ in refused]
    raise UnsupportedModelError("; ".join(lines), operations)


def _static_constants(graph: Graph) -> set[Node]:
    """Constants that depend on weights only, not on the batch size."""
    static: set[Node] = set()
    for node in graph.nodes:
        if node.kind == g.CONST and all(r.kind == g.PARAM or r in static for r in node.references()):
            static.add(node)
    return static


def _owns_memory(node: Node) -> bool:
    """Whether the value is not a view of another one that is counted already."""
    return node.kind not in (g.SPLIT_OUTPUT, g.REARRANGE, g.SELECT_TOKENS, g.INPUT) or getattr(
        node.params, "how", None
    ) in (
        "cat",
        "stack",
        "vjp",
    )


def _batch(graph: Graph) -> int:
    return graph.input.example[0]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for s in shape:
        total *= s
    return total


def _human(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A constant in another floating dtype; what is too large for it becomes the largest number there is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    if value.dtype != dtype and torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        largest = torch.finfo(dtype).max
        value = torch.where(value.isinf(), value, value.clamp(-largest, largest))
    return value.to(dtype)
