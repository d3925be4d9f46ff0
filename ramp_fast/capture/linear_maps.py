"""Linear maps given by an operation with constant operands: the map itself and its entrywise absolute value.

A rule needs ``L^T c`` and ``|L|^T c``; both come from differentiating these callables, so that no matrix is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import params as p
from ramp_fast.graph import Graph, Node, copied, only_user

aten = torch.ops.aten

# What a linear function of one tensor is made of.
_LINEAR_KINDS = frozenset({g.SCALE, g.REARRANGE, g.SPLIT, g.SPLIT_OUTPUT})


@dataclass(frozen=True)
class _Slot:
    """The place of an argument that is given at run time: 0 is the operand, the others are constants."""

    index: int


class Term(NamedTuple):
    """A summand of the transpose of a linear map: ``weight * c[..., places]``.

    Attributes
    ----------
    places : Tensor [D] or None
        A permutation of the last axis, None where all stay.
    weight : Tensor
        Broadcasts to the operand of the map.
    swaps : bool
        Whether it swaps neighbours: 1, 0, 3, 2, and so on.
    """

    places: Tensor | None
    weight: Tensor
    swaps: bool = False

    def moved(self, c: Tensor) -> Tensor:
        """``c[..., places]``."""
        if self.places is None:
            return c
        pair = _PAIRS.get(c.element_size())
        if self.swaps and pair is not None and c.is_contiguous() and c.storage_offset() % 2 == 0:
            # Several times as fast as an index: the halves of an integer change places.
            pairs, bits = c.view(pair), 8 * c.element_size()
            return (pairs << bits).bitwise_or_((pairs >> bits).bitwise_and_((1 << bits) - 1)).view(c.dtype)
        return c.index_select(-1, self.places)


# Integers of two numbers, by the bytes of a number.
_PAIRS = {2: torch.int32, 4: torch.int64}


class Exchange(NamedTuple):
    """A sum of two terms of which one exchanges partners: halves of each run of ``2 pair`` entries of the last axis.

    Attributes
    ----------
    stay, cross : Tensor [H or 1, N, D]
        What every entry is multiplied by, and its partner: of operands ``[B, H, N, D]``, or ``[B, N, H, D]`` with
        ``rows_first``.
    pair : int
    rows_first : bool
    """

    stay: Tensor
    cross: Tensor
    pair: int
    rows_first: bool


def exchange_of(terms: list[Term] | None, shape: torch.Size) -> Exchange | None:
    """The terms of a map of an operand of ``shape`` as one exchange, where they are that."""
    if terms is None or len(terms) != 2 or len(shape) != 4:
        return None
    stays, others = ([t for t in terms if (t.places is None) == still] for still in (True, False))
    if len(stays) != 1 or any(t.weight.shape[0] != 1 for t in terms):
        return None
    places = others[0].places
    assert places is not None
    pair = int(places[0])
    run = torch.arange(shape[-1], device=places.device)
    if pair < 1 or shape[-1] % (2 * pair) or not torch.equal(places, run.view(-1, 2, pair).flip(1).flatten()):
        return None
    weights = [t.weight.squeeze(0) for t in (stays[0], others[0])]
    rows_first = all(w.shape[1] == 1 for w in weights) and any(w.shape[0] > 1 for w in weights)
    if rows_first:
        weights = [w.transpose(0, 1) for w in weights]
    rows = shape[1] if rows_first else shape[2]
    heads = max(w.shape[0] for w in weights)
    stay, cross = (w.expand(heads, rows, shape[-1]).contiguous() for w in weights)
    return Exchange(stay, cross, pair, rows_first)


class Call:
    """An operation that is linear (affine) in ``source``, with everything else constant.

    Parameters
    ----------
    node : Node
        The operation as captured.
    source : Node
        The argument in which it is linear.
    """

    def __init__(self, node: Node, source: Node) -> None:
        self.target: Callable[..., Any] = node.target
        self.constants = list(dict.fromkeys(n for n in node.references() if n is not source))
        places = {source: _Slot(0), **{n: _Slot(i + 1) for i, n in enumerate(self.constants)}}
        self.args = g.map_nodes(places.__getitem__, node.args)
        self.kwargs = g.map_nodes(places.__getitem__, node.kwargs)
        self.__name__ = str(node.target)

    def __call__(self, x: Tensor, *constants: Any) -> Tensor:
        args, kwargs = self.filled((x, *constants))
        y: Tensor = self.target(*args, **kwargs)
        return y

    def filled(self, given: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the operation, with the operand and the constants in their places."""
        return _filled(self.args, given), _filled(self.kwargs, given)

    def absolute(self, x: Tensor, *constants: Any) -> Tensor:
        """The same map with the absolute value of every entry of its matrix."""
        return self(x, *(c.abs() if isinstance(c, Tensor) and c.is_floating_point() else c for c in constants))

    def terms(self, x: Tensor, *constants: Any) -> list[Term] | None:
        """As :meth:`LinearMap.terms`: nothing is known of a single operation."""
        return None


