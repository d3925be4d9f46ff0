"""Rewrites of a captured graph: they recognise composite operations and move token choices towards the input.

All of them keep the function that the graph computes. Order matters: see :func:`canonicalize`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ramp_fast import graph as g
from ramp_fast.graph import Graph, Node
from ramp_fast.vocabulary import bind

aten = torch.ops.aten

_LINEAR_KINDS = frozenset({g.SCALE, g.MOVE, g.PARTS, g.PART})
# Operations after which a position's value depends on other positions.
_MIXING = frozenset(
    {g.CONV, g.MATMUL, g.ATTENTION, g.SOFTMAX, g.MAX_POOL, g.EXTREME, g.LINEAR_MAP, g.BILINEAR, g.FUNCTION}
)


def canonicalize(graph: Graph, *, fold_batchnorm: bool = False) -> Graph:
    """Apply every rewrite, in place, and return the graph.

    Parameters
    ----------
    graph : Graph
        Fresh from :func:`ramp_fast.capture.capture`.
    fold_batchnorm : bool
        Fold BatchNorm into the convolution or linear layer before it (another rule: docs/rules.md).
    """
    if fold_batchnorm:
        _fold_batchnorm(graph)
    _recognize_norms(graph)
    _join_projections(graph)
    _fold_channel_scales(graph)
    _recognize_attention(graph)
    _assign_matmul_roles(graph)
    _mark_masks(graph)
    _recognize_linear_maps(graph)
    _mark_picks(graph)
    _hoist_slices(graph)
    graph.prune()
    return graph


def _only_user(users: dict[Node, list[Node]], node: Node) -> Node | None:
    return users[node][0] if len(users[node]) == 1 else None


def _fold_batchnorm(graph: Graph) -> None:
    users = graph.users()
    for node in graph.nodes:
        if node.kind != g.BATCH_NORM:
            continue
        layer = node.operands[0]
        if layer.kind in g.WEIGHTED and _only_user(users, layer) is node:
            layer.params["batch_norm"] = dict(node.params)
            graph.replace_uses(node, layer)
    graph.prune()


def _recognize_norms(graph: Graph) -> None:
    """A written-out ``(x - mean) / sqrt(var + eps) * w + b`` becomes a LayerNorm, ``x / sqrt(mean(x^2) + eps) * w`` an
    RMSNorm: functions of torch.nn.functional have one map, however they are written.

    Statistics are over any axes but the batch's; those that are not the last are moved there and back.
    """
    users = graph.users()
    for node in list(graph.nodes):
        if node.kind != g.DIV:
            continue
        found = _denominator(node.params["denominator"], node.params["inverse"])
        if found is None:
            continue
        variance, eps = found
        centred = _centred(node.operands[0])
        source, dims = centred or (node.operands[0], _square_mean_axes(variance, node.operands[0]))
        if not dims or (centred and not _is_variance(variance, source, dims)) or source.batch.axis in dims:
            continue
        rank = len(source.example)
        sizes = [source.example[d] for d in dims]
        if any(isinstance(source.shape[d], str) for d in dims):
            continue
        last, weight, bias = node, None, None
        factor = _affine(users, last, g.SCALE, dims, rank)
        if factor is not None:
            last, weight = factor
            added = _affine(users, last, g.ADD, dims, rank) if centred else None
            if added is not None:
                last, bias = added
        here = graph.nodes.index(last)
        order = [d for d in range(rank) if d not in dims] + dims
        norm = _copy(last)
        norm.name = f"{node.name}_norm"
        before: list[Node] = []
        moved = source
        if order != list(range(rank)):
            moved = _permuted(source, order, f"{node.name}_in")
            before.append(moved)
        weight, bias = (_flat_constant(constant, sizes, norm.name, before) for constant in (weight, bias))
        norm.module, norm.operands, norm.kwargs = node.module, [moved], {}
        norm.shape, norm.example, norm.batch = moved.shape, moved.example, moved.batch
        norm.params = {"weight": weight, "eps": eps, "dims": len(dims)}
        if centred:
            norm.kind, norm.target, norm.args = g.LAYER_NORM, aten.layer_norm.default, (moved, sizes, weight, bias, eps)
            norm.params["bias"] = bias
        else:
            norm.kind, norm.target, norm.args = g.RMS_NORM, aten.rms_norm.default, (moved, sizes, weight, eps)
        after = norm
        if moved is not source:
            after = _permuted(norm, [order.index(d) for d in range(rank)], f"{node.name}_out")
        graph.nodes[here + 1 : here + 1] = [*before, *dict.fromkeys((norm, after))]
        graph.replace_uses(last, after, keep=[norm, after])
        users = graph.users()
    graph.prune()


def _denominator(node: Node, inverse: bool) -> tuple[Node, float] | None:
    """``v`` and ``eps`` of a denominator ``sqrt(v + eps)``, or of a factor that is one by it."""
    node = _reshaped_from(node)
    if inverse and node.kind == g.ACTIVATION and node.params["function"] == "reciprocal":
        return _denominator(node.operands[0], False)
    if node.kind != g.ACTIVATION:
        return None
    power = node.args[1] if node.params["function"] == "pow" else None
    if not (node.params["function"] == ("rsqrt" if inverse else "sqrt") or power == (-0.5 if inverse else 0.5)):
        return None
    total = _reshaped_from(node.operands[0])
    if total.kind != g.ADD or len(total.operands) != 1 or total.params["signs"] != (1, 1):
        return None
    numbers = [n for n in (total.params["first"], total.params["second"]) if isinstance(n, (int, float))]
    return (_reshaped_from(total.operands[0]), float(numbers[0])) if numbers and numbers[0] >= 0 else None


def _reshaped_from(node: Node) -> Node:
    """Statistics before axes of length one are put back."""
    while node.kind == g.MOVE and node.params["how"] == "reshape":
        node = node.operands[0]
    return node


def _mean_axes(node: Node, source: Node) -> list[int]:
    """The axes that a node is the mean of ``source`` over, none where it is not."""
    node = _reshaped_from(node)
    if (
        node.kind == g.LINEAR_POOL
        and node.params["how"] == "mean"
        and node.operands[0] is source
        and "dims" in node.params
    ):
        return sorted(d % len(source.example) for d in node.params["dims"])
    return []


def _centred(node: Node) -> tuple[Node, list[int]] | None:
    """``x`` and the axes of a node ``x - mean(x)``, of which the mean keeps or gets back its axes in their places."""
    if node.kind != g.ADD or node.params["signs"] != (1, -1) or len(node.operands) != 2:
        return None
    source, mean = node.operands
    dims = _mean_axes(mean, source)
    kept = tuple(1 if d in dims else n for d, n in enumerate(source.example))
    return (source, dims) if dims and mean.example == kept else None


def _squared(node: Node) -> Node | None:
    """``x`` of a node ``x * x``."""
    if node.kind == g.ACTIVATION and node.params["function"] in ("square", "pow"):
        return node.operands[0] if node.params["function"] == "square" or node.args[1] == 2 else None
    return node.operands[0] if node.kind == g.MUL and node.operands[0] is node.operands[1] else None


def _square_mean_axes(node: Node, source: Node) -> list[int]:
    """The axes that a node is the mean of the squares of ``source`` over, none where it is not."""
    node = _reshaped_from(node)
    square = node.operands[0] if node.kind == g.LINEAR_POOL else node
    return _mean_axes(node, square) if _squared(square) is source else []


def _is_variance(node: Node, source: Node, dims: list[int]) -> bool:
    """Whether a node is the variance of ``source`` over ``dims``: of the sample itself, without a correction."""
    if node.kind == g.FUNCTION and "var" in str(node.target):
        bound = bind(node.target, node.args, node.kwargs)
        own = sorted(d % len(source.example) for d in bound.get("dim") or [])
        plain = bound.get("correction") == 0 or bound.get("unbiased") is False
        centred = _centred(node.operands[0])
        return plain and own == dims and (node.operands[0] is source or centred == (source, dims))
    if node.kind == g.ADD and node.params["signs"] == (1, -1) and len(node.operands) == 2:  # E[x^2] - E[x]^2
        mean = _squared(node.operands[1])
        return (
            mean is not None
            and _mean_axes(mean, source) == dims
            and _square_mean_axes(node.operands[0], source) == dims
        )
    square = _squared(node.operands[0]) if node.kind == g.LINEAR_POOL else None
    return square is not None and _centred(square) == (source, dims) and _mean_axes(node, node.operands[0]) == dims


def _affine(
    users: dict[Node, list[Node]], node: Node, kind: str, dims: list[int], rank: int
) -> tuple[Node, Node] | None:
    """The only reader of ``node`` and the constant of entries ``dims`` that it multiplies (adds), if it does."""
    reader = _only_user(users, node)
    if reader is None or reader.kind != kind or reader.example != node.example:
        return None
    if kind == g.SCALE:
        constant = None if reader.params["inverse"] else reader.params["factor"]
    else:
        others = [n for n in reader.operands if n.constant]
        constant = others[0] if others and reader.params["signs"] == (1, 1) else None
    if (
        not isinstance(constant, Node)
        or len(constant.example) > rank
        or any(isinstance(n, str) for n in constant.shape)
    ):
        return None
    padded = (1,) * (rank - len(constant.example)) + constant.example
    wanted = tuple(node.example[d] if d in dims else 1 for d in range(rank))
    return (reader, constant) if padded == wanted else None


def _flat_constant(constant: Node | None, sizes: list[int], norm: str, before: list[Node]) -> Node | None:
    """A weight or bias in the shape that functional norms take, by a node in ``before`` where it has another."""
    if constant is None or constant.example == tuple(sizes):
        return constant
    name = f"{norm}_{constant.name}"
    found = Node(name, g.CONST, aten.reshape.default, (constant, sizes), shape=tuple(sizes), example=tuple(sizes))
    found.params["floating"] = True
    before.append(found)
    return found


def _permuted(source: Node, order: list[int], name: str) -> Node:
    return Node(
        name,
        g.MOVE,
        aten.permute.default,
        (source, order),
        operands=[source],
        params={"how": "permute", "dims": order},
        module=source.module,
        shape=tuple(source.shape[d] for d in order),
        example=tuple(source.example[d] for d in order),
        batch=replace(source.batch, axis=order.index(source.batch.axis)),
    )


def _join_projections(graph: Graph) -> None:
    """Linear layers of one input by all the chunks of one weight become the layer that the chunks are of.

    nn.MultiheadAttention computes queries, keys and values at once where it is given one tensor three times, and one
    after the other where it is given that tensor under three names (detached, for example): both have one map.
    """
    groups: dict[Any, dict[int, Node]] = {}
    for node in graph.nodes:
        if node.kind != g.LINEAR or node.target is not aten.linear.default:
            continue
        weight, bias = _chunk(node.params["weight"]), _chunk(node.params["bias"])
        if weight is None or (bias is None) != (node.params["bias"] is None) or (bias and bias[1] != weight[1]):
            continue
        key = weight[0], bias and bias[0], _origin(node.operands[0])
        groups.setdefault(key, {})[weight[1]] = node
    for (weights, biases, _), layers in groups.items():
        if len(layers) < 2 or sorted(layers) != list(range(len(layers))):
            continue
        first, axis = layers[0], len(layers[0].example) - 1
        width, total = first.example[axis], weights.args[0].example[0]
        if sum(layer.example[axis] for layer in layers.values()) != total:
            continue
        joined = _copy(first)
        joined.name = f"{first.name}_joined"
        joined.params = {**first.params, "weight": weights.args[0], "bias": biases and biases.args[0]}
        joined.args = (first.operands[0], joined.params["weight"], joined.params["bias"])
        joined.shape, joined.example = _resized(first, axis, total)
        graph.insert_after(first, joined)
        for number, layer in layers.items():
            graph.replace_uses(layer, _slice_of(graph, joined, axis, number * width, (number + 1) * width, 1))
    graph.prune()


def _chunk(node: Node | None) -> tuple[Node, int] | None:
    """Of which call of ``chunk`` along the first axis a constant is a part, and which."""
    if node is None or node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return None
    whole = node.args[0]
    if whole.target is not aten.chunk.default or (len(whole.args) > 2 and whole.args[2] != 0) or whole.kwargs:
        return None
    return whole, node.args[1]


def _origin(node: Node) -> tuple[Any, ...]:
    """What tells whether two nodes are one: a source, and the moves from there with their arguments."""
    moves = []
    while node.kind == g.MOVE and len(node.operands) == 1:
        moves.append((node.target, repr(node.args[1:]), repr(node.kwargs)))
        node = node.operands[0]
    return node, *moves


def _fold_channel_scales(graph: Graph) -> None:
    """LayerScale: a per-channel constant right after a linear layer belongs to its weights."""
    users = graph.users(shapes=False)
    for node in graph.nodes:
        if node.kind != g.SCALE or not isinstance(node.params["factor"], Node) or node.params["inverse"]:
            continue
        layer, factor = node.operands[0], node.params["factor"]
        if layer.kind not in g.WEIGHTED or _only_user(users, layer) is not node or "scale" in layer.params:
            continue
        shape = factor.example
        channels = layer.example[-1] if layer.kind == g.LINEAR else layer.example[1]
        rank = len(layer.example)
        axis = rank - 1 if layer.kind == g.LINEAR else 1
        padded = (1,) * (rank - len(shape)) + shape
        if len(shape) <= rank and padded[axis] == channels and all(s == 1 for i, s in enumerate(padded) if i != axis):
            layer.params["scale"] = factor
            graph.replace_uses(node, layer)
    graph.prune()


def _through(node: Node, kinds: frozenset[str]) -> Node:
    """The nearest producer of ``node`` whose kind is not in ``kinds`` (following the first operand)."""
    while node.kind in kinds and node.operands:
        node = node.operands[0]
    return node


def _recognize_attention(graph: Graph) -> None:
    """softmax(scale * Q K^T + bias) V written out becomes one attention node."""
    users = graph.users(shapes=False)
    for node in list(graph.nodes):
        if node.kind != g.MATMUL:
            continue
        probabilities, value = node.operands
        if probabilities.kind != g.SOFTMAX or _only_user(users, probabilities) is not node:
            continue
        if len(node.shape) != 4 or probabilities.params["dim"] % 4 != 3:
            continue
        scores, scale, mask = probabilities.operands[0], 1.0, None
        if scores.kind == g.ADD and _only_user(users, scores) is probabilities and scores.params["signs"] == (1, 1):
            constants = [n for n in scores.operands if n.constant]
            if len(constants) == 1 and len(scores.operands) == 2:
                mask = constants[0]
                scores = scores.sources[0]
        if scores.kind == g.SCALE and isinstance(scores.params["factor"], float) and len(users[scores]) == 1:
            scale = 1 / scores.params["factor"] if scores.params["inverse"] else scores.params["factor"]
            scores = scores.operands[0]
        if scores.kind != g.MATMUL or len(users[scores]) != 1 or scale <= 0:
            continue
        query, transposed = scores.operands
        if transposed.kind != g.MOVE or transposed.params.get("dims") != [0, 1, 3, 2]:
            continue
        key = transposed.operands[0]
        if not (query.example[:2] == key.example[:2] == value.example[:2]):
            continue
        node.kind = g.ATTENTION
        node.target, node.args = aten.scaled_dot_product_attention.default, (query, key, value, mask, 0.0, False)
        node.kwargs = {"scale": scale}
        node.operands = [query, key, value]
        node.params = {"mask": mask, "causal": False, "scale": scale, "grouped": False}
    graph.prune()


def _mark_masks(graph: Graph) -> None:
    """Constants added to scores on the way into a softmax may be masks."""
    users = graph.users(shapes=False)
    for node in graph.nodes:
        current = node.operands[0] if node.kind == g.SOFTMAX else node
        while current is not node and len(users[current]) == 1 and current.kind in (g.MOVE, g.ADD):
            if current.kind == g.ADD:
                if len(current.sources) != 1 or current.params["signs"] != (1, 1):
                    break
                current.params["scores"] = True
            current = current.sources[0]


def _assign_matmul_roles(graph: Graph) -> None:
    """Tell scores (Q K^T, on the way into a softmax) and attended values (A V) from other products."""
    soft = frozenset({g.MOVE, g.SCALE})
    users = graph.users(shapes=False)
    for node in graph.nodes:
        if node.kind not in (g.MATMUL, g.BILINEAR):
            continue
        node.params["role"] = "product"
        if any(_through(n, frozenset({g.MOVE})).kind == g.SOFTMAX for n in node.operands):
            node.params["role"] = "attend"
            continue
        current: Node | None = node
        while current is not None:
            current = _only_user(users, current)
            if current is not None and current.kind == g.SOFTMAX:
                node.params["role"] = "scores"
            if current is None or current.kind not in soft | {g.ADD}:
                break


@dataclass
class LinearMap:
    """A small linear function of one tensor, made of moves, constant factors and sums (rotary embeddings)."""

    steps: list[Node]
    root: Node
    constants: list[Node]

    def __call__(self, x: torch.Tensor, *constants: Any) -> torch.Tensor:
        return self._run(x, constants, False)

    def absolute(self, x: torch.Tensor, *constants: Any) -> torch.Tensor:
        """The same map with the absolute value of every entry of its matrix."""
        return self._run(x, constants, True)

    def _run(self, x: torch.Tensor, constants: tuple[Any, ...], absolute: bool) -> torch.Tensor:
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
        result: torch.Tensor = values[self.steps[-1]]
        return result


def _absolute(value: Any) -> Any:
    return value.abs() if isinstance(value, torch.Tensor) else abs(value) if isinstance(value, (int, float)) else value


def _recognize_linear_maps(graph: Graph) -> None:
    """Sums of linear functions of one tensor (x cos + rotate(x) sin) are one linear map, not a junction."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    replaced = False
    for node in list(graph.nodes):
        if node.kind != g.ADD or len(node.sources) != 2:
            continue
        reach = [_linear_ancestors(n) for n in node.sources]
        common = [n for n in reach[0] if n in reach[1] and n.kind != g.PARTS]  # a map takes one tensor
        for root in sorted(common, key=lambda n: -position[n]):
            inside = _region(node, root)
            if inside is None:
                continue
            inside.sort(key=lambda n: position[n])
            if not any(n.kind == g.SCALE for n in inside):
                break
            constants = list(dict.fromkeys(r for n in inside for r in n.references() if r.constant))
            function = LinearMap([_copy(n) for n in inside], root, constants)
            node.kind, node.target = g.LINEAR_MAP, function
            node.args, node.kwargs = (root, *constants), {}
            node.operands, node.params = [root], {}
            # Steps refer to each other by the original nodes: keep the mapping closed.
            function.steps = _closed(function.steps, inside)
            replaced = True
            break
    if replaced:
        graph.prune()


