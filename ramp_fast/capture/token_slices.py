"""Token selections: gates behind them, and their way towards the input, so that only selected tokens are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ramp_fast import graph as g
from ramp_fast.graph import Graph, Node, only_user
from ramp_fast.params import Rearrange

aten = torch.ops.aten

# Operations after which a position's value depends on other positions.
_MIXING = frozenset(
    {g.CONV, g.MATMUL, g.ATTENTION, g.SOFTMAX, g.MAX_POOL, g.MAX_REDUCTION, g.LINEAR_MAP, g.BILINEAR, g.REDUCTION}
)


def gate_token_selections(graph: Graph) -> None:
    """Token choices on the way to the head follow the linear rule: a gate is put behind them.

    A select or slice counts as one if it drops values that nobody else takes from its source and no later
    operation mixes positions.
    """
    users = graph.users()
    mixes: dict[Node, bool] = {}
    for node in reversed(graph.nodes):
        mixes[node] = any(u.kind in _MIXING or mixes[u] for u in users[node])
    for node in list(graph.nodes):
        if node.kind != g.REARRANGE or node.params.how not in ("select", "slice") or mixes[node]:
            continue
        source, dim = node.operands[0], node.params.dim
        taken: set[int] = set()
        whole = False
        for user in users[source]:
            if user.kind == g.REARRANGE and user.params.how in ("select", "slice") and user.params.dim == dim:
                taken |= set(_taken(user))
            elif user.kind not in g.CONSTANT:
                whole = True
        if whole or len(taken) >= source.example[dim] or dim == source.batch.axis:
            continue
        gate = graph.put_behind(node, "gate", g.SELECT_TOKENS, aten.alias.default)
        users[gate], users[node], mixes[gate] = users[node], [gate], mixes[node]  # which may choose again


def _taken(node: Node) -> range:
    dim = node.params.dim
    length = node.operands[0].example[dim]
    if node.params.how == "select":
        index = node.params.index % length
        return range(index, index + 1)
    return range(length)[slice(node.params.start, node.params.end, node.params.step)]


def hoist_slices(graph: Graph) -> None:
    """Move token choices towards the input, so that only chosen tokens are computed and carry relevance.

    ``select`` becomes a slice of one and a reshape; a slice passes an operation that treats positions alike
    and has no other reader.
    """
    for node in list(graph.nodes):
        if node.kind == g.REARRANGE and node.params.how == "select" and _passable(graph, node):
            _split_select(graph, node)
    moved = True
    while moved:
        moved = False
        users = graph.users()
        for node in list(graph.nodes):
            if node.kind == g.REARRANGE and node.params.how == "slice":
                source = node.operands[0]
                if only_user(users, source) is node and _hoist(graph, node, source):
                    moved = True
                    break


def _passable(graph: Graph, node: Node) -> bool:
    source = node.operands[0]
    single = len(graph.users()[source]) == 1
    return single and node.params.dim != source.batch.axis and _plan_hoist(node, source) is not None


def resized(node: Node, dim: int, length: int) -> tuple[tuple[int | str, ...], tuple[int, ...]]:
    shape = (*node.shape[:dim], length, *node.shape[dim + 1 :])
    return shape, (*node.example[:dim], length, *node.example[dim + 1 :])


def _split_select(graph: Graph, node: Node) -> None:
    source, dim = node.operands[0], node.params.dim
    start = node.params.index % source.example[dim]
    piece = slice_of(graph, source, dim, start, start + 1, 1)
    node.target, node.args, node.kwargs = aten.squeeze.dim, (piece, dim), {}
    node.operands, node.params = [piece], Rearrange("reshape")


def slice_of(graph: Graph, source: Node, dim: int, start: int, end: int, step: int) -> Node:
    """The slice of ``source``, an existing one where there is one (two would keep each other from moving)."""
    params = Rearrange("slice", dim, start, end, step)
    for node in graph.nodes:
        if node.target is aten.slice.Tensor and node.args[0] is source and node.params == params:
            return node
    length = len(range(source.example[dim])[start:end:step])
    shape, example = resized(source, dim, length)
    piece = Node(
        f"{source.name}_{dim}_{start}_{end}",
        g.CONST if source.constant else g.REARRANGE,
        aten.slice.Tensor,
        (source, dim, start, end, step),
        operands=[source],
        params=params,
        module=source.module,
        shape=shape,
        example=example,
        batch=source.batch,
    )
    graph.insert_after(source, piece)
    return piece


# For an operation that a slice along `dim` of its output can pass: which dim of each operand is sliced.
_Targets = list[tuple[Node, int]]


def _plan_hoist(piece: Node, source: Node) -> _Targets | None:
    dim, rank = piece.params.dim, len(source.shape)
    kind = source.kind
    aligned: _Targets = [(n, dim) for n in source.operands]
    if kind in (g.ACTIVATION, g.GENERIC, g.SELECT_TOKENS):
        return aligned
    if kind in (g.LAYER_NORM, g.RMS_NORM):
        return aligned if dim < rank - source.params.dims else None
    if kind == g.LINEAR:
        return aligned if dim < rank - 1 else None
    if kind == g.SCALE:
        factor = source.params.factor
        plain = not isinstance(factor, Node) or len(factor.shape) < rank - dim or factor.shape[dim - rank] == 1
        return aligned if plain else None
    if kind in (g.ADD, g.MUL):
        targets: _Targets = []
        for n in source.operands:
            own = dim - rank + len(n.shape)
            if own >= 0 and n.shape[own] != 1:
                targets.append((n, own))
        return targets
    if kind == g.ATTENTION:
        if dim != rank - 2 or source.params.causal or source.params.mask is not None or source.params.grouped:
            return None
        return [(source.operands[0], dim)]
    if kind == g.REARRANGE and source.params.how == "permute":
        return [(source.operands[0], source.params.dims[dim])]
    if kind == g.REARRANGE and source.params.how == "reshape":
        inner = source.operands[0]
        # Axes up to `dim` must be untouched; the target shape is rewritten below.
        if len(inner.shape) > dim and inner.shape[: dim + 1] == source.shape[: dim + 1]:
            return [(inner, dim)]
    return None


def _hoist(graph: Graph, piece: Node, source: Node) -> bool:
    dim = piece.params.dim
    if dim == source.batch.axis:
        return False
    targets = _plan_hoist(piece, source)
    if targets is None:
        return False
    length = piece.example[dim]
    if source.kind == g.REARRANGE and source.params.how == "reshape" and not _rewrite_reshape(source, dim, length):
        return False
    start, end, step = piece.params.start, piece.params.end, piece.params.step
    for operand, own in targets:
        source.replace(operand, slice_of(graph, operand, own, start, end, step))
    source.shape, source.example = resized(source, dim, length)
    graph.replace_uses(piece, source, keep=[source])
    graph.prune()
    return True


def _rewrite_reshape(node: Node, dim: int, length: int) -> bool:
    """Let a reshape produce ``length`` entries along ``dim``; False where its arguments do not say so plainly."""
    target: Callable[..., Any] = node.target
    if target is not aten.reshape.default:
        return target is aten.flatten.using_ints
    sizes = list(node.args[1])
    if sizes[dim] != node.example[dim] or sizes.count(-1):
        return False
    sizes[dim] = length
    node.args = (node.args[0], sizes, *node.args[2:])
    return True
