"""absLRP of pools, of linear maps, and of functions of several entries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ramp_fast import ops
from ramp_fast.capture.linear_maps import Exchange, OfLastRows, Term, exchange_of
from ramp_fast.gemm import Precision
from ramp_fast.graph import Node
from ramp_fast.ops.depthwise import MOST_TAPS
from ramp_fast.params import Window
from ramp_fast.rules.base import Flow, Fusion, Operation, ReadsInput, Values, vjp
from ramp_fast.rules.masses import Massed, Masses

aten = torch.ops.aten


class LinearPool(ReadsInput):
    """A linear layer with constant weights that are not negative: ``c_x = 2 [x > 0] L^T c``."""

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        x = values[source]
        p = self.node.params
        of_pixels = p.how == "mean" and sorted(p.dims) == [2, 3] and x.dim() == 4
        if of_pixels and source.batch.plain and ops.cpu_kernels(x.device):
            c = part.c.flatten(2) / math.prod(x.shape[2:])
            yield Flow(source, conservation.spread(c, part.target, x))
            return
        if p.window is not None and p.window.tiles(*x.shape[2:]):
            c = _over_windows(part.c / math.prod(p.window.size), p.window.size)
        elif p.window is not None and self._fits(x):
            yield Flow(source, Massed(self._by_kernel(part.c, x, p.window), part.target))
            return
        elif p.how == "vjp":
            c = vjp(lambda u: values.call_at(self.node, source, u), tuple(x.shape), part.c)
        else:
            c = part.c
            if not p.keepdim:
                for d in p.dims:
                    c = c.unsqueeze(d + 1)
            if p.how == "mean":
                count = 1
                for d in p.dims:
                    count *= x.shape[d]
                c = c / count
        yield Flow(source, conservation.gate(Massed(c.expand(c.shape[0], *x.shape), part.target), x, source.batch))

    def _fits(self, x: Tensor) -> bool:
        """Whether windows that overlap are for the kernel of depthwise convolutions."""
        small = max(self.node.params.window.size) <= MOST_TAPS and self.node.operands[0].batch.plain
        return small and self.precision.accumulate == torch.float32 and ops.cpu_kernels(x.device)

    def _by_kernel(self, c: Tensor, x: Tensor, window: Window) -> Tensor:
        """``2 [x > 0] L^T c`` as the transpose of a depthwise convolution with one weight."""
        if not window.counts_padding:
            ones = torch.ones(1, 1, *x.shape[2:], dtype=torch.float32, device=x.device)
            counted = torch.nn.functional.avg_pool2d(ones, window.size, window.stride, window.padding)
            c = (c / counted).to(c.dtype)
        weight = torch.zeros(2, *window.size, x.shape[1], dtype=torch.float32, device=x.device)
        weight[0] = 2 / math.prod(window.size)
        geometry = list(window.stride), list(window.padding), [1, 1], list(x.shape[2:])
        rows = c.permute(0, 1, 3, 4, 2), weight, None, x.permute(0, 2, 3, 1)
        return ops.depthwise(*rows, *geometry, True, False).permute(0, 1, 4, 2, 3)


def _over_windows(c: Tensor, window: tuple[int, int]) -> Tensor:
    """``c`` ``[T, B, C, h, w]`` at every pixel of its window, channels last where they were."""
    last = c.stride(2) == 1
    rows = c.movedim(2, -1) if last else c.unsqueeze(-1)
    rows = rows.unsqueeze(-2).unsqueeze(-4)  # [T, B, h, 1, w, 1, C] or [T, B, C, h, 1, w, 1, 1]
    spread = rows.expand(*rows.shape[:-4], window[0], rows.shape[-3], window[1], rows.shape[-1])
    spread = spread.flatten(-5, -4).flatten(-3, -2)
    return spread.movedim(-1, 2) if last else spread.squeeze(-1)


class MaxPool(Operation):
    """``c_x = unpool(c)``, or ``unpool(z c)`` in the undivided form."""

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        p = node.params
        kernel = _pair(p.kernel_size)
        stride = _pair(p.stride or kernel)
        self.window = kernel
        # Windows that lie side by side find their largest inputs again; others keep where these are.
        self.tiles = (
            len(node.example) == 4
            and stride == kernel
            and _pair(p.padding) == (0, 0)
            and _pair(p.dilation) == (1, 1)
            and all(n // k == m for n, k, m in zip(node.operands[0].example[2:], kernel, node.example[2:], strict=True))
        )
        self.pullback_kernel = "max_pool_pullback" if self.tiles else "unpool (CPU)" if self._undilated else "aten"

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [] if self.tiles else [(self.node.example, torch.int32)]

    def needs(self) -> list[Node]:
        if self.tiles:
            return [self.node.operands[0]]
        return [] if self.fusion.divided else [self.node]

    def _arguments(self) -> tuple[Any, ...]:
        p = self.node.params
        return p.kernel_size, p.stride, p.padding, p.dilation, p.ceil_mode

    def forward(self, values: Values) -> tuple[Any, Any]:
        x = values[self.node.operands[0]]
        if self.tiles:
            return torch.nn.functional.max_pool2d(x, *self._arguments()), None
        y, indices = aten.max_pool2d_with_indices.default(x, *self._arguments())
        narrow = indices.to(torch.int32) if self._unpools(x.device) else indices
        return y, (narrow, x.shape, x.is_contiguous())

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        pull = self._tiled if self.tiles else self._indexed
        yield Flow(self.node.operands[0], part.moved(pull(part.c, values, kept), copies=True))

    def _tiled(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        x = values[self.node.operands[0]].permute(0, 2, 3, 1)
        out = ops.max_pool_pullback(c.permute(0, 1, 3, 4, 2), x, *self.window, self.fusion.divided)
        return out.permute(0, 1, 4, 2, 3)

    def _indexed(self, narrow: Tensor, values: Values, kept: Any) -> Tensor:
        indices, shape, plain = kept
        wide = self.precision.accumulate
        c = narrow
        if not self.fusion.divided:
            c = c.to(wide) * values[self.node].to(wide)
        if self._unpools(c.device):
            p = self.node.params
            windows = [list(_pair(getattr(p, k) or p.kernel_size)) for k in ("kernel_size", "stride", "padding")]
            rows = c.permute(0, 1, 3, 4, 2), indices.permute(0, 2, 3, 1)
            return ops.unpool(*rows, *shape[2:], *windows).permute(0, 1, 4, 2, 3).to(narrow.dtype)
        layout = torch.contiguous_format if plain else torch.channels_last
        like = torch.empty(shape, dtype=wide, device=c.device).contiguous(memory_format=layout)
        sides = [
            aten.max_pool2d_with_indices_backward.default(
                side.contiguous(memory_format=layout), like, *self._arguments(), indices
            )
            for side in c.to(wide)
        ]
        return torch.stack(sides).to(narrow.dtype)

    @property
    def _undilated(self) -> bool:
        return _pair(self.node.params.dilation) == (1, 1) and len(self.node.example) == 4

    def _unpools(self, device: torch.device) -> bool:
        return self._undilated and ops.cpu_kernels(device)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] * 2 if isinstance(value, int) else list(value) * (2 // len(value))
    return values[0], values[1]


class LinearMap(ReadsInput):
    """A linear function with weights of both signs: ``c_x = sign(x) L^T c + |L|^T c``.

    Rows that are moved as they are (:class:`ramp_fast.capture.linear_maps.OfLastRows`) keep their coefficients. They
    and the others have below the mass that they had above.
    """

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        whole = node.target
        self.of_last_rows = whole if isinstance(whole, OfLastRows) else None
        self.function: Any = whole.function if isinstance(whole, OfLastRows) else whole

    def needs(self) -> list[Node]:
        return super().needs() + ([] if self.of_last_rows is None else [self.node])

    def prepare(self, constants: dict[Node, Any]) -> None:
        # By the shape of the operand: the transpose as a sum of terms, and where these are an exchange, that.
        self._known: dict[torch.Size, tuple[list[Term] | None, Exchange | None]] = {}

    def _constants(self, values: Values) -> list[Any]:
        wide = self.precision.accumulate
        constants = [values[n] for n in self.node.args[1:]]
        return [t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for t in constants]

    def _transpose(self, x: Tensor, values: Values) -> tuple[list[Term] | None, Exchange | None]:
        """Of the map of ``x``: terms of the rows that are not only moved."""
        if x.shape not in self._known:
            p = self.node.params
            rows = x if self.of_last_rows is None else self.of_last_rows.last(x, p.dim)
            terms = self.function.terms(rows.to(self.precision.accumulate), *self._constants(values))
            exchange = exchange_of(terms, rows.shape)
            if exchange is not None and p.first and p.dim != (1 if exchange.rows_first else 2):
                exchange = None
            self._known[x.shape] = terms, exchange
        return self._known[x.shape]

    def forward(self, values: Values) -> tuple[Any, Any]:
        x = values[self.node.operands[0]]
        _, exchange = self._transpose(x, values)
        if exchange is None or not ops.cpu_kernels(x.device):
            return super().forward(values)
        swap = exchange.rows_first
        y = ops.rotary(x.transpose(1, 2) if swap else x, exchange.stay, exchange.cross, exchange.pair)
        return y.transpose(1, 2) if swap else y, None

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        x = values[source]
        _, exchange = self._transpose(x, values)
        y = values[self.node] if self.of_last_rows is not None else None
        if exchange is not None and source.batch.plain and ops.cpu_kernels(x.device):
            yield Flow(source, self._exchanged(part, x, y, exchange, conservation))
        elif y is None:
            yield Flow(source, Massed(self._pulled(part.c, x, x, values), part.target))
        else:
            yield Flow(source, self._by_rows(part, x, y, values, conservation))

    def _exchanged(self, part: Massed, x: Tensor, y: Tensor | None, exchange: Exchange, conservation: Masses) -> Massed:
        """All of it in one operator."""
        c, stay, cross, pair, swap = part.c, *exchange
        if swap:
            c, x, y = c.transpose(2, 3), x.transpose(1, 2), None if y is None else y.transpose(1, 2)
        c, mass = ops.rotary_pullback(c, x, y, stay, cross, pair, part.target, conservation.contrast)
        return Massed(c.transpose(2, 3) if swap else c, mass, mass)

    def _by_rows(self, part: Massed, x: Tensor, y: Tensor, values: Values, conservation: Masses) -> Massed:
        """Rows that are moved, and rows that are mapped."""
        assert self.of_last_rows is not None
        dim, first, axis = self.node.params.dim, self.node.params.first, self.node.batch
        part = conservation.exact(y, part, axis)
        sizes = [first, y.shape[dim] - first]
        moved, mapped = (
            conservation.piece(part, own, c, axis)
            for own, c in zip(y.split(sizes, dim), part.c.split(sizes, dim + 1), strict=True)
        )
        pulled = self._pulled(mapped.c, self.of_last_rows.last(x, dim), x, values)
        both = [
            torch.cat([moved.c, torch.zeros_like(pulled)], dim + 1),
            torch.cat([torch.zeros_like(moved.c), pulled], dim + 1),
        ]
        return conservation.merge(x, [Massed(both[0], moved.target), Massed(both[1], mapped.target)], axis)

    def _pulled(self, narrow: Tensor, x: Tensor, whole: Tensor, values: Values) -> Tensor:
        """``sign(x) L^T c + |L|^T c`` of mapped rows ``x``, a part of the operand ``whole``."""
        function = self.function
        wide = narrow.to(self.precision.accumulate)
        terms, _ = self._transpose(whole, values)
        if terms is None:
            constants = self._constants(values)
            signed = vjp(lambda u: function(u, *constants), tuple(x.shape), wide)
            absolute = vjp(lambda u: function.absolute(u, *constants), tuple(x.shape), wide)
            pulled = x.sign() * signed + absolute
        else:
            pulled = torch.zeros((), dtype=wide.dtype, device=wide.device)
            sign = x.sign().to(wide.dtype)
            for term in terms:
                c = term.moved(narrow).to(wide.dtype)
                pulled = torch.addcmul(pulled, c, torch.addcmul(term.weight.abs(), sign, term.weight))
        return pulled.to(narrow.dtype)


class _AtPoint(ReadsInput):
    """An operation of one tensor that is differentiated where it is."""

    pullback_kernel = "autograd"

    def forward(self, values: Values) -> tuple[Any, Any]:
        return self.call(values[self.node.operands[0]], values), None

    def call(self, u: Tensor, values: Values) -> Tensor:
        y: Any = values.call_at(self.node, self.node.operands[0], u)
        result: Tensor = y[0] if isinstance(y, tuple) else y
        return result

    def pull(self, x: Tensor, c: Tensor, values: Values) -> Tensor:
        """``J(x)^T c``, 0 where a slope is not finite."""
        return torch.nan_to_num(vjp(lambda u: self.call(u, values), x, c), nan=0.0, posinf=0.0, neginf=0.0)


class MaxReduction(_AtPoint):
    """The largest (or smallest) of several entries, as max-pooling: ``c`` (or ``z c``) goes to the chosen one."""

    def needs(self) -> list[Node]:
        return super().needs() + ([] if self.fusion.divided else [self.node])

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        c = part.c.to(self.precision.accumulate)
        if not self.fusion.divided:
            c = c * values[self.node].to(c.dtype)
        yield Flow(source, Massed(self.pull(values[source], c, values).to(part.c.dtype), part.target))


class Reduction(_AtPoint):
    """The general definition for a function of one tensor: ``c_x = sign(x) J(x)^T c + J(|x|)^T c``."""

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        x, c = values[source], part.c.to(self.precision.accumulate)
        own = x.sign() * self.pull(x, c, values) + self.pull(x.abs(), c, values)
        yield Flow(source, Massed(own.to(part.c.dtype), part.target))
