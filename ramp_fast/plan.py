"""Plan: a graph under a rule becomes a list of steps with their kernels, and knows how long values live."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ramp_fast import graph as g
from ramp_fast.gemm import Geometry, Precision, fuses_convolutions
from ramp_fast.graph import Graph, Node
from ramp_fast.rules.abslrp import AbsLRP
from ramp_fast.rules.base import Facts, Operation
from ramp_fast.rules.junctions import plain_sum
from ramp_fast.runtime.heap import HeldHeap


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

    def __init__(self, graph: Graph, rule: AbsLRP, precision: Precision) -> None:
        self.graph, self.rule, self.precision = graph, rule, precision
        self.constants: dict[Node, Any] = {}
        self.heap = HeldHeap()
        users = graph.users()
        carries = _carrying(graph)
        self._static = _static_constants(graph)
        self.steps: list[Step] = []
        residual = any(n.kind == g.ADD and len(n.sources) == 2 for n in graph.nodes)
        self._convolutions = self._fused_convolutions(users)
        for node in graph.nodes:
            if node.kind in (g.INPUT, g.PARAM) or node in self._static:
                continue
            if node.constant:
                self.steps.append(Step(node, None))
                continue
            facts = self._facts(node, users, carries, residual)
            self.steps.append(Step(node, rule.operation(node, facts), node in carries))
        self.fan_out = {n for n in carries if sum(u.sources.count(n) for u in users[n] if u in carries) > 1}
        self._schedule()

    def _facts(self, node: Node, users: dict[Node, list[Node]], carries: set[Node], residual: bool) -> Facts:
        facts = Facts(self.precision)
        if node.kind in g.WEIGHTED:
            facts.positive_input = self._positive(node.operands[0], users)
            facts.norm = self._norm_below(node, users)
            if node in self._convolutions:
                facts.batch_norm, total = self._convolutions[node]
                last = total or facts.batch_norm
                facts.relu = next((u for u in users[last] if self._absorbed(u, users)), None)
                if total is not None:
                    facts.addend = next(n for n in total.operands if n is not facts.batch_norm)
        elif node.kind == g.LAYER_NORM:
            facts.above = any(u in carries and self._norm_below(u, users) is node for u in users[node])
        elif node.kind in (g.ADD, g.BATCH_NORM):
            facts.relu = next((u for u in users[node] if self._absorbed(u, users)), None)
            if len(node.sources) == 2:
                # The branch is what only this sum reads; the shortcut has other readers as well.
                single = [n for n in node.operands if len(users[n]) == 1]
                facts.branch = single[0] if len(single) == 1 else node.operands[1]
            for conv, (norm, total) in self._convolutions.items():
                if node in (norm, total):
                    facts.computed_in, facts.above = conv, node is norm and total is not None
        elif node.kind == g.ACTIVATION:
            facts.absorbed = self._absorbed(node, users)
        elif node.kind in (g.MAX_POOL, g.EXTREME):
            form = self.rule.maxpool
            facts.divided = residual if form == "auto" else form == "divided"
        return facts

    def _norm_below(self, linear: Node, users: dict[Node, list[Node]]) -> Node | None:
        """The LayerNorm whose pull-back the step of ``linear`` does as well."""
        norm = linear.operands[0] if linear.kind == g.LINEAR else None
        fuses = (
            norm is not None
            and norm.kind == g.LAYER_NORM
            and norm.params["dims"] == 1
            and len(users[norm]) == 1
            and norm.batch.leading
            and norm.batch.inner == 1
            and not self._positive(norm, users)
        )
        return norm if fuses else None

    def _fused_convolutions(self, users: dict[Node, list[Node]]) -> dict[Node, tuple[Node, Node | None]]:
        """Convolutions whose step computes the BatchNorm behind them as well, and with some the residual sum.

        Then only the result is kept, and the pull-backs tell from it what they need. From a sum with its ReLU a
        BatchNorm is found as the difference to the other operand, wherever relevance arrives.
        """
        found: dict[Node, tuple[Node, Node | None]] = {}
        position = {node: i for i, node in enumerate(self.graph.nodes)}
        for norm in self.graph.nodes:
            if norm.kind != g.BATCH_NORM or norm.constant:
                continue
            conv = norm.operands[0]
            if conv.kind != g.CONV or users[conv] != [norm] or not self._fuses(conv):
                continue
            readers = users[norm]
            if any(self._absorbed(u, users) and u.params["cap"] < math.inf for u in readers):
                continue  # from a value that was cut nothing is told
            found[conv] = norm, None
            total = readers[0] if len(readers) == 1 else norm
            if total.kind != g.ADD or not plain_sum(total) or total.operands[0] is total.operands[1]:
                continue
            other = next(n for n in total.operands if n is not norm)
            relu = next((u for u in users[total] if self._absorbed(u, users)), None)
            there = position[other] < position[conv]
            if there and relu is not None and relu.params["cap"] == math.inf:
                found[conv] = norm, total
        return found

    def _fuses(self, conv: Node) -> bool:
        weight = conv.params["weight"]
        if weight.kind != g.PARAM or len(weight.example) != 4 or not conv.batch.leading:
            return False
        tensor = weight.params["tensor"]
        tiles = Geometry.of(conv.params).tiles(tensor, *conv.operands[0].example[2:])
        return not tiles and fuses_convolutions(self.precision, tensor.device)

    def _absorbed(self, node: Node, users: dict[Node, list[Node]]) -> bool:
        """Whether ``node`` is a ReLU that the step below computes in its own pass: a BatchNorm, or a residual sum.

        With equal shares a ReLU sets masses, which a sum cannot do for every reader of the ReLU.
        """
        if node.kind != g.ACTIVATION or node.params["how"] != "relu":
            return False
        source = node.operands[0]
        if users[source] != [node]:
            return False
        return source.kind == g.BATCH_NORM or (
            source.kind == g.ADD and plain_sum(source) and self.rule.shares == "kept"
        )

    def _positive(self, node: Node, users: dict[Node, list[Node]]) -> bool:
        """Whether relevance reaches only positive entries of ``node``: by value, or by a gate right below."""
        if _never_negative(node):
            return True
        while len(users[node]) == 1:
            if self.rule.gated_output(node):
                return True
            if node.kind != g.MOVE or len(node.sources) != 1 or node.params["how"] in ("expand", "vjp"):
                return False
            node = node.operands[0]
        return False

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
            needed = [*step.operation.needs(), *([step.node] if step.node in self.fan_out else [])]
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
                    value = node.params["tensor"].detach()
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
        used = {r for s in self.steps if s.node.kind not in g.WEIGHTED for r in s.node.references()}
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
        facts = step.operation.facts
        alias = facts.absorbed or facts.computed_in is not None
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


def _carrying(graph: Graph) -> set[Node]:
    """Nodes that relevance flows through: operands, from the logits down (statistics are detached)."""
    found = {graph.output}
    stack = [graph.output]
    while stack:
        for source in stack.pop().sources:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _static_constants(graph: Graph) -> set[Node]:
    """Constants that depend on weights only, not on the batch size."""
    static: set[Node] = set()
    for node in graph.nodes:
        if node.kind == g.CONST and all(r.kind == g.PARAM or r in static for r in node.references()):
            static.add(node)
    return static


_NEVER_NEGATIVE = frozenset({"relu", "sigmoid", "hardsigmoid", "abs", "square", "exp", "softplus", "sqrt", "rsqrt"})


def _never_negative(node: Node) -> bool:
    if node.kind == g.ACTIVATION:
        return node.params["function"] in _NEVER_NEGATIVE
    if node.kind == g.SOFTMAX:
        return True
    if node.kind in (g.MAX_POOL, g.EXTREME, g.LINEAR_POOL, g.MOVE, g.PART, g.PARTS, g.GATE):
        return bool(node.sources) and len(node.sources) == len(node.operands) and _all(node.sources)
    if node.kind == g.ADD:
        plain = node.params["signs"] == (1, 1) and len(node.sources) == 2
        return plain and _all(node.sources)
    return node.kind == g.MUL and _all(node.sources)


def _all(nodes: Iterable[Node]) -> bool:
    return all(_never_negative(n) for n in nodes)


def _owns_memory(node: Node) -> bool:
    """Whether the value is not a view of another one that is counted already."""
    return node.kind not in (g.PART, g.MOVE, g.GATE, g.INPUT) or node.params.get("how") in ("cat", "stack", "vjp")


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