class Resampling(Call):
    """Separable resampling of the last two axes with weights of both signs (bicubic)."""

    def __init__(self, node: Node, source: Node) -> None:
        super().__init__(node, source)
        self.rows, self.columns = self._matrix(source, 2), self._matrix(source, 3)

    def _matrix(self, source: Node, axis: int) -> Tensor:
        """Absolute weights along ``axis``, read off by resampling the identity."""
        sizes = list(source.example)
        length = sizes[axis]
        shape = [1, length, 1, 1]
        shape[axis] = length
        identity = (
            torch.eye(length, dtype=torch.float64, device="cpu").view(shape).expand(1, length, sizes[2], sizes[3])
        )
        response = self(identity.contiguous())
        return (response[0, :, :, 0] if axis == 2 else response[0, :, 0, :]).t().abs()

    def absolute(self, x: Tensor, *constants: Any) -> Tensor:
        """Kronecker products: the absolute value of the map is that of its factors."""
        return self.rows.to(x) @ x @ self.columns.to(x).t()


def _filled(value: Any, given: tuple[Any, ...]) -> Any:
    if isinstance(value, _Slot):
        return given[value.index]
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(v, given) for v in value)
    if isinstance(value, dict):
        return {k: _filled(v, given) for k, v in value.items()}
    return value


@dataclass
class LinearMap:
    """A small linear function of one tensor, made of moves, constant factors and sums (rotary embeddings)."""

    steps: list[Node]
    root: Node
    constants: list[Node]

    def __call__(self, x: Tensor, *constants: Any) -> Tensor:
        return self._run(x, constants, False)

    def absolute(self, x: Tensor, *constants: Any) -> Tensor:
        """The same map with the absolute value of every entry of its matrix."""
        return self._run(x, constants, True)

    def _run(self, x: Tensor, constants: tuple[Any, ...], absolute: bool) -> Tensor:
        values: dict[Node, Any] = {self.root: x, **dict(zip(self.constants, constants, strict=True))}
        for node in self.steps:
            if absolute and node.kind == g.ADD:
                values[node] = values[node.operands[0]] + values[node.operands[1]]
                continue
            args = g.map_nodes(values.__getitem__, node.args)
            kwargs = g.map_nodes(values.__getitem__, node.kwargs)
            if absolute and node.kind == g.SCALE:
                # All arguments but the moving operand are the constant factor.
                args = tuple(
                    a if original is node.operands[0] else _absolute(a)
                    for original, a in zip(node.args, args, strict=True)
                )
                if node.target is aten.neg.default:
                    values[node] = args[0]
                    continue
            values[node] = node.target(*args, **kwargs)
        result: Tensor = values[self.steps[-1]]
        return result

    def terms(self, x: Tensor, *constants: Any) -> list[Term] | None:
        """The transpose for operands like ``x`` as a sum of products with permutations of the last axis.

        None where the map is no such sum. Only the shape, dtype and device of ``x`` are read.
        """
        known: dict[Node, Any] = dict(zip(self.constants, constants, strict=True))
        # For every entry the one of x that it comes from and what that is multiplied by, for every summand.
        here = torch.arange(x.numel(), device=x.device).view(x.shape)
        summands: dict[Node, list[tuple[Tensor, Tensor]]] = {self.root: [(here, torch.ones_like(x))]}
        for node in self.steps:
            found = _summands(node, known, summands)
            if found is None:
                return None
            summands[node] = found
        several = [_term(places, weight, x) for places, weight in summands[self.steps[-1]]]
        return None if None in several else several  # type: ignore[return-value]  # none of them is None


