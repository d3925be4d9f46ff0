"""Relevance without divisions, after Relative LRP (docs/signed-rules.md).

A layer multiplies relevance by its outputs, so that it grows by orders of magnitude from layer to layer. A constant per
map and layer changes no map that is scaled to a maximum of 1, but branches of a sum must have the same one. So
coefficients go back as ``2**exponent * c``, with an exponent for every map and sample, and are brought to the same
exponent where branches meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import ops
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.gemm import Precision
from ramp_fast.graph import BatchAxis, Graph, Node
from ramp_fast.ops._common import divide
from ramp_fast.rules.base import Flow, Fusion, Operation, Values
from ramp_fast.rules.conservation import Conservation, Contribution
from ramp_fast.rules.layer_rules import Epsilon, Layer, LayerContext, LayerPullback, LayerRule
from ramp_fast.rules.rule import Rule
from ramp_fast.rules.signed import Linear, MapLayer, Signed, layer_kind

_LEADING = BatchAxis()
_NONE = -(2**30)  # the exponent of zeros: any other is larger


@dataclass
class Scaled(Contribution):
    """``2**exponent * c``.

    Attributes
    ----------
    c : Tensor
        Coefficients ``[maps, *shape]``.
    exponent : Tensor
        int32 ``[maps, B]``.
    axis : BatchAxis
        Where the samples of ``c`` are, once that was told.
    """

    exponent: Tensor
    axis: BatchAxis = _LEADING

    def moved(self, c: Tensor, *, copies: bool = False) -> Scaled:
        """As :meth:`Contribution.moved`."""
        return Scaled(c, self.exponent)


class Exponents(Conservation):
    """Coefficients with exponents; maps have a largest absolute value of 1."""

    def begin(self, c: Tensor) -> Scaled:
        """As :meth:`Conservation.begin`."""
        return Scaled(c, torch.zeros(c.shape[:2], dtype=torch.int32, device=c.device))

    def scaled(self, part: Scaled, axis: BatchAxis) -> Scaled:
        """The same with the largest coefficient of every map and sample between 1/2 and 1, to a power of two."""
        lead = 1 + axis.axis
        rows = part.c.unflatten(lead, (axis.outer, self.batch, axis.inner)).movedim(lead + 1, 1)
        within = tuple(range(2, rows.dim()))
        largest = torch.maximum(rows.amax(within), -rows.amin(within))  # no copy of absolute values
        usable = (largest > 0) & largest.isfinite()
        shift = torch.where(usable, torch.frexp(largest.to(_wide(largest))).exponent, 0)
        exponent = torch.where(largest == 0, _NONE, part.exponent + shift)
        return Scaled(_times_power(part.c, -shift, axis), exponent, axis)

    def aligned(self, parts: Sequence[Any]) -> list[Any]:
        """As :meth:`Conservation.aligned`: all of them with the largest of their exponents."""
        exponent = torch.stack([part.exponent for part in parts]).amax(0)
        return [
            Scaled(_times_power(part.c, part.exponent - exponent, part.axis), exponent, part.axis) for part in parts
        ]

    def merge(self, x: Tensor, parts: Sequence[Any], axis: BatchAxis) -> Scaled:
        """As :meth:`Conservation.merge`."""
        first, *others = self.aligned([self.scaled(part, axis) for part in parts])
        total: Scaled = first.moved(sum((part.c for part in others), first.c))
        return total

    def exact(self, x: Tensor, part: Any, axis: BatchAxis) -> Scaled:
        """As :meth:`Conservation.exact`."""
        return self.scaled(part, axis)

    def within(
        self, x: Tensor, part: Any, axis: BatchAxis, dtype: torch.dtype, relevance: Callable[..., Tensor]
    ) -> Tensor:
        """As :meth:`Conservation.within`, scaled to a largest absolute value of 1, in inner layers too."""
        maps = relevance(self.scaled(part, axis).c.to(dtype), x.to(dtype))
        samples = axis.samples_first(maps, self.batch)
        largest = samples.abs().flatten(2).amax(2).view(*samples.shape[:2], *[1] * (samples.dim() - 2))
        return axis.samples_back(samples / torch.where(largest > 0, largest, 1))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _times_power(c: Tensor, power: Tensor, axis: BatchAxis) -> Tensor:
    """``2**power c``, of powers ``[maps, B]`` and samples along ``axis`` of every map; exact, but for underflow."""
    power = power.clamp(-200, 126)  # no infinity, which would make NaN of zeros
    factor = torch.ldexp(torch.ones_like(power, dtype=_wide(c)), power).to(c.dtype)
    along = factor[:, None, :, None].expand(-1, axis.outer, -1, axis.inner).flatten(1)
    return c * along.view(len(c), *[1] * axis.axis, -1, *[1] * (c.dim() - axis.axis - 2))


@dataclass(frozen=True)
class Undivided(Signed):
    """``R_i = x_i sum_j w_ij R_j`` in layers, without a division: a reading of Relative LRP.

    It was made from the abstract of Nyiri and Gibaru 2025 (arXiv 2501.14322), not from the paper's equations.
    Activations and max-pools hand on relevance, BatchNorm is folded, terms of sums and averages get their shares.
    Every map is scaled to a largest absolute value of 1, under ``normalize="none"`` as well.

    Raises
    ------
    UnsupportedModelError
        By :class:`ramp_fast.Engine`, for networks with attention, products of features, or norms other than BatchNorm,
        of which the method says nothing.
    """

    conservation: ClassVar[type[Conservation]] = Exponents
    seeds_are_coefficients: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What Engine takes."""
        return "lrp-undivided"

    def check_balance(self) -> None:
        """As :meth:`ramp_fast.rules.Rule.check_balance`: relevance grows from layer to layer."""
        raise InputError("check_conservation: lrp-undivided multiplies relevance by the outputs of layers")

    def for_graph(self, graph: Graph) -> Rule:
        """As :meth:`ramp_fast.rules.Rule.for_graph`."""
        return _WithHead(graph.output) if layer_kind(graph.output) is not None else self

    def start(self, seed: Tensor, logits: Tensor) -> Tensor:
        """Coefficients of logits whose relevance is the seed."""
        return divide(seed, logits.expand(seed.shape))

    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        """As :meth:`ramp_fast.rules.signed.Signed.layer_rule`."""
        return _OutputTimes()

    def operation(self, node: Node, precision: Precision, fusion: Fusion) -> Operation:
        """As :meth:`ramp_fast.rules.Rule.operation`."""
        if node.kind in _UNDEFINED:
            raise UnsupportedModelError(
                f"{self.name} is for networks of layers, BatchNorm, activations, pools and sums, and has no pull-back "
                f"for {node.kind}; take lrp-epsilon or attnlrp"
            )
        if layer_kind(node) is not None:
            kind = _Layer if node.kind in g.WEIGHTED else _MapLayer
            return kind(node, precision, fusion, self)
        return super().operation(node, precision, fusion)


