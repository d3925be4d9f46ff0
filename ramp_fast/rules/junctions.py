"""absLRP of junctions, where relevance is shared out: sums, products, choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ramp_fast import gemm, ops
from ramp_fast import graph as g
from ramp_fast.gemm import Precision
from ramp_fast.graph import Node
from ramp_fast.params import MASK_BELOW
from ramp_fast.rules.base import (
    Flow,
    Fusion,
    Operation,
    Values,
    fused_into,
    gate,
    linear_gate,
    reduce_to,
    selected,
    vjp,
)
from ramp_fast.rules.masses import Massed, Masses, share
from ramp_fast.rules.weighted import affine


def plain_sum(node: Node) -> bool:
    """Whether ``node`` adds two tensors of the same shape."""
    a, *rest = node.operands
    same = len(rest) == 1 and a.example == rest[0].example and a.batch == rest[0].batch
    return same and not a.constant and not rest[0].constant and bool(node.params.signs == (1, 1))


def plain_product(node: Node) -> bool:
    """Whether ``node`` multiplies two different tensors of the images, of one shape, samples first."""
    if len(node.operands) != 2 or node.operands[0] is node.operands[1]:
        return False
    a, b = node.operands
    return (
        a.example == b.example == node.example
        and not (a.constant or b.constant)
        and bool(a.batch == b.batch == node.batch and node.batch.leading and len(node.example) > 1)
    )


class Add(Operation):
    """``c_a = 2 [a > 0] c``, ``c_b = 2 [b > 0] c``, each with its share; constants take theirs away."""

    pullback_kernel = "junction"

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        if fusion.fused_into is not None:
            self.forward_kernel, self.pullback_kernel = fused_into(fusion.fused_into), "residual_pullback"

    def needs(self) -> list[Node]:
        conv = self.fusion.fused_into
        if conv is not None:
            return [conv, self._operands_of(conv)[1]]
        own = [self.node] if self.fusion.fused_relu is not None else []
        return [n for n in self.node.operands if not n.constant] + own

    def _operands_of(self, conv: Node) -> tuple[Node, Node]:
        """The operand that is the BatchNorm of ``conv``, and the other one."""
        first, second = self.node.operands
        return (first, second) if conv in first.operands else (second, first)

    def forward(self, values: Values) -> tuple[Any, Any]:
        conv = self.fusion.fused_into
        if conv is not None:  # the same tensor; only the BatchNorm's is sure to be still there
            values.limit_as(self.node, conv)
            return values[self._operands_of(conv)[0]], None
        relu = self.fusion.fused_relu
        if relu is not None:
            return values.call(self.node).clamp_(0, relu.params.cap), None
        constant = self._added_to_scores(values)
        if constant is None:
            return super().forward(values)
        # What a mask hides is minus infinity from here on, or scores above 1 would bring it over the threshold.
        hidden = constant < MASK_BELOW
        hidden = hidden & ~hidden.all(-1, keepdim=True)
        return values[self.node.sources[0]] + constant.masked_fill(hidden, float("-inf")), None

    def prepare(self, constants: dict[Node, Any]) -> None:
        conv = self.fusion.fused_into
        if conv is not None:
            wide = self.precision.accumulate
            norm = self._operands_of(conv)[0]
            self.gain, self.shift = (t.to(wide) for t in affine(norm.params, constants))
        known = all(n in constants for n in self.node.operands if n.constant)
        constant = self._added_to_scores(constants) if known else None
        self.only_masks = None if constant is None else only_masks(constant)

    def _added_to_scores(self, values: Values | dict[Node, Any]) -> Tensor | None:
        """The constant, a bias or a mask, where this sum goes into a softmax."""
        if not self.node.params.scores:
            return None
        constant = next((values[n] for n in self.node.operands if n.constant), None)
        return constant if isinstance(constant, Tensor) and constant.is_floating_point() else None

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        shares = self.rule.shares
        relu = self.fusion.fused_relu is not None
        if not plain_sum(self.node):
            yield from self._general(self.merged(parts, values, conservation), values, conservation, shares)
            return
        if self.fusion.fused_into is not None:
            yield from self._through_norm(self.fusion.fused_into, parts, values, conservation)
            return
        first, second = self.node.operands
        a, b = values[first], values[second]
        rows = conservation.rows(parts[0].c, self.node.batch)
        flat_a, flat_b = rows.of(a, 0), rows.of(b, 0)
        # What goes into the branch's products is stored as they read it.
        narrow = self.precision.pullback if self.fusion.branch is second else None
        if len(parts) == 2:
            x = values[self.node]
            scales = [conservation.scale(x, p, self.node.batch) for p in parts]
            target = scales[0][1] + scales[1][1]
            c, d = (rows.of(p.c, 1) for p in parts)
            split = ops.merge_junction(
                c, scales[0][0], d, scales[1][0], flat_a, flat_b, conservation.contrast, narrow, relu
            )
        else:
            part = self.merged(parts, values, conservation)
            target = part.target
            split = ops.junction(rows.of(part.c, 1), flat_a, flat_b, conservation.contrast, narrow, relu)
        c_a, c_b, m_a, m_b = split
        like = parts[0].c
        t_a, t_b = share(target, [m_a, m_b], shares)
        yield Flow(first, Massed(rows.back(c_a, like), t_a, m_a))
        yield Flow(second, Massed(rows.back(c_b, like), t_b, m_b))

    def _through_norm(self, conv: Node, parts: list[Massed], values: Values, conservation: Masses) -> Iterator[Flow]:
        """On to the output of the convolution, past the BatchNorm."""
        other = self._operands_of(conv)[1]
        z, b = values[conv], values[other]
        second: Tensor | None = None
        scales: list[Tensor | None] = [None, None]
        if len(parts) == 2:
            scaled = [conservation.scale(z, p, self.node.batch) for p in parts]
            scales = [scale for scale, _ in scaled]
            target = scaled[0][1] + scaled[1][1]
            first, second = (conservation.channels_last(p.c, 1) for p in parts)
        else:
            part = parts[0] if len(parts) == 1 else conservation.merge(z, parts, self.node.batch)
            first, target = conservation.channels_last(part.c, 1), part.target
        c_x, c_b, m_y, m_b = ops.residual_pullback(
            first,
            scales[0],
            second,
            scales[1],
            conservation.channels_last(z, 0),
            conservation.channels_last(b, 0),
            self.gain,
            self.shift,
            conservation.contrast,
            self.precision.pullback,
        )
        t_y, t_b = share(target, [m_y, m_b], self.rule.shares)
        # Two readers have just been given their masses, of P and of N.
        yield Flow(conv, Massed(conservation.channels_first(c_x, z), t_y, centred=len(parts) == 2))
        yield Flow(other, Massed(conservation.channels_first(c_b, z), t_b, m_b))

    def _general(self, part: Massed, values: Values, conservation: Masses, shares: str) -> Iterator[Flow]:
        p = self.node.params
        constant = self._added_to_scores(values)
        if constant is not None and (only_masks(constant) if self.only_masks is None else self.only_masks):
            # A mask adds nothing to what it leaves: no junction.
            yield Flow(self.node.sources[0], Massed(part.c, part.target))
            return
        operands: list[Any] = [p.first, p.second]
        tensors = []
        for operand in operands:
            x = values[operand]
            if not isinstance(x, Tensor):
                x = part.c.new_full((), float(x))  # without a copy from the host
            elif constant is not None:
                x = x.masked_fill(x < MASK_BELOW if x is constant else x.isinf(), 0.0)
            tensors.append(x)
        whole = part.c.shape[1:]
        carries = [isinstance(operand, Node) and not operand.constant for operand in operands]
        if all(x.is_floating_point() and (x.shape == whole or not c) for x, c in zip(tensors, carries, strict=True)):
            a, b = ((x if sign > 0 else -x).expand(whole) for x, sign in zip(tensors, p.signs, strict=True))
            first, second, *masses = split_sum(part.c, a, b, self.node.batch, conservation)
            pulled = [first, second]
        else:
            pulled, masses = [], []
            for operand, x, sign, carrier in zip(operands, tensors, p.signs, carries, strict=True):
                c = linear_gate(part.c, x.expand(whole) * sign)
                c, axis = (reduce_to(c, x.shape), operand.batch) if carrier else (c, self.node.batch)
                pulled.append(c)
                masses.append(conservation.mass(x if carrier else x.expand(whole), c, axis))
        targets = share(part.target, masses, shares)
        for operand, carrier, c, target, actual in zip(operands, carries, pulled, targets, masses, strict=True):
            if carrier:
                yield Flow(operand, Massed(c, target, actual))


def split_sum(
    c: Tensor, a: Tensor, b: Tensor, axis: g.BatchAxis, conservation: Masses
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`ramp_fast.ops.junction` of ``a + b``, both of the sum's shape: coefficients and masses of both."""
    rows = conservation.rows(c, axis)
    c_a, c_b, m_a, m_b = ops.junction(rows.of(c, 1), rows.of(a, 0), rows.of(b, 0), conservation.contrast)
    return rows.back(c_a, c), rows.back(c_b, c), m_a, m_b