def _copy(node: Node) -> Node:
    return Node(
        node.name,
        node.kind,
        node.target,
        node.args,
        dict(node.kwargs),
        list(node.operands),
        dict(node.params),
        node.module,
        node.shape,
        node.example,
        node.batch,
    )


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


def _mark_picks(graph: Graph) -> None:
    """Token choices on the way to the head follow the linear rule: a gate is put behind them.

    A select or slice counts as one if it drops values that nobody else takes from its source and no later
    operation mixes positions.
    """
    users = graph.users()
    mixes: dict[Node, bool] = {}
    for node in reversed(graph.nodes):
        mixes[node] = any(u.kind in _MIXING or mixes[u] for u in users[node])
    for node in list(graph.nodes):
        if node.kind != g.MOVE or node.params["how"] not in ("select", "slice") or mixes[node]:
            continue
        source, dim = node.operands[0], node.params["dim"]
        taken: set[int] = set()
        whole = False
        for user in users[source]:
            if user.kind == g.MOVE and user.params["how"] in ("select", "slice") and user.params["dim"] == dim:
                taken |= set(_taken(user))
            elif user.kind not in g.CONSTANT:
                whole = True
        if whole or len(taken) >= source.example[dim] or dim == source.batch.axis:
            continue
        gate = Node(
            f"{node.name}_gate",
            g.GATE,
            aten.alias.default,
            (node,),
            operands=[node],
            module=node.module,
            shape=node.shape,
            example=node.example,
            batch=node.batch,
        )
        graph.insert_after(node, gate)
        graph.replace_uses(node, gate, keep=[gate])
        users[gate], users[node], mixes[gate] = users[node], [gate], mixes[node]  # which may choose again