@dataclass
class OfLastRows:
    """A map of all rows but the first ones along an axis, which are moved as they are.

    Attributes
    ----------
    function : LinearMap
        Of the other rows.
    dim, first : int
        The axis, and how many rows are moved.
    """

    function: LinearMap
    dim: int
    first: int

    def __call__(self, x: Tensor, *constants: Any) -> Tensor:
        return torch.cat(
            [x.narrow(self.dim, 0, self.first), self.function(self.last(x, self.dim), *constants)], self.dim
        )

    def last(self, t: Tensor, dim: int) -> Tensor:
        """The rows of ``t`` along its axis ``dim`` that are not only moved."""
        return t.narrow(dim, self.first, t.shape[dim] - self.first)


def _summands(
    node: Node, known: dict[Node, Any], summands: dict[Node, list[tuple[Tensor, Tensor]]]
) -> list[tuple[Tensor, Tensor]] | None:
    """Of a step of a linear map, from those of what it reads; None where a step is not a move, a factor or a sum."""
    if node.kind == g.ADD:
        if node.kwargs or any(n not in summands or n.example != node.example for n in node.operands):
            return None
        return [
            (at, sign * w) for n, sign in zip(node.operands, node.params.signs, strict=True) for at, w in summands[n]
        ]
    if any(n not in summands for n in node.operands) or (node.kind == g.REARRANGE and _computes(node)):
        return None
    several = [summands[n] for n in node.operands]
    if len({len(own) for own in several}) != 1:
        return None

    def call(number: int, part: int) -> Any:
        values = {**known, **{n: own[number][part] for n, own in zip(node.operands, several, strict=True)}}
        return node.target(*g.map_nodes(values.__getitem__, node.args), **g.map_nodes(values.__getitem__, node.kwargs))

    numbers = range(len(several[0]))
    if node.kind == g.SCALE:
        return [(several[0][i][0], call(i, 1)) for i in numbers]
    return [(call(i, 0), call(i, 1)) for i in numbers]


def _computes(node: Node) -> bool:
    """Whether a move also pads or masks."""
    return node.params.how == "vjp" or bool(node.params.pads or node.params.masks)


def _term(places: Tensor, weight: Tensor, x: Tensor) -> Term | None:
    """A summand of the map as one of its transpose, if it permutes the last axis."""
    if places.shape != x.shape or weight.shape != x.shape or not x.numel():
        return None
    width = x.shape[-1]
    rows = places.reshape(-1, width)
    own = rows - torch.arange(len(rows), device=x.device).unsqueeze(1) * width
    stay = torch.arange(width, device=x.device)
    back = own[0].argsort()
    if not (torch.equal(own, own[:1].expand_as(own)) and torch.equal(own[0][back], stay)):
        return None
    weight = weight[..., back]
    for axis in range(weight.dim()):  # those along which it is the same
        first = weight.narrow(axis, 0, 1)
        if torch.equal(first.expand_as(weight), weight):
            weight = first
    swaps = width % 2 == 0 and torch.equal(back, stay ^ 1)
    return Term(None if torch.equal(back, stay) else back, weight.contiguous(), swaps)


def _absolute(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) else abs(value) if isinstance(value, (int, float)) else value


