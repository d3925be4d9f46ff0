"""absLRP of weighted layers: ``c_x = 2 W+^T c`` where x > 0, ``2 W-^T c`` where x < 0."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar
from typing import Generic as GenericType

import torch
from torch import Tensor

from ramp_fast import gemm, ops, params
from ramp_fast import graph as g
from ramp_fast.graph import Node
from ramp_fast.rules.base import Flow, Operation, Values, selected
from ramp_fast.rules.masses import Massed, Masses

# Below this sums of float32 cannot overflow, whatever the rounding of the bound.
_OVERFLOW = 1e37

Pullback = TypeVar("Pullback", bound=gemm.Packed)


class Weighted(Operation, GenericType[Pullback]):
    """A layer with packed weights: a rule says how its pull-back packs them (:meth:`pack`) and what it does with them.

    Attributes
    ----------
    layer : PackedLayer
        Shared with other engines where class, :meth:`parameters` and bytes of the weights are the same.
    """

    packs = True
    layer: gemm.PackedLayer

    @property
    def forward_map(self) -> gemm.LinearOp:
        return self.layer.forward

    @property
    def pullback_map(self) -> Pullback:
        pullback: Pullback = self.layer.pullback
        return pullback

    def pack(self, constants: dict[Node, Any]) -> tuple[gemm.LinearOp, Pullback]:
        """What computes the layer, and what pulls back through it."""
        raise NotImplementedError

    def prepare(self, constants: dict[Node, Any]) -> None:
        given = self.parameters()
        references = list(g.nodes_in(given))
        if all(n.kind == g.PARAM for n in references):
            sources = tuple(n.params.tensor for n in references)
            options = repr(g.map_nodes(lambda n: references.index(n), given))
            kind = type(self), options, self.node.operands[0].example[1:], self.fusion.positive_input
            self.layer = gemm.shared_layer((*kind, self.precision), sources, lambda: self.pack(constants))
        else:  # weights that the model computes
            self.layer = gemm.PackedLayer(*self.pack(constants), ())
        self.forward_kernel = self.forward_map.kernel
        self.pullback_kernel = self.pullback_map.kernel

    def parameters(self) -> Any:
        """What is packed depends on, with nodes in the place of tensors."""
        return self.node.params

    def needs(self) -> list[Node]:
        if self.fusion.fused_norm is not None:
            return [self.fusion.fused_norm.operands[0]]
        # Where classes are added :meth:`Masses.without_rounding` asks where the input is zero.
        return [] if self.fusion.positive_input and not self.fusion.adds_classes else [self.node.operands[0]]

    @property
    def weight_bytes(self) -> int:
        return self.forward_map.nbytes + self.pullback_map.nbytes

    def effective(self, constants: dict[Node, Any]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with everything that was folded into them."""
        p = self.node.params
        weight: Tensor = constants[p.weight]
        bias: Tensor | None = constants[p.bias] if isinstance(p.bias, Node) else None
        if isinstance(p, params.Linear) and p.transposed:
            weight = weight.t()
        if p.batch_norm is not None:
            weight, bias = _fold(weight, bias, p.batch_norm, constants)
        if p.scale is not None:
            scale = constants[p.scale].flatten()
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = None if bias is None else bias * scale
        return weight, bias

    def forward(self, values: Values) -> tuple[Any, Any]:
        operands = [self.node.operands[0], *([] if self.fusion.fused_add is None else [self.fusion.fused_add])]
        forward: Callable[..., Tensor] = self.forward_map
        hides = isinstance(forward, gemm.ConvForward) and self.fusion.fused_relu is not None
        if isinstance(forward, (gemm.ConvForward, gemm.PixelForward, gemm.DepthwiseForward)) and not hides:
            known = [values.known_bound(n) for n in operands]
            if None not in known:
                self._bounded(forward, operands, values, values.bound)
        elif isinstance(forward, gemm.ConvForward):
            safe = self._bounded(forward, operands, values, values.bound) or self._bounded(
                forward, operands, values, values.measure
            )
            if not safe:
                forward = functools.partial(forward, apart=True)
        return self.by_sample(forward, 0, *(values[n] for n in operands)), None

    def _bounded(
        self,
        forward: gemm.ConvForward | gemm.PixelForward | gemm.DepthwiseForward,
        operands: list[Node],
        values: Values,
        bound: Callable[[Node], float],
    ) -> bool:
        """Whether no sum of this step can overflow: then there is no NaN, which a ReLU computed with it would hide."""
        growth, offset = forward.reach
        largest = bound(operands[0]) * growth + offset + sum(bound(n) for n in operands[1:])
        values.limit(self.node, largest)
        return largest < _OVERFLOW

    def by_sample(self, function: Callable[..., Tensor], axis: int, *operands: Tensor) -> Tensor:
        """``function(*operands)`` with samples along ``axis``, which do not show in each other's results."""
        shape = self.node.example
        rows = math.prod(shape[1:-1] if self.node.kind == g.LINEAR else shape[2:])
        return gemm.by_sample(function, rows, operands, axis) if self.node.batch.leading else function(*operands)