def _taken(node: Node) -> range:
    dim = node.params["dim"]
    length = node.operands[0].example[dim]
    if node.params["how"] == "select":
        index = node.params["index"] % length
        return range(index, index + 1)
    return range(length)[slice(node.params["start"], node.params["end"], node.params["step"])]


def _hoist_slices(graph: Graph) -> None:
    """Move token choices towards the input, so that only chosen tokens are computed and carry relevance.

    ``select`` becomes a slice of one and a reshape; a slice passes an operation that treats positions alike
    and has no other reader.
    """
    for node in list(graph.nodes):
        if node.kind == g.MOVE and node.params["how"] == "select" and _passable(graph, node):
            _split_select(graph, node)
    moved = True
    while moved:
        moved = False
        users = graph.users()
        for node in list(graph.nodes):
            if node.kind == g.MOVE and node.params["how"] == "slice":
                source = node.operands[0]
                if _only_user(users, source) is node and _hoist(graph, node, source):
                    moved = True
                    break


def _passable(graph: Graph, node: Node) -> bool:
    source = node.operands[0]
    single = len(graph.users()[source]) == 1
    return single and node.params["dim"] != source.batch.axis and _plan_hoist(node, source) is not None


def _resized(node: Node, dim: int, length: int) -> tuple[tuple[int | str, ...], tuple[int, ...]]:
    shape = (*node.shape[:dim], length, *node.shape[dim + 1 :])
    return shape, (*node.example[:dim], length, *node.example[dim + 1 :])