def only_masks(constant: Tensor) -> bool:
    """Whether what is added to scores is zero wherever it masks nothing. On a GPU this waits for the device."""
    return not bool(constant.masked_fill(constant < MASK_BELOW, 0.0).any())


class Mul(Operation):
    """``c_a = 2 |b| [a b > 0] c`` and likewise for b: both get the same relevance.

    Where one is an activation that is fused, its coefficients go on to what it reads.
    """

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        self.gates = plain_product(node)
        if self.gates:
            self.pullback_kernel = "gating_pullback"

    def needs(self) -> list[Node]:
        activation = self.fusion.fused_activation
        return [*self.node.operands, *([] if activation is None else activation.operands)]

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        first, second = self.node.operands
        a, b = values[first], values[second]
        if self.gates and ops.cpu_kernels(a.device):
            yield from self._entrywise(part, values, conservation)
            return
        gate = gate_by_channel(self.node, values)
        if gate is not None:
            yield from self._gated(part, values, conservation, gate)
            return
        rows = conservation.rows(part.c, self.node.batch)
        chosen = 2 * (a * b > 0).to(torch.promote_types(a.dtype, torch.float32))
        flows = []
        for operand, x, other in ((first, a, b), (second, b, a)):
            factor = (chosen * other.abs()).expand(part.c.shape[1:])
            own = rows.back(ops.scale_by(rows.of(part.c, 1), rows.of(factor, 0)), part.c)
            own = reduce_to(own, x.shape)
            flows.append((operand, own, conservation.mass(x, own, operand.batch)))
        targets = share(part.target, [m for _, _, m in flows], self.rule.shares)
        for (node, own, actual), target in zip(flows, targets, strict=True):
            contribution = Massed(own, target, actual)
            if node is self.fusion.fused_activation:
                contribution = conservation.diagonal(contribution, values.take(node), node.batch)
                node = node.operands[0]
            yield Flow(node, contribution)

    def _entrywise(self, part: Massed, values: Values, conservation: Masses) -> Iterator[Flow]:
        """Both operands in one pass, and the activation that one of them is."""
        source, second = self.node.operands
        activation = self.fusion.fused_activation
        if activation is second:
            source, second = second, source
        samples = [values[source], values[second]]
        if activation is not None:
            source = activation.operands[0]
            samples += [values[source], values.take(activation)]
        c, rows = conservation.in_rows(part.c, samples, self.node.batch)
        a, b, *further = rows
        x, factor = further or (None, None)
        c_a, c_b, *masses = ops.gating_pullback(c, a, b, x, factor, conservation.contrast)
        back = conservation.rows(part.c, self.node.batch).back
        # |a| c_a is |b| c_b everywhere: with an activation the first mass is that of what it reads.
        targets = share(part.target, [masses[-1]] * 2, self.rule.shares)
        for operand, own, target, actual in zip((source, second), (c_a, c_b), targets, masses, strict=True):
            yield Flow(operand, Massed(back(own, part.c), target, actual))

    def _gated(self, part: Massed, values: Values, conservation: Masses, gate: Node) -> Iterator[Flow]:
        images = next(n for n in self.node.operands if n is not gate)
        c_a, c_b, mass = conservation.product(part, values[images], values[gate])
        own = conservation.mass(values[gate], c_b, gate.batch)
        targets = share(part.target, [mass, own], self.rule.shares)
        yield Flow(images, Massed(c_a, targets[0], mass))
        yield Flow(gate, Massed(c_b.to(part.c.dtype), targets[1], own))


