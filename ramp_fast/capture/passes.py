"""Rewrites of a captured graph: they recognise composite operations and move token choices towards the input.

All of them keep the function that the graph computes. Their order matters: :data:`STANDARD` has them in it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ramp_fast import graph as g
from ramp_fast import params as p
from ramp_fast.capture.token_slices import hoist_slices, resized, slice_of
from ramp_fast.capture.vocabulary import bind
from ramp_fast.errors import UnsupportedModelError
from ramp_fast.graph import Graph, Node, copied, only_user

aten = torch.ops.aten


def canonicalize(graph: Graph, passes: Iterable[Callable[[Graph], None]]) -> Graph:
    """Apply the passes of a rule (:meth:`ramp_fast.rules.rule.Rule.rewrites`) in order, in place; return the graph."""
    for apply in passes:
        apply(graph)
    graph.prune()
    return graph


def refuse_log_probabilities(graph: Graph) -> None:
    """Refuse a model that averages classifiers in log space, for rules that send nothing to negative values.

    (A log_softmax at the end has been left out: the scores below are explained.)

    Raises
    ------
    UnsupportedModelError
    """
    if _log_probabilities(graph.output):
        raise UnsupportedModelError(
            "the model returns log-probabilities in another form than the log_softmax of scores: logarithms of single "
            "probabilities or of their sums or means, or multiples, sums, means or logsumexps of log-probabilities. No "
            "log-probability is positive, and this rule gives relevance to positive values only: maps would be zero or "
            "of the wrong sign. Let the model return the sum or mean of the scores below its softmax, or take a signed "
            'rule, such as "lrp-epsilon"'
        )


def _log_probabilities(node: Node) -> bool:
    """Whether a value is the logarithm of probabilities but for a constant, or made of such by positive sums."""
    if node.kind == g.SHIFT:
        return True
    if node.kind == g.ACTIVATION:
        function = node.params.function
        if function in _LOGARITHMS:
            return _probability(node.operands[0])
        return function == "log_sigmoid" or (function in _LIMITS and _log_probabilities(node.operands[0]))
    sums = _averages(node) or (node.kind == g.REDUCTION and node.target is aten.logsumexp.default)
    return sums and all(_log_probabilities(n) for n in node.sources)


def _probability(node: Node) -> bool:
    """Whether a value is a probability, a sum or mean of some, or those and a constant."""
    if node.kind == g.SOFTMAX:
        return True
    if node.kind == g.ACTIVATION:
        function = node.params.function
        return function == "sigmoid" or (function in _LIMITS and _probability(node.operands[0]))
    weighted = node.kind == g.SCALE and isinstance(node.params.factor, Node)  # of a logarithm, so they are positive
    return (weighted or _averages(node)) and all(_probability(n) for n in node.sources)


_LOGARITHMS = frozenset({"log", "log2", "log10"})
_LIMITS = frozenset({"clamp", "clamp_min", "clamp_max"})


def _averages(node: Node) -> bool:
    """Whether a value is made of its operands by moving and adding them, by positive numbers and added constants."""
    if node.kind == g.SCALE:
        return isinstance(node.params.factor, (int, float)) and node.params.factor > 0
    if node.kind == g.ADD:
        operands = zip((node.params.first, node.params.second), node.params.signs, strict=True)
        return all(sign > 0 for operand, sign in operands if isinstance(operand, Node) and not operand.constant)
    moves = node.kind == g.REARRANGE and node.params.how != "vjp"
    return bool(node.operands) and (moves or (node.kind == g.LINEAR_POOL and node.params.how in ("mean", "sum")))


def fold_batchnorm(graph: Graph) -> None:
    """BatchNorm behind a convolution or linear layer becomes part of its weights (Guillemot et al. 2020)."""
    users = graph.users()
    for node in graph.nodes:
        if node.kind != g.BATCH_NORM:
            continue
        layer = node.operands[0]
        if layer.kind in g.WEIGHTED and only_user(users, layer) is node:
            layer.params.batch_norm = node.params
            graph.replace_uses(node, layer)
    graph.prune()


def recognize_norms(graph: Graph) -> None:
    """A written-out ``(x - mean) / sqrt(var + eps) * w + b`` becomes a LayerNorm, ``x / sqrt(mean(x^2) + eps) * w`` an
    RMSNorm: functions of torch.nn.functional have one map, however they are written.

    Statistics are over any axes but the batch's; those that are not the last are moved there and back.
    """
    users = graph.users()
    for node in list(graph.nodes):
        if node.kind != g.DIV:
            continue
        found = _deviation(node.params.denominator, node.params.inverse)
        if found is None:
            continue
        variance, eps = found.variance, found.eps
        centred = _centred(node.operands[0])
        source, dims = centred or (node.operands[0], _square_mean_axes(variance, node.operands[0]))
        if not dims or (centred and not _is_variance(variance, source, dims)) or source.batch.axis in dims:
            continue
        rank = len(source.example)
        sizes = [source.example[d] for d in dims]
        if any(isinstance(source.shape[d], str) for d in dims):
            continue
        last, weight, bias = node, found.weight, None
        if weight is not None and not _fits(weight, node, dims):
            continue
        factor = None if weight is not None else _affine(users, last, g.SCALE, dims)
        if factor is not None:
            last, weight = factor
        if weight is not None:
            added = _affine(users, last, g.ADD, dims) if centred else None
            if added is not None:
                last, bias = added
        here = graph.nodes.index(last)
        order = [d for d in range(rank) if d not in dims] + dims
        norm = copied(last)
        norm.name = f"{node.name}_norm"
        before: list[Node] = []
        moved = source
        if order != list(range(rank)):
            moved = _permuted(source, order, f"{node.name}_in")
            before.append(moved)
        weight, bias = (_flat_constant(constant, sizes, norm.name, before) for constant in (weight, bias))
        norm.module, norm.operands, norm.kwargs = node.module, [moved], {}
        norm.shape, norm.example, norm.batch = moved.shape, moved.example, moved.batch
        if centred:
            norm.kind, norm.target, norm.args = g.LAYER_NORM, aten.layer_norm.default, (moved, sizes, weight, bias, eps)
            norm.params = p.LayerNorm(weight, bias, eps, len(dims))
        else:
            norm.kind, norm.target, norm.args = g.RMS_NORM, aten.rms_norm.default, (moved, sizes, weight, eps)
            norm.params = p.RmsNorm(weight, eps, len(dims))
        after = norm
        if moved is not source:
            after = _permuted(norm, [order.index(d) for d in range(rank)], f"{node.name}_out")
        graph.nodes[here + 1 : here + 1] = [*before, *dict.fromkeys((norm, after))]
        graph.replace_uses(last, after, keep=[norm, after])
        users = graph.users()
    graph.prune()


@dataclass(frozen=True)
class _Deviation:
    """``(variance + eps) ** 0.5``, and what an inverse of it was multiplied by before it is a factor."""

    variance: Node
    eps: float
    weight: Node | None


def _deviation(node: Node, inverse: bool) -> _Deviation | None:
    """What a denominator is the square root of, or a factor the inverse of one."""
    power, weight, reshaped = -1.0 if inverse else 1.0, None, False
    while True:
        if node.kind == g.ACTIVATION and (exponent := _exponent(node)) is not None:
            power *= exponent
        elif node.kind == g.REARRANGE and node.params.how in ("reshape", "expand"):
            reshaped = reshaped or node.params.how == "reshape"
        elif node.kind == g.SCALE and isinstance(node.params.factor, Node):
            if not inverse or power != -1 or weight is not None or node.params.inverse or reshaped:
                return None
            weight = node.params.factor
        elif node.kind != g.SCALE or node.params.factor != 1:
            break
        node = node.operands[0]
    if power != 0.5 or node.kind != g.ADD or len(node.operands) != 1 or node.params.signs != (1, 1):
        return None
    numbers = [n for n in (node.params.first, node.params.second) if isinstance(n, (int, float))]
    if not numbers or numbers[0] < 0:
        return None
    return _Deviation(_reshaped_from(node.operands[0]), float(numbers[0]), weight)


def _exponent(node: Node) -> float | None:
    """That of a power with a fixed exponent, as a root and a reciprocal are."""
    if node.target is aten.pow.Tensor_Scalar and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    return {"reciprocal": -1.0, "sqrt": 0.5, "rsqrt": -0.5, "square": 2.0}.get(node.params.function)


def _reshaped_from(node: Node) -> Node:
    """Statistics before axes of length one are put back."""
    while node.kind == g.REARRANGE and node.params.how == "reshape":
        node = node.operands[0]
    return node


def _mean_axes(node: Node, source: Node) -> list[int]:
    """The axes that a node is the mean of ``source`` over, none where it is not."""
    node = _reshaped_from(node)
    if (
        node.kind == g.LINEAR_POOL
        and node.params.how == "mean"
        and node.operands[0] is source
        and node.params.dims is not None
    ):
        return sorted(d % len(source.example) for d in node.params.dims)
    return []


def _centred(node: Node) -> tuple[Node, list[int]] | None:
    """``x`` and the axes of a node ``x - mean(x)``, of which the mean keeps or gets back its axes in their places."""
    if node.kind != g.ADD or node.params.signs != (1, -1) or len(node.operands) != 2:
        return None
    source, mean = node.operands
    dims = _mean_axes(mean, source)
    kept = tuple(1 if d in dims else n for d, n in enumerate(source.example))
    return (source, dims) if dims and mean.example == kept else None


def _squared(node: Node) -> Node | None:
    """``x`` of a node ``x * x``."""
    if node.kind == g.ACTIVATION and node.params.function in ("square", "pow"):
        return node.operands[0] if node.params.function == "square" or node.args[1] == 2 else None
    return node.operands[0] if node.kind == g.MUL and node.operands[0] is node.operands[1] else None


def _square_mean_axes(node: Node, source: Node) -> list[int]:
    """The axes that a node is the mean of the squares of ``source`` over, none where it is not."""
    node = _reshaped_from(node)
    square = node.operands[0] if node.kind == g.LINEAR_POOL else node
    return _mean_axes(node, square) if _squared(square) is source else []


def _is_variance(node: Node, source: Node, dims: list[int]) -> bool:
    """Whether a node is the variance of ``source`` over ``dims``: of the sample itself, without a correction."""
    if node.kind == g.REDUCTION and "var" in str(node.target):
        bound = bind(node.target, node.args, node.kwargs)
        own = sorted(d % len(source.example) for d in bound.get("dim") or [])
        plain = bound.get("correction") == 0 or bound.get("unbiased") is False
        centred = _centred(node.operands[0])
        return plain and own == dims and (node.operands[0] is source or centred == (source, dims))
    if node.kind == g.ADD and node.params.signs == (1, -1) and len(node.operands) == 2:  # E[x^2] - E[x]^2
        mean = _squared(node.operands[1])
        return (
            mean is not None
            and _mean_axes(mean, source) == dims
            and _square_mean_axes(node.operands[0], source) == dims
        )
    square = _squared(node.operands[0]) if node.kind == g.LINEAR_POOL else None
    return square is not None and _centred(square) == (source, dims) and _mean_axes(node, node.operands[0]) == dims


def _affine(users: dict[Node, list[Node]], node: Node, kind: str, dims: list[int]) -> tuple[Node, Node] | None:
    """The only reader of ``node`` and the constant of entries ``dims`` that it multiplies (adds), if it does."""
    reader = only_user(users, node)
    if reader is None or reader.kind != kind or reader.example != node.example:
        return None
    if kind == g.SCALE:
        constant = None if reader.params.inverse else reader.params.factor
    else:
        others = [n for n in reader.operands if n.constant]
        constant = others[0] if others and reader.params.signs == (1, 1) else None
    return (reader, constant) if isinstance(constant, Node) and _fits(constant, node, dims) else None


def _fits(constant: Node, node: Node, dims: list[int]) -> bool:
    """Whether a constant has an entry for every one of ``node`` along ``dims``, and one along its other axes."""
    rank = len(node.example)
    if len(constant.example) > rank or any(isinstance(n, str) for n in constant.shape):
        return False
    padded = (1,) * (rank - len(constant.example)) + constant.example
    return padded == tuple(node.example[d] if d in dims else 1 for d in range(rank))


def _flat_constant(constant: Node | None, sizes: list[int], norm: str, before: list[Node]) -> Node | None:
    """A weight or bias in the shape that functional norms take, by a node in ``before`` where it has another."""
    if constant is None or constant.example == tuple(sizes):
        return constant
    name = f"{norm}_{constant.name}"
    found = Node(name, g.CONST, aten.reshape.default, (constant, sizes), shape=tuple(sizes), example=tuple(sizes))
    found.params = p.Leaf()
    before.append(found)
    return found


def _permuted(source: Node, order: list[int], name: str) -> Node:
    return Node(
        name,
        g.REARRANGE,
        aten.permute.default,
        (source, order),
        operands=[source],
        params=p.Rearrange("permute", dims=order),
        module=source.module,
        shape=tuple(source.shape[d] for d in order),
        example=tuple(source.example[d] for d in order),
        batch=replace(source.batch, axis=order.index(source.batch.axis)),
    )


def recognize_group_norms(graph: Graph) -> None:
    """GroupNorm and InstanceNorm, written out, become one operation.

    They are LayerNorms over groups of channels, or over the places of every channel, times and plus a number for each
    channel.
    """
    users = graph.users()
    for norm in list(graph.nodes):
        if norm.kind != g.LAYER_NORM or norm.params.weight is not None or norm.params.bias is not None:
            continue
        source, last = norm.operands[0], norm
        if source.kind == g.REARRANGE and source.params.how == "reshape":
            reader = only_user(users, norm)
            back = reader is not None and reader.kind == g.REARRANGE and reader.params.how == "reshape"
            if reader is not None and back and reader.example == source.operands[0].example:
                source, last = source.operands[0], reader
        rank = len(source.example)
        if rank < 3 or not source.batch.leading or source.batch.inner != 1 or not isinstance(source.shape[1], int):
            continue
        statistics = math.prod(norm.example[: len(norm.example) - norm.params.dims])
        images, channels = source.example[:2]
        groups, rest = divmod(statistics, images)
        if rest or channels % groups:
            continue
        scaled = _affine(users, last, g.SCALE, [1])
        if scaled is None:
            continue
        last, factor = scaled
        last, summand = _affine(users, last, g.ADD, [1]) or (last, None)
        here = graph.nodes.index(last)
        before: list[Node] = []
        weight = _flat_constant(factor, [channels], norm.name, before)
        bias = _flat_constant(summand, [channels], norm.name, before)
        eps = norm.params.eps
        grouped = copied(last)
        grouped.name, grouped.module = f"{norm.name}_groups", norm.module
        grouped.operands, grouped.kwargs = [source], {}
        grouped.kind, grouped.target = g.GROUP_NORM, aten.group_norm.default
        grouped.args = (source, groups, weight, bias, eps)
        grouped.params = p.GroupNorm(weight, bias, eps, groups)
        graph.nodes[here + 1 : here + 1] = [*before, grouped]
        graph.replace_uses(last, grouped, keep=[grouped])
        users = graph.users()
    graph.prune()


def join_projections(graph: Graph) -> None:
    """Linear layers of one input by all the chunks of one weight become the layer that the chunks are of.

    nn.MultiheadAttention computes queries, keys and values at once where it is given one tensor three times, and one
    after the other where it is given that tensor under three names (detached, for example): both have one map.
    """
    groups: dict[Any, dict[int, Node]] = {}
    for node in graph.nodes:
        if node.kind != g.LINEAR or node.target is not aten.linear.default:
            continue
        weight, bias = _chunk(node.params.weight), _chunk(node.params.bias)
        if weight is None or (bias is None) != (node.params.bias is None) or (bias and bias[1] != weight[1]):
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
        joined = copied(first)
        joined.name = f"{first.name}_joined"
        joined.params = replace(first.params, weight=weights.args[0], bias=biases and biases.args[0])
        joined.args = (first.operands[0], joined.params.weight, joined.params.bias)
        joined.shape, joined.example = resized(first, axis, total)
        graph.insert_after(first, joined)
        for number, layer in layers.items():
            graph.replace_uses(layer, slice_of(graph, joined, axis, number * width, (number + 1) * width, 1))
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
    while node.kind == g.REARRANGE and len(node.operands) == 1:
        moves.append((node.target, repr(node.args[1:]), repr(node.kwargs)))
        node = node.operands[0]
    return node, *moves


def fold_channel_scales(graph: Graph) -> None:
    """LayerScale: a per-channel constant right after a linear layer belongs to its weights."""
    users = graph.users(shapes=False)
    for node in graph.nodes:
        if node.kind != g.SCALE or not isinstance(node.params.factor, Node) or node.params.inverse:
            continue
        layer, factor = node.operands[0], node.params.factor
        if layer.kind not in g.WEIGHTED or only_user(users, layer) is not node or layer.params.scale is not None:
            continue
        shape = factor.example
        channels = layer.example[-1] if layer.kind == g.LINEAR else layer.example[1]
        rank = len(layer.example)
        axis = rank - 1 if layer.kind == g.LINEAR else 1
        padded = (1,) * (rank - len(shape)) + shape
        if len(shape) <= rank and padded[axis] == channels and all(s == 1 for i, s in enumerate(padded) if i != axis):
            layer.params.scale = factor
            graph.replace_uses(node, layer)
    graph.prune()


def _through(node: Node, kinds: frozenset[str]) -> Node:
    """The nearest producer of ``node`` whose kind is not in ``kinds`` (following the first operand)."""
    while node.kind in kinds and node.operands:
        node = node.operands[0]
    return node


def recognize_attention(graph: Graph) -> None:
    """softmax(scale * Q K^T + bias) V written out becomes one attention node."""
    users = graph.users(shapes=False)
    for node in list(graph.nodes):
        if node.kind != g.MATMUL:
            continue
        probabilities, value = node.operands
        if probabilities.kind != g.SOFTMAX or only_user(users, probabilities) is not node:
            continue
        if len(node.shape) != 4 or probabilities.params.dim % 4 != 3:
            continue
        scores, scale, mask = probabilities.operands[0], 1.0, None
        by_window = _added_by_window(scores, users)
        if by_window is not None:
            probabilities, scores = by_window.split, by_window.scores
        if scores.kind == g.ADD and only_user(users, scores) is probabilities and scores.params.signs == (1, 1):
            constants = [n for n in scores.operands if n.constant]
            if len(constants) == 1 and len(scores.operands) == 2:
                mask = constants[0]
                scores = scores.sources[0]
        if scores.kind == g.SCALE and isinstance(scores.params.factor, float) and len(users[scores]) == 1:
            scale = 1 / scores.params.factor if scores.params.inverse else scores.params.factor
            scores = scores.operands[0]
        if scores.kind != g.MATMUL or len(users[scores]) != 1 or scale <= 0:
            continue
        query, transposed = scores.operands
        if transposed.kind != g.REARRANGE or transposed.params.dims != [0, 1, 3, 2]:
            continue
        key = transposed.operands[0]
        if not (query.example[:2] == key.example[:2] == value.example[:2]):
            continue
        if by_window is not None and mask is not None and mask.example[:-3] not in ((), (1,)):
            continue
        target: Any = aten.scaled_dot_product_attention.default
        if by_window is not None:
            target, mask = attention_of_windows, by_window.joined(graph, mask)
        node.kind = g.ATTENTION
        node.target, node.args = target, (query, key, value, mask, 0.0, False)
        node.kwargs = {"scale": scale}
        node.operands = [query, key, value]
        node.params = p.Attention(mask, causal=False, scale=scale, grouped=False)
    graph.prune()


@dataclass
class _ByWindow:
    """Scores [B W, H, N, M], seen as [B, W, H, N, M] by ``split`` for a constant of each window to be added."""

    scores: Node
    split: Node
    constant: Node

    def joined(self, graph: Graph, bias: Node | None) -> Node:
        """The constant and what was added to scores before it, if that is anything: [W or 1, H or 1, N, M]."""
        args = (self.constant,) if bias is None else (self.constant, bias)
        example = torch.broadcast_shapes((1, 1, 1, 1), self.constant.example[-4:], *(n.example for n in args[1:]))
        name = f"{self.split.name}_{self.constant.name}"
        found = Node(name, g.CONST, joined_bias, args, shape=tuple(example), example=tuple(example))
        found.params = p.Leaf()
        found.dtype = self.constant.dtype
        graph.insert_after(self.constant if bias is None else self.split, found)
        return found


def _added_by_window(scores: Node, users: dict[Node, list[Node]]) -> _ByWindow | None:
    """Where scores go into a softmax after a constant of each window was added, as shifted windows mask each other."""
    if scores.kind != g.REARRANGE or scores.params.how != "reshape" or len(scores.example) != 4:
        return None
    added = scores.operands[0]
    if added.kind != g.ADD or len(added.operands) != 2 or added.params.signs != (1, 1) or len(added.sources) != 1:
        return None
    split, constant = added.sources[0], next(n for n in added.operands if n.constant)
    if split.kind != g.REARRANGE or split.params.how != "reshape":
        return None
    before, windows = split.operands[0], scores.batch.inner
    alone = all(len(users[n]) == 1 for n in (scores, added, split, before))
    seen = before.example == scores.example and before.batch == scores.batch and scores.batch.leading
    seen = seen and split.batch.plain and added.example == split.example
    shape = (1,) * (5 - len(constant.example)) + constant.example
    fits = len(shape) == 5 and split.example[1:] == (windows, *scores.example[1:]) and shape[0] == 1
    fits = fits and shape[1] in (1, windows) and getattr(constant.params, "floating", True)
    return _ByWindow(before, split, constant) if alone and seen and fits else None


def joined_bias(mask: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to scores in two steps, the windows of a sample last, as one bias [W or 1, H or 1, N, M].

    What either hides is minus infinity, or a bias could bring it back over the threshold; a row that is hidden as a
    whole stays as it is, for its softmax.
    """
    mask = mask.reshape((1,) * (5 - mask.dim()) + mask.shape)[0]
    if bias is None:
        return mask
    hidden = (mask < p.MASK_BELOW) | (bias < p.MASK_BELOW)
    return (mask + bias).masked_fill(hidden & ~hidden.all(-1, keepdim=True), float("-inf"))


