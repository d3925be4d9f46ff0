"""Operations that rearrange values: coefficients go back the same way, under every rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ramp_fast.graph import BatchAxis, Node
from ramp_fast.rules.base import Flow, Operation, Values, reduce_to, stacked_view, vjp

_Inverse = Callable[[Tensor, Node, torch.Size], Tensor]


def _reshape(c: Tensor, node: Node, shape: torch.Size) -> Tensor:
    return c.reshape(c.shape[0], *shape)


def _permute(c: Tensor, node: Node, shape: torch.Size) -> Tensor:
    dims = node.params.dims
    inverse = [0] * len(dims)
    for place, source in enumerate(dims):
        inverse[source] = place
    return c.permute(0, *(d + 1 for d in inverse))


def _slice(c: Tensor, node: Node, shape: torch.Size) -> Tensor:
    p = node.params
    full = c.new_zeros(c.shape[0], *shape)
    index: list[Any] = [slice(None)] * full.dim()
    index[p.dim + 1] = slice(p.start, p.end, p.step)
    full[tuple(index)] = c
    return full


def _select(c: Tensor, node: Node, shape: torch.Size) -> Tensor:
    full = c.new_zeros(c.shape[0], *shape)
    full.select(node.params.dim + 1, node.params.index).copy_(c)
    return full


def _expand(c: Tensor, node: Node, shape: torch.Size) -> Tensor:
    return reduce_to(c, shape)


_INVERSES: dict[str, _Inverse] = {
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "expand": _expand,
    "same": lambda c, node, shape: c,
}


class Rearrange(Operation):
    """One operand, one output: coefficients go back to where their values came from."""

    pullback_kernel = "view"

    def needs(self) -> list[Node]:
        # Masks that the images decide say again where values went.
        if self.node.params.how != "vjp":
            return []
        return [n for n in dict.fromkeys(self.node.references()) if not n.constant and n not in self.node.operands]

    def forward(self, values: Values) -> tuple[Any, Any]:
        return values.call(self.node), values[self.node.operands[0]].shape

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        node = self.node
        part = self.merged(parts, values, conservation)
        how = node.params.how
        if how == "vjp":
            source = node.operands[0]
            c = vjp(lambda u: values.call_at(node, source, u), tuple(kept), part.c)
        else:
            c = _INVERSES[how](part.c, node, kept)
        yield Flow(node.operands[0], part.moved(c, copies=how in ("expand", "vjp")))


class Decision(Operation):
    """Comparisons and signs: their slope is zero, so that relevance ends here."""

    pullback_kernel = "-"

    def forward(self, values: Values) -> tuple[Any, Any]:
        decided = values.call(self.node)
        return decided.to(self.precision.forward) if decided.is_floating_point() else decided, None

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        return iter(())


class Join(Operation):
    """cat and stack: every operand gets its part, with the mass that part carries."""

    def needs(self) -> list[Node]:
        return [self.node] if len(self.node.sources) > 1 else []

    def forward(self, values: Values) -> tuple[Any, Any]:
        sizes = [values[n].shape for n in self.node.operands]
        return values.call(self.node), sizes

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        node = self.node
        part = self.merged(parts, values, conservation)
        dim = node.params.dim
        lengths = [shape[dim] for shape in kept] if node.params.how == "cat" else None
        if len(node.sources) > 1:
            axes = [operand.batch for operand in node.operands]
            found = conservation.cut(values[node], part, node.batch, dim, lengths, axes)
        else:
            pieces = part.c.unbind(dim + 1) if lengths is None else part.c.split(lengths, dim + 1)
            found = [part.moved(piece, copies=True) for piece in pieces]
        for operand, contribution in zip(node.operands, found, strict=True):
            if not operand.constant:
                yield Flow(operand, contribution)


class Split(Operation):
    """unbind, split and chunk: the readers' parts are put together again."""

    pullback_kernel = "copy"

    def forward(self, values: Values) -> tuple[Any, Any]:
        pieces, source = values.call(self.node), values[self.node.operands[0]]
        # Coefficients are put together in the memory order of the value, so that what is below does not copy them.
        order = sorted(range(source.dim()), key=source.stride, reverse=True)
        return pieces, (source.shape, [p.shape for p in pieces], order)

    def join(self, parts: dict[int, Any], kept: Any, conservation: Any) -> Tensor:
        """Coefficients of the operand from measured parts by the number of their output."""
        shape, shapes, order = kept
        dim = self.node.params.dim + 1
        unbound = self.node.params.how == "unbind"
        if len(parts) == len(shapes):
            every = [parts[i] for i in range(len(shapes))]
            together = self._together(every, shape, conservation)
            if together is not None:
                return together
        axis = _axis_of_parts(self.node)
        pieces = {i: conservation.settled(part, axis).c for i, part in parts.items()}
        if unbound and len(pieces) == len(shapes):
            beside = stacked_view([pieces[i] for i in range(len(pieces))], dim)
            if beside is not None:
                return beside
        first: Tensor = next(iter(pieces.values()))
        dtype = first.dtype
        for piece in pieces.values():
            dtype = torch.promote_types(dtype, piece.dtype)
        back = [order.index(d) + 1 for d in range(len(shape))]
        whole = first.new_empty(first.shape[0], *(shape[d] for d in order), dtype=dtype).permute(0, *back)
        places = whole.unbind(dim) if unbound else whole.split([s[dim - 1] for s in shapes], dim)
        for i, place in enumerate(places):
            if i in pieces:
                place.copy_(pieces[i])
            else:
                place.zero_()
        return whole

    def _together(self, parts: list[Any], shape: torch.Size, conservation: Any) -> Tensor | None:
        """What makes q, k and v of one tensor, or parts of the last axis, scaled and put together in one pass."""
        p = self.node.params
        c = [part.c for part in parts]
        if any(t.shape != c[0].shape for t in c) or not _axis_of_parts(self.node).leading:
            return None
        if p.how == "unbind" and p.dim == 0 and c[0].dim() == 5:
            whole: Tensor | None = conservation.settled_together(parts, c)
            return None if whole is None else whole.permute(0, 3, 1, 4, 2, 5)
        if p.how == "unbind" or p.dim != len(shape) - 1 or len(shape) < 2:
            return None
        rows = [t.reshape(*t.shape[:2], 1, t.shape[2:-1].numel(), t.shape[-1]) for t in c]
        whole = conservation.settled_together(parts, rows)
        return None if whole is None else whole.view(len(c[0]), *shape)


def _axis_of_parts(split: Node) -> BatchAxis:
    """Where samples are in every output, unless they are split along the axis of the samples."""
    axis = split.operands[0].batch
    gone = split.params.how == "unbind" and split.params.dim < axis.axis
    return replace(axis, axis=axis.axis - gone)


class SplitOutput(Operation):
    """One output of :class:`Split`: its relevance is measured here, so that parts can be scaled and put together."""

    pullback_kernel = "mass"

    def needs(self) -> list[Node]:
        return [self.node]

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        own = self.node.batch == _axis_of_parts(self.node.operands[0])
        known = conservation.measured if own else conservation.exact  # the split knows one axis of all parts
        part = known(values[self.node], part, self.node.batch)
        yield Flow(self.node.operands[0], part, self.node.params.index)
