"""absLRP of diagonal operations, ``c_x = factor * c``: activations, norms, scales, quotients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import ops
from ramp_fast.gemm import Precision
from ramp_fast.graph import Node
from ramp_fast.ops._common import divide
from ramp_fast.ops.activation import FUNCTIONS
from ramp_fast.rules.base import Flow, Fusion, Operation, ReadsInput, Values, fused_into, linear_gate, reduce_to
from ramp_fast.rules.gradients import gradient
from ramp_fast.rules.masses import Massed, Masses
from ramp_fast.rules.weighted import affine


class _Diagonal(Operation):
    """Keeps the factor; a subclass computes it together with the output."""

    pullback_kernel = "scale_by"

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(self.node.example, self.precision.pullback)]

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        yield Flow(self.node.operands[0], conservation.diagonal(part, kept, self.node.batch))


class Relu(Operation):
    """Activations whose output has the sign of the input or is 0: ``c_x = 2 [y > 0] c``."""

    pullback_kernel = "gate"

    def needs(self) -> list[Node]:
        return [self.node]

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        yield Flow(self.node.operands[0], conservation.gate(part, values[self.node], self.node.batch))


class FusedRelu(Operation):
    """An activation that the step below computes together with its own work."""

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        self.forward_kernel = self.pullback_kernel = fused_into(node.operands[0])

    def forward(self, values: Values) -> tuple[Any, Any]:
        return values[self.node.operands[0]], None

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        source = self.node.operands[0]
        if source.kind == g.ADD:  # which merges its readers' relevance while it splits it
            yield from (Flow(source, part) for part in parts)
        else:
            yield Flow(source, self.merged(parts, values, conservation))


class Activation(_Diagonal):
    """``c_x = [f(x) > 0] (sign(x) f'(x) + f'(|x|)) c``, and on through the BatchNorm below where that is fused."""

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        tanh = node.kwargs.get("approximate", "none") == "tanh"
        function = "gelu_tanh" if tanh else node.params.function
        self.function = function if function in FUNCTIONS else None
        self.gain: Tensor | None = None
        self.shift: Tensor | None = None
        if self.function is not None:
            self.forward_kernel = "activation_factor"
        if fusion.pulled_back_in is not None:
            self.pullback_kernel = fused_into(fusion.pulled_back_in)

    def prepare(self, constants: dict[Node, Any]) -> None:
        norm = self.fusion.fused_batch_norm
        if norm is not None:
            self.gain, self.shift = (t.to(self.precision.accumulate) for t in affine(norm.params, constants))

    def forward(self, values: Values) -> tuple[Any, Any]:
        x = values[self.node.operands[0]]
        dtype = self.precision.pullback
        if self.function is not None:
            kept = dtype if values.pulled_back else None
            y, factor = ops.activation_factor(x, self.function, kept, self.gain, self.shift)
            if self.fusion.pulled_back_in is None or kept is None:
                return y, factor
            values.leave(self.node, factor)
            return y, None
        name = self.node.params.function
        y, factor = smooth_factor(name, lambda u: values.call_at(self.node, self.node.operands[0], u), x)
        return y, factor.to(dtype)

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        norm = self.fusion.fused_batch_norm
        for flow in super().pullback(parts, values, kept, conservation):
            yield flow if norm is None else Flow(norm.operands[0], flow.contribution)


# Functions whose slope at -x is that at x: nothing is left of it below zero, where a computed difference would leave
# rounding errors of either sign.
_EVEN_SLOPE = frozenset({"sigmoid", "special_expit", "tanh", "erf", "special_erf", "atan", "arctan", "sin"})


def _logistic_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


# Slopes that autograd takes from the output, which is 1 long before the slope is 0.
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": _logistic_slope,
    "special_expit": _logistic_slope,
    "tanh": lambda x: 4 * _logistic_slope(2 * x),
}


def smooth_factor(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``[f(x) > 0] (sign(x) f'(x) + f'(|x|))`` of an ATen function; 0 where a slope is not finite."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))

    def slope(u: Tensor) -> tuple[Tensor, Tensor]:
        if name in _SLOPES:
            return function(u), _SLOPES[name](u)
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            y = function(leaf)
        return y.detach(), gradient(y, leaf, torch.ones_like(y))

    y, at_x = slope(wide)
    both = (1 + wide.sign()) * at_x if name in _EVEN_SLOPE else wide.sign() * at_x + slope(wide.abs())[1]
    factor = torch.where(y > 0, both, torch.zeros_like(y))
    return y.to(x.dtype), torch.nan_to_num(factor, nan=0.0, posinf=0.0, neginf=0.0)


class BatchNorm(_Diagonal):
    """``c_x = (sign(x) g + |g|) / sqrt(var + eps) * c``, times ``2 [y > 0]`` where a ReLU is computed with it.

    Behind a convolution that computes it as well there is only y: :func:`ramp_fast.ops.affine_pullback`.
    """

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        self.forward_kernel = "affine_factor" if fusion.fused_into is None else fused_into(fusion.fused_into)
        if fusion.fused_into is not None:
            last = fusion.pulled_back_in
            self.pullback_kernel = "affine_pullback" if last is None else fused_into(last)

    def prepare(self, constants: dict[Node, Any]) -> None:
        if self.fusion.pulled_back_in is not None:
            return
        wide = self.precision.accumulate
        self.gain, self.shift = (t.to(wide) for t in affine(self.node.params, constants))

    @functools.cached_property
    def _reach(self) -> tuple[float, float]:
        """The most that ``|x|`` can grow, and the most that is added."""
        return float(self.gain.abs().amax()), float(self.shift.abs().amax())

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return super().keeps() if self.fusion.fused_into is None else []

    def needs(self) -> list[Node]:
        return (
            [] if self.fusion.fused_into is None or self.fusion.pulled_back_in is not None else [self.fusion.fused_into]
        )

    def forward(self, values: Values) -> tuple[Any, Any]:
        x = values[self.node.operands[0]]
        if self.fusion.fused_into is not None:
            values.limit_as(self.node, self.fusion.fused_into)
            return x, None
        known = values.known_bound(self.node.operands[0])
        if known is not None:
            values.limit(self.node, known * self._reach[0] + self._reach[1])
        relu = self.fusion.fused_relu
        cap = relu.params.cap if relu is not None else math.inf
        return ops.affine_factor(x, self.gain, self.shift, relu is not None, cap, self.precision.pullback)

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        conv = self.fusion.fused_into
        if conv is None:
            yield from super().pullback(parts, values, kept, conservation)
            return
        part = self.merged(parts, values, conservation)
        yield Flow(
            conv, conservation.affine(part, values[conv], self.gain, self.shift, self.fusion.fused_relu is not None)
        )


class Scale(Operation):
    """A constant factor: ``|s| c`` for one number, ``2 |s| [s x > 0] c`` (the linear rule) for a tensor."""

    def needs(self) -> list[Node]:
        return [] if self._number else [self.node.operands[0]]

    @property
    def _number(self) -> bool:
        factor = self.node.params.factor
        return not isinstance(factor, Node) or all(s == 1 for s in factor.example)

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        factor = values[self.node.params.factor]
        source = self.node.operands[0]
        if not isinstance(factor, Tensor):
            size = 1 / abs(factor) if self.node.params.inverse else abs(factor)
            c = part.c * size
        else:
            wide = factor.to(torch.promote_types(part.c.dtype, torch.float32))
            size = wide.abs().reciprocal() if self.node.params.inverse else wide.abs()
            c = part.c * size.to(part.c.dtype)
            if not self._number:
                c = linear_gate(c, values[source] * factor)
        yield Flow(source, Massed(reduce_to(c, source_shape(values, source, c)), part.target))


def source_shape(values: Values, source: Node, c: Tensor) -> torch.Size:
    """Shape of ``source``'s value, from the coefficients' own where it is no longer held."""
    try:
        shape: torch.Size = values[source].shape
    except KeyError:
        shape = c.shape[1:]
    return shape


class SelectTokens(Relu):
    """A linear layer with weight one: relevance of non-positive entries is dropped."""


class Shift(ReadsInput):
    """``x`` minus a statistic, detached (log_softmax): the linear rule with weight one, ``2 [x > 0] c``."""

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        yield Flow(source, conservation.gate(part, values[source], source.batch))


class LayerNorm(Operation):
    """``c_x = (sign(x) w / sigma(x) + |w| / sigma(|x|)) c``, statistics detached."""

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        self.pullback_kernel = "norm_pullback" if fusion.pulled_back_in is None else fused_into(fusion.pulled_back_in)

    def needs(self) -> list[Node]:
        return [] if self.fusion.pulled_back_in is not None else [self.node.operands[0]]

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        source = self.node.operands[0]
        p = self.node.params
        x = values[source]
        weight = values[p.weight]
        part = self.merged(parts, values, conservation)
        dims = p.dims
        flat = x.flatten(-dims), part.c.flatten(-dims), None if weight is None else weight.flatten()
        c = ops.norm_pullback(flat[1], flat[0], flat[2], p.eps).view(part.c.shape)
        yield Flow(source, Massed(c, part.target))


class RmsNorm(ReadsInput):
    """``c_x = (sign(x) w + |w|) / rms(x) * c``."""

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        source = self.node.operands[0]
        p = self.node.params
        part = self.merged(parts, values, conservation)
        x = values[source].to(torch.promote_types(values[source].dtype, torch.float32))
        axes = tuple(range(-p.dims, 0))
        eps = p.eps if p.eps is not None else torch.finfo(values[source].dtype).eps
        inverse = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
        weight = values[p.weight]
        factor = (1 + x.sign()) if weight is None else weight.abs() + x.sign() * weight
        yield Flow(source, Massed(ops.scale_by(part.c, factor * inverse), part.target))


class GroupNorm(ReadsInput):
    """LayerNorm's pull-back with statistics over groups of channels."""

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        source = self.node.operands[0]
        p = self.node.params
        part = self.merged(parts, values, conservation)
        if p.groups == 1 and source.batch.plain:
            yield Flow(source, Massed(self._over_all(part.c, values[source], values[p.weight]), part.target))
            return
        x = values[source].to(torch.promote_types(values[source].dtype, torch.float32))
        grouped = x.unflatten(1, (p.groups, -1)).flatten(2)

        def inverse_sigma(u: Tensor) -> Tensor:
            inverse: Tensor = (u.var(-1, unbiased=False, keepdim=True) + p.eps).rsqrt()
            return inverse.expand_as(u).reshape(x.shape)

        shape = (-1, *[1] * (x.dim() - 2))
        weight = values[p.weight]
        gain = torch.ones((), dtype=x.dtype, device=x.device) if weight is None else weight.to(x.dtype).view(shape)
        factor = x.sign() * gain * inverse_sigma(grouped) + gain.abs() * inverse_sigma(grouped.abs())
        yield Flow(source, Massed(ops.scale_by(part.c, factor), part.target))

    def _over_all(self, c: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Of one group: a LayerNorm over a sample as it lies in memory."""
        last = x.dim() == 4 and x.stride(1) == 1
        if last:
            c, x = c.movedim(2, -1), x.movedim(1, -1)
        if weight is not None:
            pixels = math.prod(x.shape[1:]) // max(len(weight), 1)
            weight = weight.repeat(pixels) if last else weight.repeat_interleave(pixels)
        out = ops.norm_pullback(c.flatten(2), x.flatten(1), weight, self.node.params.eps).view(c.shape)
        return out.movedim(-1, 2) if last else out


class Div(Operation):
    """Division by a statistic of the images, detached: ``c_x = 2 [x d > 0] / |d| * c``.

    Or, ``inverse``, multiplication by the inverse of one: ``c_x = 2 [x d > 0] |d| c``.
    """

    def needs(self) -> list[Node]:
        return [self.node.operands[0], self.node.params.denominator]

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        x, denominator = values[source], values[self.node.params.denominator]
        size = denominator.to(torch.promote_types(denominator.dtype, torch.float32)).abs()  # masks are no numbers yet
        # What is decided by comparisons is a number, as constant factors are: no layer.
        c = part.c if self.node.params.number else linear_gate(part.c, x * denominator)
        c = c * size if self.node.params.inverse else divide(c, size.expand(c.shape[1:]).expand_as(c))
        yield Flow(source, Massed(reduce_to(c.to(part.c.dtype), x.shape), part.target))


class Generic(_Diagonal):
    """strict=False: an unknown elementwise operation under the general definition."""

    pullback_kernel = "autograd"

    def forward(self, values: Values) -> tuple[Any, Any]:
        source = self.node.operands[0]
        name = str(self.node.target).removeprefix("aten.").split(".")[0]
        y, factor = smooth_factor(name, lambda u: values.call_at(self.node, source, u), values[source])
        return y, factor.to(self.precision.pullback)