def gate_by_channel(node: Node, values: Values) -> Node | None:
    """Of a product of two tensors the one that is one number for a channel of images, which the other is."""
    first, second = node.operands
    a, b = values[first], values[second]
    if not (a.dim() == b.dim() == 4 and a.shape[:2] == b.shape[:2] and ops.cpu_kernels(a.device)):
        return None
    if first.constant or second.constant or not all(n.batch.plain for n in (first, second)):
        return None
    single = [n for n, x in ((first, a), (second, b)) if x.shape[2:].numel() == 1]
    return single[0] if len(single) == 1 else None


class Matmul(Operation):
    """``z = a b``: ``c_a = sign(a) (c b^T) + c |b|^T`` and likewise for b, a junction.

    With kept shares, attention's products are gated: the output of A V, the operands of Q K^T.
    """

    def needs(self) -> list[Node]:
        own = [self.node] if self._gates_output else []
        return list(self.node.operands) + own

    @property
    def _gates_output(self) -> bool:
        return bool(self.rule.gates_attention and self.node.params.role == "attend")

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        dtype = self.precision.pullback
        c = part.c.to(dtype)
        if self._gates_output:
            c = gate(c, values[self.node])
        first, second = self.node.operands
        a, b = values[first], values[second]
        only_positive = self.rule.gates_attention and self.node.params.role == "scores"
        # Of an operand that is never negative W- is zero, and none of its own entries reads the other's W-.
        only_positive = only_positive or self.fusion.positive_operand
        c_a = pull_product(c, b.mT, a, dtype, only_positive, lambda u, v: u @ v)
        c_b = pull_product(c, a.mT, b, dtype, only_positive, lambda u, v: v @ u)
        flows = [
            (first, reduce_to(c_a, a.shape)),
            (second, reduce_to(c_b, b.shape)),
        ]
        masses = [conservation.mass(values[n], own, n.batch) for n, own in flows]
        targets = share(part.target, masses, self.rule.shares)
        for (node, own), target, actual in zip(flows, targets, masses, strict=True):
            yield Flow(node, Massed(own, target, actual))