def affine(norm: params.BatchNorm, constants: dict[Node, Any]) -> tuple[Tensor, Tensor]:
    """Gain and shift ``[C]`` of a BatchNorm's parameters, float64 where there is one."""
    mean, var = constants[norm.mean], constants[norm.var]
    wide = torch.float32 if var.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    gain: Tensor = (var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * constants[norm.weight].to(wide)
    shift = -mean.to(wide) * gain
    return gain, shift if norm.bias is None else shift + constants[norm.bias].to(wide)


def _fold(
    weight: Tensor, bias: Tensor | None, norm: params.BatchNorm, constants: dict[Node, Any]
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer and the BatchNorm behind it together."""
    gain, shift = affine(norm, constants)
    if bias is not None:
        shift = shift + bias.to(gain.dtype) * gain
    scaled = weight.to(gain.dtype) * gain.view(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


class Linear(Weighted["gemm.Matrix | gemm.Selection"]):
    def pack(self, constants: dict[Node, Any]) -> tuple[gemm.LinearOp, gemm.Matrix | gemm.Selection]:
        weight, bias = self.effective(constants)
        # The factor 2 is exact in every binary format: it goes into the weights.
        doubled = (2 * weight).to(self.precision.pullback)
        if self.fusion.positive_input:
            return gemm.Matrix(weight, bias), gemm.Matrix(gemm.positive_part(doubled).t())
        return gemm.Matrix(weight, bias), gemm.Selection(doubled)

    def prepare(self, constants: dict[Node, Any]) -> None:
        super().prepare(constants)
        if self.fusion.positive_input:
            self.pullback_kernel += " W+"
        elif self.fusion.fused_norm is not None:
            self.pullback_kernel += " > norm"

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = conservation.centred(self.merged(parts, values, conservation), self.node.batch)
        c = part.c.to(self.precision.pullback).contiguous()
        source, norm = self.node.operands[0], self.fusion.fused_norm
        if not isinstance(self.pullback_map, gemm.Selection):
            yield Flow(source, Massed(self.by_sample(self.pullback_map, 1, c), part.target))
        elif norm is None:
            yield Flow(source, Massed(self.pullback_map(c, values[source], c.dtype), part.target))
        else:
            p = norm.params
            source = norm.operands[0]
            pulled, actual = self.pullback_map.through_norm(
                c, values[source], values[p.weight], values[p.bias], p.eps, conservation.contrast
            )
            yield Flow(source, Massed(pulled, part.target, actual))


_ConvPullback: TypeAlias = (
    gemm.PatchPullback | gemm.ConvPullback | gemm.DepthwisePullback | gemm.PatchSelection | gemm.SubpixelSelection
)


class Conv(Weighted[_ConvPullback]):
    def pack(self, constants: dict[Node, Any]) -> tuple[gemm.LinearOp, _ConvPullback]:
        weight, bias = self.effective(constants)
        p = self.node.params
        geometry = gemm.Geometry.of(p)
        size = self.node.operands[0].example[2:]
        tiles = len(size) == 2 and geometry.tiles(weight, *size)
        doubled = (2 * weight).to(self.precision.pullback)
        forward: gemm.LinearOp
        if tiles:
            forward = gemm.PatchForward(weight, bias)
        else:
            norm = self.fusion.fused_batch_norm
            folded = (weight, bias) if norm is None else _fold(weight, bias, norm.params, constants)
            forward = gemm.convolution(*folded, geometry, self.fusion.fused_relu is not None, self.node.example[2:])
        if geometry.depthwise(doubled):
            return forward, gemm.DepthwisePullback(doubled, geometry, size, self.fusion.positive_input)
        if not self.fusion.positive_input:
            if tiles or geometry.rows(doubled):
                return forward, gemm.PatchSelection(doubled)
            if gemm.SubpixelSelection.pays(doubled, geometry):
                return forward, gemm.SubpixelSelection(doubled, geometry, size)
        halves = [gemm.positive_part(doubled)]
        if not self.fusion.positive_input:
            halves.append(gemm.negative_part(doubled))
        # W+ and W- side by side, as two groups of input channels within every group.
        stacked = torch.cat(halves, 1)
        return forward, gemm.PatchPullback(stacked) if tiles else gemm.ConvPullback(stacked, geometry, size)

    def parameters(self) -> Any:
        norm = self.fusion.fused_batch_norm
        return self.node.params, norm and norm.params, self.fusion.fused_relu is not None

    def prepare(self, constants: dict[Node, Any]) -> None:
        super().prepare(constants)
        steps = {
            "batch_norm": self.fusion.fused_batch_norm,
            "add": self.fusion.fused_add,
            "relu": self.fusion.fused_relu,
        }
        self.forward_kernel += "".join(f" > {name}" for name, node in steps.items() if node is not None)
        if not isinstance(self.pullback_map, (gemm.PatchSelection, gemm.SubpixelSelection)):
            self.pullback_kernel += " W+" if self.fusion.positive_input else " W+|W-"

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = conservation.centred(self.merged(parts, values, conservation), self.node.batch)
        c = part.c.to(self.precision.pullback)
        source = self.node.operands[0]
        if isinstance(self.pullback_map, gemm.PatchSelection):
            yield Flow(source, Massed(self.pullback_map(c, values[source]), part.target))
            return
        if isinstance(self.pullback_map, gemm.DepthwisePullback):
            x = None if self.fusion.positive_input else values[source]
            yield Flow(source, Massed(self.pullback_map(c, x), part.target))
            return
        if isinstance(self.pullback_map, gemm.SubpixelSelection):
            acc = self.by_sample(self.pullback_map, 1, c)
            yield Flow(source, Massed(self.pullback_map.select(acc, values[source]), part.target))
            return
        pull = self.pullback_map

        def pulled(part: Tensor) -> Tensor:
            images: Tensor = pull(part.flatten(0, 1))
            return images.view(*part.shape[:2], *images.shape[1:])

        acc = pulled(c) if getattr(pull, "independent", False) else self.by_sample(pulled, 1, c)
        groups = self.node.params.groups
        if not self.fusion.positive_input and groups == 1 and acc.dim() == 5 and ops.cpu_kernels(acc.device):
            # One cell of one phase for every pixel: the two halves of the channels.
            cells = acc.permute(0, 1, 3, 4, 2).unflatten(-1, (1, 1, 2, -1))
            acc = ops.select_phases(cells, values[source].permute(0, 2, 3, 1), 0, 0).permute(0, 1, 4, 2, 3)
        elif not self.fusion.positive_input:
            halves = acc.unflatten(2, (groups, 2, -1))
            positive, negative = (halves[:, :, :, i].flatten(2, 3) for i in (0, 1))
            acc = selected(positive, negative, values[source])
        yield Flow(source, Massed(acc, part.target))
