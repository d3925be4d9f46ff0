"""absLRP: which steps compute several nodes at once, and where less than the whole rule is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ramp_fast import graph as g
from ramp_fast.gemm import Geometry, Precision, fuses_convolutions
from ramp_fast.graph import Graph, Node
from ramp_fast.ops.activation import FUNCTIONS
from ramp_fast.rules.base import Fusion
from ramp_fast.rules.junctions import plain_product, plain_sum


@dataclass(frozen=True)
class Options:
    """What decides besides the graph.

    Attributes
    ----------
    precision : Precision
    shares_kept : bool
        Operands of a sum keep their shares of relevance, and no masses are set between it and a ReLU behind it.
    maxpool : {"auto", "divided", "undivided"}
    gated_output : callable
        Whether relevance of non-positive outputs of a node is dropped by its own pull-back.
    """

    precision: Precision
    shares_kept: bool
    maxpool: str
    gated_output: Callable[[Node], bool]


def fusions(graph: Graph, options: Options) -> Mapping[Node, Fusion]:
    """What the steps of a graph compute together under absLRP."""
    search = _Search(graph, options)
    return {node: search.fusion(node) for node in graph.nodes if not node.constant and node.kind != g.INPUT}


class _Search:
    def __init__(self, graph: Graph, options: Options) -> None:
        self.graph, self.options = graph, options
        self.users, self.carriers = graph.users(), graph.carriers()
        self.residual = any(n.kind == g.ADD and len(n.sources) == 2 for n in graph.nodes)
        self.heads = _heads(graph, self.users, self.carriers)

    def fusion(self, node: Node) -> Fusion:
        found = Fusion()
        if node.kind in g.WEIGHTED:
            found.positive_input = self._positive(node.operands[0])
            found.fused_norm = self._norm_below(node)
            found.adds_classes = node in self.heads
            if node in self._convolutions:
                found.fused_batch_norm, total = self._convolutions[node]
                last = total or found.fused_batch_norm
                found.fused_relu = self._relu_above(last)
                if total is not None:
                    found.fused_add = next(n for n in total.operands if n is not found.fused_batch_norm)
        elif node.kind == g.LAYER_NORM:
            above = (u for u in self.users[node] if u in self.carriers and self._norm_below(u) is node)
            found.pulled_back_in = next(above, None)
        elif node.kind in (g.ADD, g.BATCH_NORM):
            found.fused_relu = self._relu_above(node)
            if len(node.sources) == 2:
                # The branch is what only this sum reads; the shortcut has other readers as well.
                single = [n for n in node.operands if len(self.users[n]) == 1]
                found.branch = single[0] if len(single) == 1 else node.operands[1]
            for conv, (norm, total) in self._convolutions.items():
                if node in (norm, total):
                    found.fused_into = conv
                    found.pulled_back_in = (total or self._activation_above(norm)) if node is norm else None
        elif node.kind == g.ACTIVATION:
            found.fused_into = node.operands[0] if self._is_fused_relu(node) else None
            norm = node.operands[0]
            if any(n is norm for n, _ in self._convolutions.values()) and self._activation_above(norm) is node:
                found.fused_batch_norm = norm
            gate = self.users[node][0] if len(self.users[node]) == 1 else None
            found.pulled_back_in = gate if gate is not None and self._activation_below(gate) is node else None
        elif node.kind == g.MUL:
            found.fused_activation = self._activation_below(node)
        elif node.kind == g.MATMUL:
            found.positive_operand = any(never_negative(n) for n in node.operands)
        elif node.kind in (g.MAX_POOL, g.MAX_REDUCTION):
            form = self.options.maxpool
            found.divided = self.residual if form == "auto" else form == "divided"
        return found

    def _relu_above(self, node: Node) -> Node | None:
        return next((u for u in self.users[node] if self._is_fused_relu(u)), None)

    def _activation_above(self, norm: Node) -> Node | None:
        """The activation whose pull-back does that of ``norm``, which a convolution computes, as well."""
        above = self.users[norm]
        fuses = len(above) == 1 and above[0].kind == g.ACTIVATION and above[0].params.function in FUNCTIONS
        return above[0] if fuses else None

    def _activation_below(self, product: Node) -> Node | None:
        """The activation of a gate whose pull-back the step of the product does as well."""
        if product.kind != g.MUL or not plain_product(product):
            return None
        for node in product.operands:
            fuses = node.kind == g.ACTIVATION and node.params.function in FUNCTIONS and self.users[node] == [product]
            # Not where the activation's own step pulls back a norm, or the pull-back of what it reads needs its mass.
            if fuses and node.operands[0].kind != g.BATCH_NORM:
                return node
        return None

    def _norm_below(self, linear: Node) -> Node | None:
        """The LayerNorm whose pull-back the step of ``linear`` does as well."""
        norm = linear.operands[0] if linear.kind == g.LINEAR else None
        fuses = (
            norm is not None
            and norm.kind == g.LAYER_NORM
            and norm.params.dims == 1
            and len(self.users[norm]) == 1
            and norm.batch.plain
            and not self._positive(norm)
        )
        return norm if fuses else None

    @cached_property
    def _convolutions(self) -> dict[Node, tuple[Node, Node | None]]:
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
            if conv.kind != g.CONV or self.users[conv] != [norm] or not self._fuses(conv):
                continue
            readers = self.users[norm]
            if any(self._is_fused_relu(u) and u.params.cap < math.inf for u in readers):
                continue  # from a value that was cut nothing is told
            found[conv] = norm, None
            total = readers[0] if len(readers) == 1 else norm
            if total.kind != g.ADD or not plain_sum(total) or total.operands[0] is total.operands[1]:
                continue
            other = next(n for n in total.operands if n is not norm)
            relu = self._relu_above(total)
            there = position[other] < position[conv]
            if there and relu is not None and relu.params.cap == math.inf:
                found[conv] = norm, total
        return found

    def _fuses(self, conv: Node) -> bool:
        weight = conv.params.weight
        if weight.kind != g.PARAM or len(weight.example) != 4 or not conv.batch.leading:
            return False
        tensor = weight.params.tensor
        tiles = Geometry.of(conv.params).tiles(tensor, *conv.operands[0].example[2:])
        return not tiles and fuses_convolutions(self.options.precision, tensor.device)

    def _is_fused_relu(self, node: Node) -> bool:
        """Whether ``node`` is a ReLU that the step below computes in its own pass: a BatchNorm, or a residual sum.

        With equal shares a ReLU sets masses, which a sum cannot do for every reader of the ReLU.
        """
        if node.kind != g.ACTIVATION or node.params.how != "relu":
            return False
        source = node.operands[0]
        if self.users[source] != [node]:
            return False
        return source.kind == g.BATCH_NORM or (source.kind == g.ADD and plain_sum(source) and self.options.shares_kept)

    def _positive(self, node: Node) -> bool:
        """Whether relevance reaches only positive entries of ``node``: by value, or by a gate right below."""
        if never_negative(node):
            return True
        while len(self.users[node]) == 1:
            if self.options.gated_output(node):
                return True
            if node.kind != g.REARRANGE or len(node.sources) != 1 or node.params.how in ("expand", "vjp"):
                return False
            node = node.operands[0]
        return False


_NEVER_NEGATIVE = frozenset({"relu", "sigmoid", "hardsigmoid", "abs", "square", "exp", "softplus", "sqrt", "rsqrt"})


def _heads(graph: Graph, users: Mapping[Node, list[Node]], carriers: Collection[Node]) -> set[Node]:
    """The layers with weights where relevance of several classes meets first.

    What another such layer has pulled back is mixed already, also where a residual branch brings it to the shortcut.
    """
    heads: set[Node] = set()
    mixed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node not in carriers:
            continue
        readers = [user for user in users[node] if user in carriers and node in user.sources]
        if any(user.kind in g.WEIGHTED or user in mixed for user in readers):
            mixed.add(node)
        elif node.kind in g.WEIGHTED:
            heads.add(node)
    return heads


def never_negative(node: Node) -> bool:
    """Whether no entry of the value of ``node`` can be below zero."""
    if node.kind == g.ACTIVATION:
        return node.params.function in _NEVER_NEGATIVE
    if node.kind == g.SOFTMAX:
        return True
    if node.kind == g.REARRANGE and not _fills_are_not_negative(node):
        return False
    if node.kind in (g.MAX_POOL, g.MAX_REDUCTION, g.LINEAR_POOL, g.REARRANGE, g.SPLIT_OUTPUT, g.SPLIT, g.SELECT_TOKENS):
        return bool(node.sources) and len(node.sources) == len(node.operands) and _all(node.sources)
    if node.kind == g.ADD:
        plain = node.params.signs == (1, 1) and len(node.sources) == 2
        return plain and _all(node.sources)
    return node.kind == g.MUL and _all(node.sources)


def _fills_are_not_negative(node: Node) -> bool:
    """Whether the constants that padding and masks put in the place of values are known to be no negative ones."""
    if not (node.params.pads or node.params.masks):
        return True
    condition = {"masked_fill": 1, "where": 0}.get(str(node.target).removeprefix("aten.").split(".")[0])
    given = [*(a for i, a in enumerate(node.args) if i != condition), *node.kwargs.values()]
    tensors = any(isinstance(a, Node) and a not in node.sources for a in given)
    return not tensors and not any(isinstance(a, (int, float)) and a < 0 for a in given)


def _all(nodes: Iterable[Node]) -> bool:
    return all(never_negative(n) for n in nodes)