def recognize_linear_maps(graph: Graph) -> None:
    """Sums of linear functions of one tensor (x cos + rotate(x) sin) are one linear map, not a junction."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    replaced = False
    for node in list(graph.nodes):
        if node.kind != g.ADD or len(node.sources) != 2:
            continue
        reach = [_linear_ancestors(n) for n in node.sources]
        common = [n for n in reach[0] if n in reach[1] and n.kind != g.SPLIT]  # a map takes one tensor
        for root in sorted(common, key=lambda n: -position[n]):
            inside = _region(node, root)
            if inside is None:
                continue
            inside.sort(key=lambda n: position[n])
            if not any(n.kind == g.SCALE for n in inside):
                break
            constants = list(dict.fromkeys(r for n in inside for r in n.references() if r.constant))
            function = LinearMap([copied(n) for n in inside], root, constants)
            node.kind, node.target = g.LINEAR_MAP, function
            node.args, node.kwargs = (root, *constants), {}
            node.operands, node.params = [root], p.LinearMap()
            # Steps refer to each other by the original nodes: keep the mapping closed.
            function.steps = _closed(function.steps, inside)
            replaced = True
            break
    if replaced:
        graph.prune()


def _closed(copies: list[Node], originals: list[Node]) -> list[Node]:
    for copy in copies:
        for original, twin in zip(originals, copies, strict=True):
            copy.replace(original, twin)
    return copies


def _linear_ancestors(node: Node) -> dict[Node, None]:
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found or current.constant:
            continue
        found[current] = None
        if current.kind in _LINEAR_KINDS:
            stack.extend(current.operands)
    return found


def _region(node: Node, root: Node) -> list[Node] | None:
    """Nodes between ``root`` and ``node`` (inclusive), or None where a path avoids ``root``."""
    inside: dict[Node, None] = {node: None}
    stack = list(node.sources)
    while stack:
        current = stack.pop()
        if current is root or current in inside:
            continue
        if current.kind not in _LINEAR_KINDS:
            return None
        inside[current] = None
        stack.extend(current.sources)
    return list(inside)


def fold_moved_rows(graph: Graph) -> None:
    """A map of all tokens but the first ones, put behind these again, is one map: no slices and no concatenation."""
    users = graph.users()
    replaced = False
    for node in list(graph.nodes):
        if node.kind != g.REARRANGE or node.params.how != "cat" or len(node.operands) != 2 or not node.batch.plain:
            continue
        first, turned = node.operands
        dim = node.params.dim
        if turned.kind != g.LINEAR_MAP or not isinstance(turned.target, LinearMap):
            continue
        rest = turned.operands[0]
        pieces = [_slice(n, dim) for n in (first, rest)]
        if None in pieces or dim == node.batch.axis or any(only_user(users, n) is not node for n in (first, turned)):
            continue
        source, (begin, stop) = first.operands[0], pieces[0]  # type: ignore[misc]  # none of them is None
        if (
            rest.operands[0] is not source
            or source.kind == g.SPLIT
            or only_user(users, rest) is not turned
            or node.example != source.example
            or begin != 0
            or pieces[1] != (stop, source.example[dim])
        ):
            continue
        node.kind, node.target = g.LINEAR_MAP, OfLastRows(turned.target, dim, stop)
        node.args, node.kwargs = (source, *turned.args[1:]), {}
        node.operands, node.params = [source], p.LinearMap(dim=dim, first=stop)
        replaced = True
    if replaced:
        graph.prune()


def _slice(node: Node, dim: int) -> tuple[int, int] | None:
    """Which entries along ``dim`` of its operand a node is, of one that takes neighbours along that axis."""
    if node.kind != g.REARRANGE or node.params.how != "slice" or node.params.dim != dim or node.params.step != 1:
        return None
    start, stop, _ = slice(node.params.start, node.params.end).indices(node.operands[0].example[dim])
    return start, stop