@dataclass(frozen=True)
class _WithHead(Undivided):
    """For networks that end in a layer, which reads relevance: nothing is divided by the logits."""

    head: Node

    def start(self, seed: Tensor, logits: Tensor) -> Tensor:
        return seed

    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        return Epsilon(0.0) if node is self.head else super().layer_rule(node, first)


_PRODUCTS = frozenset({g.ATTENTION, g.SOFTMAX, g.MATMUL, g.MUL, g.BILINEAR})
_UNDEFINED = _PRODUCTS | {g.DIV, g.SHIFT, g.REDUCTION, g.LAYER_NORM, g.RMS_NORM, g.GROUP_NORM}


@dataclass(frozen=True)
class _OutputTimes(LayerRule):
    """``R = z c``, ``c_x = W^T R``."""

    multiplies_output: ClassVar[bool] = True

    def pack(self, layer: Layer) -> LayerPullback:
        return _TimesOutput(layer)


class _TimesOutput(LayerPullback):
    """With weights of a largest absolute value between 1/2 and 1: times the outputs others can overflow, or be lost.

    Attributes
    ----------
    exponent : int
        Of the power of two that what is returned lacks.
    """

    kernel = "undivided"

    def __init__(self, layer: Layer) -> None:
        largest = float(layer.weight.abs().max()) if layer.weight.numel() else 0.0
        exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
        self.exponent = min(max(exponent, -126), 126)  # for the factor to be a number of every dtype
        super().__init__(layer.transposed(layer.weight * 2.0**-self.exponent))

    def __call__(self, at: LayerContext) -> Tensor:
        return at.transposed(self.functions[0], ops.scale_by(at.coefficients(), at.z))


class _Layer(Linear):
    """A layer, whose coefficients are brought to a common size before they are multiplied by its outputs."""

    def merged(self, parts: list[Any], values: Values, conservation: Any) -> Any:
        return conservation.scaled(super().merged(parts, values, conservation), self.node.batch)

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        lacking: int = getattr(self.pullback_map, "exponent", 0)  # of the head nothing
        for flow in super().pullback(parts, values, kept, conservation):
            part = cast("Scaled", flow.contribution)
            exponent = torch.where(part.exponent == _NONE, _NONE, part.exponent + lacking)
            yield flow._replace(contribution=Scaled(part.c, exponent))


class _MapLayer(_Layer, MapLayer):
    """The same for layers that are operations of their own kinds."""