def _split_select(graph: Graph, node: Node) -> None:
    source, dim = node.operands[0], node.params["dim"]
    start = node.params["index"] % source.example[dim]
    piece = _slice_of(graph, source, dim, start, start + 1, 1)
    node.target, node.args, node.kwargs = aten.squeeze.dim, (piece, dim), {}
    node.operands, node.params = [piece], {"how": "reshape"}


def _slice_of(graph: Graph, source: Node, dim: int, start: int, end: int, step: int) -> Node:
    """The slice of ``source``, an existing one where there is one (two would keep each other from moving)."""
    params = {"how": "slice", "dim": dim, "start": start, "end": end, "step": step}
    for node in graph.nodes:
        if node.target is aten.slice.Tensor and node.args[0] is source and node.params == params:
            return node
    length = len(range(source.example[dim])[start:end:step])
    shape, example = _resized(source, dim, length)
    piece = Node(
        f"{source.name}_{dim}_{start}_{end}",
        g.CONST if source.constant else g.MOVE,
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
    dim, rank = piece.params["dim"], len(source.shape)
    kind = source.kind
    aligned: _Targets = [(n, dim) for n in source.operands]
    if kind in (g.ACTIVATION, g.GENERIC, g.GATE):
        return aligned
    if kind in (g.LAYER_NORM, g.RMS_NORM):
        return aligned if dim < rank - source.params["dims"] else None
    if kind == g.LINEAR:
        return aligned if dim < rank - 1 else None
    if kind == g.SCALE:
        factor = source.params["factor"]
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
        if dim != rank - 2 or source.params["causal"] or source.params["mask"] is not None or source.params["grouped"]:
            return None
        return [(source.operands[0], dim)]
    if kind == g.MOVE and source.params["how"] == "permute":
        return [(source.operands[0], source.params["dims"][dim])]
    if kind == g.MOVE and source.params["how"] == "reshape":
        inner = source.operands[0]
        # Axes up to `dim` must be untouched; the target shape is rewritten below.
        if len(inner.shape) > dim and inner.shape[: dim + 1] == source.shape[: dim + 1]:
            return [(inner, dim)]
    return None


def _hoist(graph: Graph, piece: Node, source: Node) -> bool:
    dim = piece.params["dim"]
    if dim == source.batch.axis:
        return False
    targets = _plan_hoist(piece, source)
    if targets is None:
        return False
    length = piece.example[dim]
    if source.kind == g.MOVE and source.params["how"] == "reshape" and not _rewrite_reshape(source, dim, length):
        return False
    start, end, step = piece.params["start"], piece.params["end"], piece.params["step"]
    for operand, own in targets:
        source.replace(operand, _slice_of(graph, operand, own, start, end, step))
    source.shape, source.example = _resized(source, dim, length)
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