def attention_of_windows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    causal: bool,
    *,
    scale: float,
) -> torch.Tensor:
    """Scaled dot product attention of [B W, H, N, D] with a mask [W, H or 1, N, M]: on CPUs a sample at a time."""
    attend = aten.scaled_dot_product_attention.default
    if q.device.type != "cpu":
        whole: torch.Tensor = attend(q, k, v, mask.repeat(len(q) // len(mask), 1, 1, 1), dropout, causal, scale=scale)
        return whole
    samples = zip(*(t.split(len(mask)) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*sample, mask, dropout, causal, scale=scale) for sample in samples])


def mark_masks(graph: Graph) -> None:
    """Constants added to scores on the way into a softmax may be masks."""
    users = graph.users(shapes=False)
    for node in graph.nodes:
        current = node.operands[0] if node.kind == g.SOFTMAX else node
        while current is not node and len(users[current]) == 1 and current.kind in (g.REARRANGE, g.ADD):
            if current.kind == g.ADD:
                if len(current.sources) != 1 or current.params.signs != (1, 1):
                    break
                current.params.scores = True
            current = current.sources[0]


def assign_matmul_roles(graph: Graph) -> None:
    """Tell scores (Q K^T, on the way into a softmax) and attended values (A V) from other products."""
    soft = frozenset({g.REARRANGE, g.SCALE})
    users = graph.users(shapes=False)
    for node in graph.nodes:
        if node.kind not in (g.MATMUL, g.BILINEAR):
            continue
        node.params.role = "product"
        if any(_through(n, frozenset({g.REARRANGE})).kind == g.SOFTMAX for n in node.operands):
            node.params.role = "attend"
            continue
        current: Node | None = node
        while current is not None:
            current = only_user(users, current)
            if current is not None and current.kind == g.SOFTMAX:
                node.params.role = "scores"
            if current is None or current.kind not in soft | {g.ADD}:
                break


RECOGNITIONS = (
    recognize_norms,
    recognize_group_norms,
    join_projections,
    fold_channel_scales,
    recognize_attention,
    assign_matmul_roles,
    mark_masks,
)
"""What computes the same as a composite operation becomes one; rules that treat a token selection as moving values,
or a rotary embedding as a sum of products, need no more."""

STANDARD = (*RECOGNITIONS, hoist_slices)
"""The passes of a rule that does not say otherwise."""