Product = Callable[[Tensor, Tensor], Tensor]


def pull_product(
    c: Tensor, other: Tensor, x: Tensor, dtype: torch.dtype, only_positive: bool, product: Product
) -> Tensor:
    """``2 (c other+)`` where ``x > 0``, ``2 (c other-)`` where ``x < 0`` (or nowhere else, ``only_positive``)."""
    if only_positive:
        return linear_gate(product(c, gemm.positive_part(other).to(dtype)), x)
    positive = product(c, (2 * gemm.positive_part(other)).to(dtype))
    return selected(positive, product(c, (2 * gemm.negative_part(other)).to(dtype)), x)


class Bilinear(Operation):
    """``z = B(a, b)``, linear in both: ``c_a = sign(a) B(., b)^T c + |B|(., |b|)^T c`` and likewise for b, a junction.

    Gates are those of :class:`Matmul`.
    """

    pullback_kernel = "autograd"

    def needs(self) -> list[Node]:
        gated = self.rule.gates_attention and self.node.params.role == "attend"
        return [*self.node.operands, *([self.node] if gated else [])]

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        gated, role = self.rule.gates_attention, self.node.params.role
        c = part.c.to(self.precision.accumulate)
        if gated and role == "attend":
            c = gate(c, values[self.node])
        node, (first, second) = self.node, self.node.operands
        a, b = values[first].to(c.dtype), values[second].to(c.dtype)

        def product(u: Tensor, v: Tensor, absolute: bool) -> Tensor:
            given = iter((u, v))

            def value(n: Node) -> Any:
                if n is first or n is second:  # in this order, also where they are one tensor
                    return next(given)
                constant = values[n].to(c.dtype)
                return constant.abs() if absolute else constant

            y: Tensor = node.target(*g.map_nodes(value, node.args), **g.map_nodes(value, node.kwargs))
            return y

        def pull(x: Tensor, product: Callable[[Tensor, bool], Tensor]) -> Tensor:
            signed = vjp(lambda u: product(u, False), tuple(x.shape), c)
            absolute = vjp(lambda u: product(u, True), tuple(x.shape), c)
            return gate(signed + absolute, x) if gated and role == "scores" else x.sign() * signed + absolute

        own = [
            pull(a, lambda u, absolute: product(u, b.abs() if absolute else b, absolute)),
            pull(b, lambda u, absolute: product(a.abs() if absolute else a, u, absolute)),
        ]
        masses = [conservation.mass(x, o, n.batch) for x, o, n in zip((a, b), own, self.node.operands, strict=True)]
        targets = share(part.target, masses, self.rule.shares)
        for node, o, target, actual in zip(self.node.operands, own, targets, masses, strict=True):
            yield Flow(node, Massed(o.to(part.c.dtype), target, actual))


class Choice(Operation):
    """Every entry is one of two operands' (maximum, minimum, where): ``c`` goes to the one chosen.

    Half goes to each of two equal ones.
    """

    pullback_kernel = "autograd"

    def needs(self) -> list[Node]:
        return [n for n in dict.fromkeys(self.node.references()) if not n.constant]

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        c = part.c.to(self.precision.accumulate)
        flows = []
        for operand in self.node.sources:
            own = vjp(partial(values.call_at, self.node, operand), values[operand], c).to(part.c.dtype)
            flows.append((operand, own, conservation.mass(values[operand], own, operand.batch)))
        # What a constant wins is no part of the images: as with clamp, the others keep the mass.
        targets = share(part.target, [m for _, _, m in flows], self.rule.shares) if len(flows) > 1 else [part.target]
        for (operand, own, actual), target in zip(flows, targets, strict=True):
            yield Flow(operand, Massed(own, target, actual))
