"""absLRP, relative absolute magnitude LRP, in coefficient form.

Source: Vukadin, Afrić, Šilić, Delač, "Advancing Attribution-Based Neural Network Explainability through
Relative Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component Evaluation", ACM TIST 15(3):47,
2024, arXiv 2412.09311. ``docs/rules.md`` derives every pull-back below from the general definition

    R = N(x * d/dx <f(x) + f_abs(|x|), R/|f|>)

with ``R = |x| c``: division and multiplication cancel, and coefficients ``c`` are pulled back like gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from typing import Generic as GenericType

import torch
from torch import Tensor

from ramp_fast import gemm, ops
from ramp_fast import graph as g
from ramp_fast.graph import Node
from ramp_fast.ops._common import divide
from ramp_fast.relevance import Bookkeeping, Contribution
from ramp_fast.rules.base import Facts, Flow, Operation, Values, reduce_to, stacked_view, vjp
from ramp_fast.rules.moves import Join, Move, Part, Parts

aten = torch.ops.aten

# A constant this low added to attention scores is a mask: it is left out of softmax(|S|) as -inf is.
MASK_BELOW = -99.0


@dataclass(frozen=True)
class RelativeStabilizer:
    """A stabilizer proportional to the spread of a sample's logits.

    Parameters
    ----------
    factor : float
        The stabilizer is ``factor * std(logits)`` of each sample. Between 0.05 and 0.2 it leaves the maps'
        meaning alone and takes away most of their sensitivity to rounding (docs/rules.md, "Precision").
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"RelativeStabilizer needs a positive factor, got {self.factor}")


@dataclass(frozen=True)
class AbsLRP:
    """The absLRP rule and its options.

    Parameters
    ----------
    stabilizer : float or RelativeStabilizer
        Added to the absolute value of the logits, the only division of the rule. 1e-9 as published.
    shares : {"kept", "equal"}
        At a junction (residual sum, attention product) each operand keeps the share of relevance it gets
        ("kept", the rule "abslrp"), or all operands are scaled to mass 1 ("equal", "abslrp-release": the
        published package's refactored release).
    maxpool : {"auto", "divided", "undivided"}
        Max-pooling sends ``c`` ("divided") or ``z c`` ("undivided") to the largest input. "auto", as published:
        divided for networks with residual sums, undivided for the others.
    fold_batchnorm : bool
        Fold BatchNorm into the convolution before it first (Guillemot et al. 2020, arXiv 2002.11018).
    """

    stabilizer: float | RelativeStabilizer = 1e-9
    shares: str = "kept"
    maxpool: str = "auto"
    fold_batchnorm: bool = False

    def __post_init__(self) -> None:
        if self.shares not in ("kept", "equal"):
            raise ValueError(f'shares must be "kept" or "equal", got {self.shares!r}')
        if self.maxpool not in ("auto", "divided", "undivided"):
            raise ValueError(f'maxpool must be "auto", "divided" or "undivided", got {self.maxpool!r}')
        if not isinstance(self.stabilizer, RelativeStabilizer) and not float(self.stabilizer) >= 0:
            raise ValueError(f"stabilizer must not be negative, got {self.stabilizer}")

    @property
    def gates_attention(self) -> bool:
        """Whether only positive head outputs, queries and keys carry relevance."""
        return self.shares == "kept"

    def start(self, seed: Tensor, logits: Tensor) -> Tensor:
        """Coefficients at the logits, ``seed / (|logit| + stabilizer)``; ``seed`` is ``[T, B, classes]``.

        A logit of exactly zero without stabilizer gets no relevance.
        """
        size = logits.abs()
        if isinstance(self.stabilizer, RelativeStabilizer):
            size = size + self.stabilizer.factor * logits.std(-1, keepdim=True, unbiased=False)
        else:
            size = size + self.stabilizer
        return divide(seed, size.expand_as(seed))

    def finish(self, c: Tensor, images: Tensor) -> Tensor:
        """Relevance of pixels from their coefficients."""
        return images.abs() * c

    def operation(self, node: Node, facts: Facts) -> Operation:
        """The operation of ``node`` under this rule."""
        if node.kind == g.MOVE:
            return (Join if node.params["how"] in ("cat", "stack") else Move)(node, facts)
        facts.gated, facts.shares = self.gates_attention, self.shares
        if node.kind == g.ACTIVATION and node.params["how"] == "relu":
            return (Absorbed if facts.absorbed else Relu)(node, facts)
        return TABLE[node.kind](node, facts)

    def leave(self, node: Node, contribution: Contribution) -> Contribution:
        """What leaves an operation: with equal shares every operation but a move has mass 1 below it."""
        if self.shares == "equal" and node.kind not in (g.MOVE, g.PARTS, g.PART):
            contribution.target = torch.ones_like(contribution.target)
        return contribution

    def gated_output(self, node: Node) -> bool:
        """Whether relevance of non-positive outputs of ``node`` is dropped by its own pull-back."""
        if node.kind == g.ATTENTION or (node.kind in (g.MATMUL, g.BILINEAR) and node.params["role"] == "attend"):
            return self.gates_attention
        return node.kind in (g.ACTIVATION, g.GATE)


def _share(target: Tensor, masses: list[Tensor], shares: str) -> Sequence[Tensor]:
    """Target masses of a junction's operands."""
    if shares == "equal":
        return [torch.ones_like(target)] * len(masses)
    return ops.share(target, masses).unbind(0)


def _gate(c: Tensor, x: Tensor) -> Tensor:
    """``[x > 0] c``; a product because that is several times faster than ``torch.where`` in bf16."""
    return c * (x > 0).to(c.dtype)


def _selected(acc_positive: Tensor, acc_negative: Tensor, x: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=acc_positive.dtype, device=acc_positive.device)
    return torch.where(x > 0, acc_positive, torch.where(x < 0, acc_negative, zero))


# Weighted layers: c_x = 2 W+^T c where x > 0, 2 W-^T c where x < 0


Pullback = TypeVar("Pullback", bound=gemm.Packed)


class _Weighted(Operation, GenericType[Pullback]):
    maps: gemm.Maps

    @property
    def forward_map(self) -> gemm.Map:
        return self.maps.forward

    @property
    def pullback_map(self) -> Pullback:
        pullback: Pullback = self.maps.pullback
        return pullback

    def pack(self, constants: dict[Node, Any]) -> tuple[gemm.Map, Pullback]:
        raise NotImplementedError

    def prepare(self, constants: dict[Node, Any]) -> None:
        params = self.parameters()
        references = list(g.nodes_in(params))
        if all(n.kind == g.PARAM for n in references):
            sources = tuple(n.params["tensor"] for n in references)
            options = repr(g.map_nodes(lambda n: references.index(n), params))
            kind = self.node.kind, options, self.node.operands[0].example[1:], self.facts.positive_input
            self.maps = gemm.shared_maps((*kind, self.facts.precision), sources, lambda: self.pack(constants))
        else:  # weights that the model computes
            self.maps = gemm.Maps(*self.pack(constants), ())
        self.forward_kernel = self.forward_map.kernel
        self.pullback_kernel = self.pullback_map.kernel

    def parameters(self) -> Any:
        """What is packed depends on, with nodes in the place of tensors."""
        return self.node.params

    def needs(self) -> list[Node]:
        if self.facts.norm is not None:
            return [self.facts.norm.operands[0]]
        return [] if self.facts.positive_input else [self.node.operands[0]]

    @property
    def weight_bytes(self) -> int:
        return self.forward_map.nbytes + self.pullback_map.nbytes

    def effective(self, constants: dict[Node, Any]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with everything that was folded into them."""
        p = self.node.params
        weight: Tensor = constants[p["weight"]]
        bias: Tensor | None = constants[p["bias"]] if isinstance(p["bias"], Node) else None
        if p.get("transposed"):
            weight = weight.t()
        if "batch_norm" in p:
            weight, bias = _fold(weight, bias, p["batch_norm"], constants)
        if "scale" in p:
            scale = constants[p["scale"]].flatten()
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = None if bias is None else bias * scale
        return weight, bias

    def forward(self, values: Values) -> tuple[Any, Any]:
        return self.by_sample(self.forward_map, 0, values[self.node.operands[0]]), None

    def by_sample(self, function: Callable[..., Tensor], axis: int, *operands: Tensor) -> Tensor:
        """``function(*operands)`` with samples along ``axis``, which do not show in each other's results."""
        shape = self.node.example
        rows = math.prod(shape[1:-1] if self.node.kind == g.LINEAR else shape[2:])
        return gemm.by_sample(function, rows, operands, axis) if self.node.batch.leading else function(*operands)


def _affine(norm: dict[str, Any], constants: dict[Node, Any]) -> tuple[Tensor, Tensor]:
    """Gain and shift ``[C]`` of a BatchNorm's parameters, float64 where there is one."""
    p = {k: constants[v] if isinstance(v, Node) else v for k, v in norm.items()}
    wide = torch.float32 if p["var"].device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    gain = (p["var"].to(wide) + p["eps"]).rsqrt()
    if p["weight"] is not None:
        gain = gain * p["weight"].to(wide)
    shift = -p["mean"].to(wide) * gain
    return gain, shift if p["bias"] is None else shift + p["bias"].to(wide)


def _fold(
    weight: Tensor, bias: Tensor | None, norm: dict[str, Any], constants: dict[Node, Any]
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer and the BatchNorm behind it together."""
    gain, shift = _affine(norm, constants)
    if bias is not None:
        shift = shift + bias.to(gain.dtype) * gain
    scaled = weight.to(gain.dtype) * gain.view(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


class Linear(_Weighted["gemm.Matrix | gemm.Selection"]):
    def pack(self, constants: dict[Node, Any]) -> tuple[gemm.Map, gemm.Matrix | gemm.Selection]:
        weight, bias = self.effective(constants)
        # The factor 2 is exact in every binary format: it goes into the weights.
        doubled = (2 * weight).to(self.facts.precision.pullback)
        if self.facts.positive_input:
            return gemm.Matrix(weight, bias), gemm.Matrix(gemm.positive_part(doubled).t())
        return gemm.Matrix(weight, bias), gemm.Selection(doubled)

    def prepare(self, constants: dict[Node, Any]) -> None:
        super().prepare(constants)
        if self.facts.positive_input:
            self.pullback_kernel += " W+"
        elif self.facts.norm is not None:
            self.pullback_kernel += " > norm"

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = book.centred(self.merged(parts, values, book), self.node.batch)
        c = part.c.to(self.facts.precision.pullback).contiguous()
        source, norm = self.node.operands[0], self.facts.norm
        if not isinstance(self.pullback_map, gemm.Selection):
            yield Flow(source, Contribution(self.by_sample(self.pullback_map, 1, c), part.target))
        elif norm is None:
            yield Flow(source, Contribution(self.pullback_map(c, values[source], c.dtype), part.target))
        else:
            p = norm.params
            source = norm.operands[0]
            pulled, actual = self.pullback_map.through_norm(
                c, values[source], values[p["weight"]], values[p["bias"]], p["eps"], book.contrast
            )
            yield Flow(source, Contribution(pulled, part.target, actual))


class Conv(_Weighted["gemm.PatchPullback | gemm.ConvPullback | gemm.PatchSelection | gemm.PhaseSelection"]):
    def pack(
        self, constants: dict[Node, Any]
    ) -> tuple[gemm.Map, gemm.PatchPullback | gemm.ConvPullback | gemm.PatchSelection | gemm.PhaseSelection]:
        weight, bias = self.effective(constants)
        p = self.node.params
        geometry = gemm.Geometry.of(p)
        size = self.node.operands[0].example[2:]
        tiles = len(size) == 2 and geometry.tiles(weight, *size)
        doubled = (2 * weight).to(self.facts.precision.pullback)
        forward: gemm.Map
        if tiles:
            forward = gemm.PatchForward(weight, bias)
        else:
            norm = self.facts.batch_norm
            folded = (weight, bias) if norm is None else _fold(weight, bias, norm.params, constants)
            forward = gemm.convolution(*folded, geometry, self.facts.relu is not None)
        if not self.facts.positive_input:
            if tiles:
                return forward, gemm.PatchSelection(doubled)
            if gemm.PhaseSelection.pays(doubled, geometry):
                return forward, gemm.PhaseSelection(doubled, geometry, size)
        halves = [gemm.positive_part(doubled)]
        if not self.facts.positive_input:
            halves.append(gemm.negative_part(doubled))
        # W+ and W- side by side, as two groups of input channels within every group.
        stacked = torch.cat(halves, 1)
        return forward, gemm.PatchPullback(stacked) if tiles else gemm.ConvPullback(stacked, geometry, size)

    def parameters(self) -> Any:
        norm = self.facts.batch_norm
        return self.node.params, norm and norm.params, self.facts.relu is not None

    def prepare(self, constants: dict[Node, Any]) -> None:
        super().prepare(constants)
        steps = {"batch_norm": self.facts.batch_norm, "add": self.facts.addend, "relu": self.facts.relu}
        self.forward_kernel += "".join(f" > {name}" for name, node in steps.items() if node is not None)
        if not isinstance(self.pullback_map, (gemm.PatchSelection, gemm.PhaseSelection)):
            self.pullback_kernel += " W+" if self.facts.positive_input else " W+|W-"

    def forward(self, values: Values) -> tuple[Any, Any]:
        addend = [] if self.facts.addend is None else [values[self.facts.addend]]
        return self.by_sample(self.forward_map, 0, values[self.node.operands[0]], *addend), None

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = book.centred(self.merged(parts, values, book), self.node.batch)
        c = part.c.to(self.facts.precision.pullback)
        source = self.node.operands[0]
        if isinstance(self.pullback_map, gemm.PatchSelection):
            yield Flow(source, Contribution(self.pullback_map(c, values[source]), part.target))
            return
        if isinstance(self.pullback_map, gemm.PhaseSelection):
            acc = self.by_sample(self.pullback_map, 1, c)
            yield Flow(source, Contribution(self.pullback_map.select(acc, values[source]), part.target))
            return
        pull = self.pullback_map
        acc = self.by_sample(lambda part: pull(part.flatten(0, 1)).unflatten(0, part.shape[:2]), 1, c)
        if not self.facts.positive_input:
            groups = self.node.params["groups"]
            halves = acc.unflatten(2, (groups, 2, -1))
            positive, negative = (halves[:, :, :, i].flatten(2, 3) for i in (0, 1))
            acc = _selected(positive, negative, values[source])
        yield Flow(source, Contribution(acc, part.target))


# Diagonal operations: c_x = factor * c


class _Diagonal(Operation):
    """Keeps the factor; a subclass computes it together with the output."""

    pullback_kernel = "scale_by"

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(self.node.example, self.facts.precision.pullback)]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        yield Flow(self.node.operands[0], book.diagonal(part, kept, self.node.batch))


class Relu(Operation):
    """Activations whose output has the sign of the input or is 0: ``c_x = 2 [y > 0] c``."""

    pullback_kernel = "gate"

    def needs(self) -> list[Node]:
        return [self.node]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        yield Flow(self.node.operands[0], book.gate(part, values[self.node], self.node.batch))


class Absorbed(Operation):
    """An activation that the step below computes together with its own work."""

    forward_kernel = pullback_kernel = "(below)"

    def forward(self, values: Values) -> tuple[Any, Any]:
        return values[self.node.operands[0]], None

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        source = self.node.operands[0]
        if source.kind == g.ADD:  # which merges its readers' relevance while it splits it
            yield from (Flow(source, part) for part in parts)
        else:
            yield Flow(source, self.merged(parts, values, book))


class Activation(_Diagonal):
    """``c_x = [f(x) > 0] (sign(x) f'(x) + f'(|x|)) c``."""

    def __init__(self, node: Node, facts: Facts) -> None:
        super().__init__(node, facts)
        if node.params["function"] == "gelu":
            self.forward_kernel = "gelu_factor"

    def forward(self, values: Values) -> tuple[Any, Any]:
        x = values[self.node.operands[0]]
        dtype = self.facts.precision.pullback
        if self.node.params["function"] == "gelu":
            tanh = self.node.kwargs.get("approximate", "none") == "tanh"
            y, factor = ops.gelu_factor(x, tanh, dtype)
            return y, factor
        y, factor = smooth_factor(lambda u: self._function(u, values), x)
        return y, factor.to(dtype)

    def _function(self, u: Tensor, values: Values) -> Tensor:
        args = (u, *g.map_nodes(values.__getitem__, self.node.args[1:]))
        y: Tensor = self.node.target(*args, **g.map_nodes(values.__getitem__, self.node.kwargs))
        return y


def smooth_factor(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``[f(x) > 0] (sign(x) f'(x) + f'(|x|))``, slopes by autograd; 0 where a slope is not finite."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))

    def slope(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            y = function(leaf)
            (d,) = torch.autograd.grad(y.sum(), leaf)
        return y.detach(), d

    y, at_x = slope(wide)
    _, at_abs = slope(wide.abs())
    factor = torch.where(y > 0, wide.sign() * at_x + at_abs, torch.zeros_like(y))
    return y.to(x.dtype), torch.nan_to_num(factor, nan=0.0, posinf=0.0, neginf=0.0)


class BatchNorm(_Diagonal):
    """``c_x = (sign(x) g + |g|) / sqrt(var + eps) * c``, times ``2 [y > 0]`` where a ReLU is computed with it.

    Behind a convolution that computes it as well there is only y: :func:`ramp_fast.ops.affine_pullback`.
    """

    def __init__(self, node: Node, facts: Facts) -> None:
        super().__init__(node, facts)
        self.forward_kernel = "affine_factor" if facts.computed_in is None else "(below)"
        if facts.computed_in is not None:
            self.pullback_kernel = "(above)" if facts.above else "affine_pullback"

    def prepare(self, constants: dict[Node, Any]) -> None:
        if self.facts.above:
            return
        wide = self.facts.precision.accumulate
        self.gain, self.shift = (t.to(wide) for t in _affine(self.node.params, constants))

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return super().keeps() if self.facts.computed_in is None else []

    def needs(self) -> list[Node]:
        return [] if self.facts.computed_in is None or self.facts.above else [self.facts.computed_in]

    def forward(self, values: Values) -> tuple[Any, Any]:
        x = values[self.node.operands[0]]
        if self.facts.computed_in is not None:
            return x, None
        relu = self.facts.relu
        cap = relu.params["cap"] if relu is not None else math.inf
        return ops.affine_factor(x, self.gain, self.shift, relu is not None, cap, self.facts.precision.pullback)

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        conv = self.facts.computed_in
        if conv is None:
            yield from super().pullback(parts, values, kept, book)
            return
        part = self.merged(parts, values, book)
        yield Flow(conv, book.affine(part, values[conv], self.gain, self.shift, self.facts.relu is not None))


class Scale(Operation):
    """A constant factor: ``|s| c`` for one number, ``2 |s| [s x > 0] c`` (the linear rule) for a tensor."""

    def needs(self) -> list[Node]:
        return [] if self._number else [self.node.operands[0]]

    @property
    def _number(self) -> bool:
        factor = self.node.params["factor"]
        return not isinstance(factor, Node) or all(s == 1 for s in factor.example)

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        factor = values[self.node.params["factor"]]
        source = self.node.operands[0]
        if not isinstance(factor, Tensor):
            size = 1 / abs(factor) if self.node.params["inverse"] else abs(factor)
            c = part.c * size
        else:
            wide = factor.to(torch.promote_types(part.c.dtype, torch.float32))
            size = wide.abs().reciprocal() if self.node.params["inverse"] else wide.abs()
            c = part.c * size.to(part.c.dtype)
            if not self._number:
                c = 2 * _gate(c, values[source] * factor)
        yield Flow(source, Contribution(reduce_to(c, source_shape(values, source, c)), part.target))


def source_shape(values: Values, source: Node, c: Tensor) -> torch.Size:
    """Shape of ``source``'s value, from the coefficients' own where it is no longer held."""
    try:
        shape: torch.Size = values[source].shape
    except KeyError:
        shape = c.shape[1:]
    return shape


class Gate(Operation):
    """A linear layer with weight one: relevance of non-positive entries is dropped."""

    def needs(self) -> list[Node]:
        return [self.node]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        yield Flow(self.node.operands[0], book.gate(part, values[self.node], self.node.batch))


class LayerNorm(Operation):
    """``c_x = (sign(x) w / sigma(x) + |w| / sigma(|x|)) c``, statistics detached."""

    def __init__(self, node: Node, facts: Facts) -> None:
        super().__init__(node, facts)
        self.pullback_kernel = "(above)" if facts.above else "norm_pullback"

    def needs(self) -> list[Node]:
        return [] if self.facts.above else [self.node.operands[0]]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        source = self.node.operands[0]
        p = self.node.params
        x = values[source]
        weight = values[p["weight"]]
        part = self.merged(parts, values, book)
        dims = p["dims"]
        flat = x.flatten(-dims), part.c.flatten(-dims), None if weight is None else weight.flatten()
        c = ops.norm_pullback(flat[1], flat[0], flat[2], p["eps"]).view(part.c.shape)
        yield Flow(source, Contribution(c, part.target))


class RmsNorm(Operation):
    """``c_x = (sign(x) w + |w|) / rms(x) * c``."""

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        source = self.node.operands[0]
        p = self.node.params
        part = self.merged(parts, values, book)
        x = values[source].to(torch.promote_types(values[source].dtype, torch.float32))
        axes = tuple(range(-p["dims"], 0))
        eps = p["eps"] if p["eps"] is not None else torch.finfo(values[source].dtype).eps
        inverse = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
        weight = values[p["weight"]]
        factor = (1 + x.sign()) if weight is None else weight.abs() + x.sign() * weight
        yield Flow(source, Contribution(ops.scale_by(part.c, factor * inverse), part.target))


class GroupNorm(Operation):
    """LayerNorm's pull-back with statistics over groups of channels."""

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        source = self.node.operands[0]
        p = self.node.params
        part = self.merged(parts, values, book)
        x = values[source].to(torch.promote_types(values[source].dtype, torch.float32))
        grouped = x.unflatten(1, (p["groups"], -1)).flatten(2)

        def inverse_sigma(u: Tensor) -> Tensor:
            inverse: Tensor = (u.var(-1, unbiased=False, keepdim=True) + p["eps"]).rsqrt()
            return inverse.expand_as(u).reshape(x.shape)

        shape = (-1, *[1] * (x.dim() - 2))
        weight = values[p["weight"]]
        gain = torch.ones((), dtype=x.dtype, device=x.device) if weight is None else weight.to(x.dtype).view(shape)
        factor = x.sign() * gain * inverse_sigma(grouped) + gain.abs() * inverse_sigma(grouped.abs())
        yield Flow(source, Contribution(ops.scale_by(part.c, factor), part.target))


class Div(Operation):
    """Division by a statistic of the images, detached: ``c_x = 2 [x d > 0] / |d| * c``.

    Or, ``inverse``, multiplication by the inverse of one: ``c_x = 2 [x d > 0] |d| c``.
    """

    def needs(self) -> list[Node]:
        return [self.node.operands[0], self.node.params["denominator"]]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        source = self.node.operands[0]
        x, denominator = values[source], values[self.node.params["denominator"]]
        size = denominator.abs().to(torch.promote_types(denominator.dtype, torch.float32))
        scaled = (
            part.c * size
            if self.node.params["inverse"]
            else divide(part.c, size.expand(part.c.shape[1:]).expand_as(part.c))
        )
        c = 2 * _gate(scaled, x * denominator)
        yield Flow(source, Contribution(reduce_to(c.to(part.c.dtype), x.shape), part.target))


# Junctions


def plain_sum(node: Node) -> bool:
    """Whether ``node`` adds two tensors of the same shape."""
    a, *rest = node.operands
    same = len(rest) == 1 and a.example == rest[0].example and a.batch == rest[0].batch
    return same and not a.constant and not rest[0].constant and bool(node.params["signs"] == (1, 1))


class Add(Operation):
    """``c_a = 2 [a > 0] c``, ``c_b = 2 [b > 0] c``, each with its share; constants take theirs away."""

    pullback_kernel = "junction"

    def __init__(self, node: Node, facts: Facts) -> None:
        super().__init__(node, facts)
        if facts.computed_in is not None:
            self.forward_kernel, self.pullback_kernel = "(below)", "residual_pullback"

    def needs(self) -> list[Node]:
        conv = self.facts.computed_in
        if conv is not None:
            return [conv, self._operands_of(conv)[1]]
        own = [self.node] if self.facts.relu is not None else []
        return [n for n in self.node.operands if not n.constant] + own

    def _operands_of(self, conv: Node) -> tuple[Node, Node]:
        """The operand that is the BatchNorm of ``conv``, and the other one."""
        first, second = self.node.operands
        return (first, second) if conv in first.operands else (second, first)

    def forward(self, values: Values) -> tuple[Any, Any]:
        conv = self.facts.computed_in
        if conv is not None:  # the same tensor; only the BatchNorm's is sure to be still there
            return values[self._operands_of(conv)[0]], None
        relu = self.facts.relu
        if relu is not None:
            return values.call(self.node).clamp_(0, relu.params["cap"]), None
        constant = self._added_to_scores(values)
        if constant is None:
            return super().forward(values)
        # What a mask hides is minus infinity from here on, or scores above 1 would bring it over the threshold.
        hidden = constant < MASK_BELOW
        hidden = hidden & ~hidden.all(-1, keepdim=True)
        return values[self.node.sources[0]] + constant.masked_fill(hidden, float("-inf")), None

    def prepare(self, constants: dict[Node, Any]) -> None:
        conv = self.facts.computed_in
        if conv is not None:
            wide = self.facts.precision.accumulate
            norm = self._operands_of(conv)[0]
            self.gain, self.shift = (t.to(wide) for t in _affine(norm.params, constants))
        known = all(n in constants for n in self.node.operands if n.constant)
        constant = self._added_to_scores(constants) if known else None
        self.only_masks = None if constant is None else only_masks(constant)

    def _added_to_scores(self, values: Values | dict[Node, Any]) -> Tensor | None:
        """The constant, a bias or a mask, where this sum goes into a softmax."""
        if not self.node.params.get("scores"):
            return None
        constant = next((values[n] for n in self.node.operands if n.constant), None)
        return constant if isinstance(constant, Tensor) and constant.is_floating_point() else None

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        shares = self.facts.shares
        relu = self.facts.relu is not None
        if not plain_sum(self.node):
            yield from self._general(self.merged(parts, values, book), values, book, shares)
            return
        if self.facts.computed_in is not None:
            yield from self._through_norm(self.facts.computed_in, parts, values, book)
            return
        first, second = self.node.operands
        a, b = values[first], values[second]
        rows = book.rows(parts[0].c, self.node.batch)
        flat_a, flat_b = rows.of(a, 0), rows.of(b, 0)
        # What goes into the branch's products is stored as they read it.
        narrow = self.facts.precision.pullback if self.facts.branch is second else None
        if len(parts) == 2:
            x = values[self.node]
            scales = [book.scale(x, p, self.node.batch) for p in parts]
            target = scales[0][1] + scales[1][1]
            c, d = (rows.of(p.c, 1) for p in parts)
            split = ops.merge_junction(c, scales[0][0], d, scales[1][0], flat_a, flat_b, book.contrast, narrow, relu)
        else:
            part = self.merged(parts, values, book)
            target = part.target
            split = ops.junction(rows.of(part.c, 1), flat_a, flat_b, book.contrast, narrow, relu)
        c_a, c_b, m_a, m_b = split
        like = parts[0].c
        t_a, t_b = _share(target, [m_a, m_b], shares)
        yield Flow(first, Contribution(rows.back(c_a, like), t_a, m_a))
        yield Flow(second, Contribution(rows.back(c_b, like), t_b, m_b))

    def _through_norm(self, conv: Node, parts: list[Contribution], values: Values, book: Bookkeeping) -> Iterator[Flow]:
        """On to the output of the convolution, past the BatchNorm."""
        other = self._operands_of(conv)[1]
        z, b = values[conv], values[other]
        second: Tensor | None = None
        scales: list[Tensor | None] = [None, None]
        if len(parts) == 2:
            scaled = [book.scale(z, p, self.node.batch) for p in parts]
            scales = [scale for scale, _ in scaled]
            target = scaled[0][1] + scaled[1][1]
            first, second = (p.c.movedim(2, -1) for p in parts)
        else:
            part = parts[0] if len(parts) == 1 else book.merge(z, parts, self.node.batch)
            first, target = part.c.movedim(2, -1), part.target
        c_x, c_b, m_y, m_b = ops.residual_pullback(
            first,
            scales[0],
            second,
            scales[1],
            z.movedim(1, -1),
            b.movedim(1, -1),
            self.gain,
            self.shift,
            book.contrast,
            self.facts.precision.pullback,
        )
        t_y, t_b = _share(target, [m_y, m_b], self.facts.shares)
        # Two readers have just been given their masses, of P and of N.
        yield Flow(conv, Contribution(c_x.movedim(-1, 2), t_y, centred=len(parts) == 2))
        yield Flow(other, Contribution(c_b.movedim(-1, 2), t_b, m_b))

    def _general(self, part: Contribution, values: Values, book: Bookkeeping, shares: str) -> Iterator[Flow]:
        p = self.node.params
        constant = self._added_to_scores(values)
        if constant is not None and (only_masks(constant) if self.only_masks is None else self.only_masks):
            # A mask adds nothing to what it leaves: no junction.
            yield Flow(self.node.sources[0], Contribution(part.c, part.target))
            return
        flows: list[tuple[Node | None, Tensor, Tensor]] = []
        for operand, sign in zip((p["first"], p["second"]), p["signs"], strict=True):
            x = values[operand]
            if not isinstance(x, Tensor):
                x = part.c.new_full((), float(x))  # without a copy from the host
            elif constant is not None:
                x = x.masked_fill(x < MASK_BELOW if x is constant else x.isinf(), 0.0)
            full = x.expand(part.c.shape[1:])
            c = 2 * _gate(part.c, full * sign)
            if isinstance(operand, Node) and not operand.constant:
                c = reduce_to(c, x.shape)
                flows.append((operand, c, book.mass(x, c, operand.batch)))
            else:
                flows.append((None, c, book.mass(full, c, self.node.batch)))
        targets = _share(part.target, [m for _, _, m in flows], shares)
        for (node, c, actual), target in zip(flows, targets, strict=True):
            if node is not None:
                yield Flow(node, Contribution(c, target, actual))


def only_masks(constant: Tensor) -> bool:
    """Whether what is added to scores is zero wherever it masks nothing. On a GPU this waits for the device."""
    return not bool(constant.masked_fill(constant < MASK_BELOW, 0.0).any())


class Mul(Operation):
    """``c_a = 2 |b| [a b > 0] c`` and likewise for b: both get the same relevance."""

    def needs(self) -> list[Node]:
        return list(self.node.operands)

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        first, second = self.node.operands
        a, b = values[first], values[second]
        c = 2 * _gate(part.c, a * b)
        flows = []
        for operand, x, other in ((first, a, b), (second, b, a)):
            own = reduce_to(c * other.abs().to(c.dtype), x.shape)
            flows.append((operand, own, book.mass(x, own, operand.batch)))
        targets = _share(part.target, [m for _, _, m in flows], self.facts.shares)
        for (node, own, actual), target in zip(flows, targets, strict=True):
            yield Flow(node, Contribution(own, target, actual))


class Matmul(Operation):
    """``z = a b``: ``c_a = sign(a) (c b^T) + c |b|^T`` and likewise for b, a junction.

    With kept shares, attention's products are gated: the output of A V, the operands of Q K^T.
    """

    def needs(self) -> list[Node]:
        own = [self.node] if self._gates_output else []
        return list(self.node.operands) + own

    @property
    def _gates_output(self) -> bool:
        return self.facts.gated and self.node.params["role"] == "attend"

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        dtype = self.facts.precision.pullback
        c = part.c.to(dtype)
        if self._gates_output:
            c = _gate(c, values[self.node])
        first, second = self.node.operands
        a, b = values[first], values[second]
        only_positive = self.facts.gated and self.node.params["role"] == "scores"
        c_a = pull_product(c, b.mT, a, dtype, only_positive, lambda u, v: u @ v)
        c_b = pull_product(c, a.mT, b, dtype, only_positive, lambda u, v: v @ u)
        flows = [
            (first, reduce_to(c_a, a.shape)),
            (second, reduce_to(c_b, b.shape)),
        ]
        masses = [book.mass(values[n], own, n.batch) for n, own in flows]
        targets = _share(part.target, masses, self.facts.shares)
        for (node, own), target, actual in zip(flows, targets, masses, strict=True):
            yield Flow(node, Contribution(own, target, actual))


Product = Callable[[Tensor, Tensor], Tensor]


def pull_product(
    c: Tensor, other: Tensor, x: Tensor, dtype: torch.dtype, only_positive: bool, product: Product
) -> Tensor:
    """``2 (c other+)`` where ``x > 0``, ``2 (c other-)`` where ``x < 0`` (or nowhere else, ``only_positive``)."""
    positive = product(c, (2 * gemm.positive_part(other)).to(dtype))
    if only_positive:
        return _gate(positive, x)
    return _selected(positive, product(c, (2 * gemm.negative_part(other)).to(dtype)), x)


class Softmax(Operation):
    """``c_S = (sign(S) A + softmax(|S|)) c``, denominators detached."""

    pullback_kernel = "softmax_pullback"

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        source = self.node.operands[0]
        scores = values[source]
        dim = self.node.params["dim"] % scores.dim()
        c = ops.softmax_pullback(masked(scores).movedim(dim, -1), part.c.movedim(dim + 1, -1))
        yield Flow(source, Contribution(c.movedim(-1, dim + 1), part.target))


def masked(scores: Tensor) -> Tensor:
    """Scores with everything a mask has pushed far down at minus infinity."""
    return scores.masked_fill(scores < MASK_BELOW, float("-inf"))


@dataclass
class _Pulled:
    """Coefficients of attention's operands and the masses at its junctions (of A V, of Q K^T, of a bias)."""

    c_q: Tensor
    c_k: Tensor
    c_v: Tensor
    m_a: Tensor
    m_v: Tensor
    m_q: Tensor
    m_k: Tensor
    m_bias: list[Tensor] | None = None


class Attention(Operation):
    """``softmax(scale Q K^T + bias) V``: softmax and both products with their junctions, in one step."""

    def __init__(self, node: Node, facts: Facts) -> None:
        super().__init__(node, facts)
        self.pullback_kernel = "attention_pullback" if self._fused else "products"

    def prepare(self, constants: dict[Node, Any]) -> None:
        mask = constants.get(self.node.params["mask"])
        self.only_masks = None if mask is None or mask.dtype == torch.bool else only_masks(mask)

    def needs(self) -> list[Node]:
        own = [self.node] if self.facts.gated else []
        return list(self.node.operands) + own

    def forward(self, values: Values) -> tuple[Any, Any]:
        p = self.node.params
        q, k, v = (values[n] for n in self.node.operands)
        mask = values[p["mask"]] if p["mask"] is not None else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if mask is None and not p["grouped"] and gemm.flash_attends(q, k, v):
                y: Tensor = aten._scaled_dot_product_flash_attention.default(
                    q, k, v, 0.0, p["causal"], scale=p["scale"]
                )[0]
                return y
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, 0.0, p["causal"], scale=p["scale"], enable_gqa=p["grouped"]
            )

        if mask is None and q.shape[0] == k.shape[0]:
            return gemm.by_sample(attend, q.shape[-2], (q, k, v), 0), None
        return attend(q, k, v), None

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        shares = self.facts.shares
        pulled = (self._in_one_step if self._fused else self._by_products)(part.c, values, book)
        t_a, t_v = _share(part.target, [pulled.m_a, pulled.m_v], shares)
        if pulled.m_bias is not None:
            t_a = _share(t_a, pulled.m_bias, shares)[0]
        t_q, t_k = _share(t_a, [pulled.m_q, pulled.m_k], shares)
        targets, actual = [t_q, t_k, t_v], [pulled.m_q, pulled.m_k, pulled.m_v]
        flows = self._scaled([pulled.c_q, pulled.c_k, pulled.c_v], targets, actual, book)
        for node, contribution in zip(self.node.operands, flows, strict=True):
            if not node.constant:
                yield Flow(node, contribution)

    def _scaled(
        self, own: list[Tensor], targets: list[Tensor], masses: list[Tensor], book: Bookkeeping
    ) -> list[Contribution]:
        """Contributions of Q, K and V; scaled in one pass where they lie in one buffer, as a qkv layer's outputs do."""
        whole = None
        if self._fused and self.facts.shares == "kept":
            whole = stacked_view([c.movedim(-3, -2) for c in own], own[0].dim() - 2)  # [T, B, ..., N, 3, H, D]
        if whole is None or not whole.is_contiguous():
            return [Contribution(*each) for each in zip(own, targets, masses, strict=True)]
        scale, alive = ops.scale_to(torch.stack(targets), torch.stack(masses))
        scale = scale.movedim(0, -1)
        flat = whole.flatten(-2).view(whole.shape[0], book.batch, -1, 3, whole.shape[-2] * whole.shape[-1])
        parts = ops.rescale_parts(flat, scale, book.contrast).view(whole.shape).unbind(-3)
        return [Contribution(c.movedim(-2, -3), mass, mass) for c, mass in zip(parts, alive, strict=True)]

    @property
    def _fused(self) -> bool:
        """Whether one operator does it all: plain attention, samples first in every operand."""
        p = self.node.params
        q, k, v = self.node.operands
        plain = p["mask"] is None and not p["causal"] and not p["grouped"] and p["scale"] > 0
        # A constant query may be broadcast over the batch: the operator does not do that.
        fits = k.example == v.example and q.example[:-2] == k.example[:-2] and q.example[-1] == k.example[-1]
        return plain and fits and all(n.batch.leading for n in (self.node, *self.node.operands))

    def _in_one_step(self, c: Tensor, values: Values, book: Bookkeeping) -> _Pulled:
        q, k, v = (values[n] for n in self.node.operands)
        gated = self.facts.gated
        out = values[self.node] if gated else q  # only read where gated
        c = c.to(self.facts.precision.pullback)
        # Heads are all axes between the first and the last two: none, one, or heads and windows.
        between = tuple(q.shape[1:-2])
        heads = math.prod(between)
        q, k, v, out = (t.reshape(t.shape[0], heads, *t.shape[-2:]) for t in (q, k, v, out))
        c = c.reshape(*c.shape[:2], heads, *c.shape[-2:])
        *flat, masses = ops.attention_pullback(q, k, v, out, c, self.node.params["scale"], gated, book.contrast)
        c_q, c_k, c_v = (t.reshape(*t.shape[:2], *between, *t.shape[-2:]) for t in flat)
        # The windows of one sample lie side by side along the batch.
        if masses.shape[-1] != book.batch:
            masses = masses.unflatten(-1, (book.batch, -1)).sum(-1)
        return _Pulled(c_q, c_k, c_v, *masses)

    def _by_products(self, c: Tensor, values: Values, book: Bookkeeping) -> _Pulled:
        p, gated = self.node.params, self.facts.gated
        dtype = self.facts.precision.pullback
        nodes, axis = self.node.operands, self.node.batch
        q, k, v = (values[n] for n in nodes)
        heads = k.shape[1]
        if p["grouped"]:
            repeat = q.shape[1] // heads
            k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
        c = c.to(dtype)
        if gated:
            c = _gate(c, values[self.node])
        query = q * p["scale"]
        plain, bias = self._scores(query, k, values)
        scores = plain if bias is None else plain + bias
        weights = torch.nan_to_num(scores.softmax(-1))

        c_a = c @ (2 * gemm.positive_part(v)).to(dtype).mT
        c_v = self._fold(2 * _gate(weights.to(dtype).mT @ c, v), heads)
        c_s = ops.softmax_pullback(scores, c_a)
        m_bias = None
        if bias is not None:
            c_s, m_bias = self._take_bias(c_s, plain, bias, axis, book)
        c_q = pull_product(c_s, k, query, dtype, gated, lambda u, w: u @ w) * p["scale"]
        c_k = self._fold(pull_product(c_s.mT, query, k, dtype, gated, lambda u, w: u @ w), heads)
        own = ((q, c_q, nodes[0]), (values[nodes[1]], c_k, nodes[1]), (values[nodes[2]], c_v, nodes[2]))
        m_q, m_k, m_v = (book.mass(x, u, n.batch) for x, u, n in own)
        return _Pulled(c_q, c_k, c_v, book.mass(weights, c_a, axis), m_v, m_q, m_k, m_bias)

    @staticmethod
    def _fold(c: Tensor, heads: int) -> Tensor:
        """Sum the coefficients of a key or value head over the query heads that share it."""
        return c if c.shape[2] == heads else c.unflatten(2, (heads, -1)).sum(3)

    def _scores(self, query: Tensor, k: Tensor, values: Values) -> tuple[Tensor, Tensor | None]:
        """``Q K^T`` with masked entries at minus infinity, and the additive bias apart from the mask."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ k.to(wide).mT
        p = self.node.params
        if p["causal"]:
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            return scores.masked_fill(~keep, float("-inf")), None
        if p["mask"] is None:
            return scores, None
        mask = values[p["mask"]]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, float("-inf")), None
        hidden = mask < MASK_BELOW
        scores = scores.masked_fill(hidden, float("-inf"))
        if only_masks(mask) if self.only_masks is None else self.only_masks:
            # A mask adds nothing to what it leaves: no junction.
            return scores, None
        return scores, mask.masked_fill(hidden, 0.0).to(wide)

    @staticmethod
    def _take_bias(
        c: Tensor, plain: Tensor, bias: Tensor, axis: g.BatchAxis, book: Bookkeeping
    ) -> tuple[Tensor, list[Tensor]]:
        """The junction ``S = Q K^T + bias``: coefficients of the product, and the masses of both."""
        finite = plain.masked_fill(plain.isinf(), 0.0)
        own = 2 * _gate(c, finite)
        taken = 2 * _gate(c, bias)
        return own, [book.mass(finite, own, axis), book.mass(bias.expand_as(plain), taken, axis)]


# Pools and linear maps


class LinearPool(Operation):
    """A linear layer with constant weights that are not negative: ``c_x = 2 [x > 0] L^T c``."""

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        source = self.node.operands[0]
        x = values[source]
        p = self.node.params
        if p["how"] == "vjp":

            def pool(leaf: Tensor) -> Tensor:
                args = [leaf if a is source else values[a] if isinstance(a, Node) else a for a in self.node.args]
                y: Tensor = self.node.target(*args, **self.node.kwargs)
                return y

            c = vjp(pool, tuple(x.shape), part.c)
        else:
            c = part.c
            if not p["keepdim"]:
                for d in p["dims"]:
                    c = c.unsqueeze(d + 1)
            if p["how"] == "mean":
                count = 1
                for d in p["dims"]:
                    count *= x.shape[d]
                c = c / count
        yield Flow(source, book.gate(Contribution(c.expand(c.shape[0], *x.shape), part.target), x, source.batch))


class MaxPool(Operation):
    """``c_x = unpool(c)``, or ``unpool(z c)`` in the undivided form."""

    def __init__(self, node: Node, facts: Facts) -> None:
        super().__init__(node, facts)
        p = node.params
        kernel = _pair(p["kernel_size"])
        stride = _pair(p["stride"] or kernel)
        self.window = kernel
        # Windows that lie side by side find their largest inputs again; others keep where these are.
        self.tiles = (
            len(node.example) == 4
            and stride == kernel
            and _pair(p["padding"]) == (0, 0)
            and _pair(p["dilation"]) == (1, 1)
            and all(n // k == m for n, k, m in zip(node.operands[0].example[2:], kernel, node.example[2:], strict=True))
        )
        self.pullback_kernel = "max_pool_pullback" if self.tiles else "unpool (CPU)" if self._undilated else "aten"

    def keeps(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [] if self.tiles else [(self.node.example, torch.int32)]

    def needs(self) -> list[Node]:
        if self.tiles:
            return [self.node.operands[0]]
        return [] if self.facts.divided else [self.node]

    def _arguments(self) -> tuple[Any, ...]:
        p = self.node.params
        return p["kernel_size"], p["stride"], p["padding"], p["dilation"], p["ceil_mode"]

    def forward(self, values: Values) -> tuple[Any, Any]:
        x = values[self.node.operands[0]]
        if self.tiles:
            return torch.nn.functional.max_pool2d(x, *self._arguments()), None
        y, indices = aten.max_pool2d_with_indices.default(x, *self._arguments())
        narrow = indices.to(torch.int32) if self._unpools(x.device) else indices
        return y, (narrow, x.shape, x.is_contiguous())

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        pull = self._tiled if self.tiles else self._indexed
        yield Flow(self.node.operands[0], Contribution(pull(part.c, values, kept), part.target))

    def _tiled(self, c: Tensor, values: Values, kept: Any) -> Tensor:
        x = values[self.node.operands[0]].permute(0, 2, 3, 1)
        out = ops.max_pool_pullback(c.permute(0, 1, 3, 4, 2), x, *self.window, self.facts.divided)
        return out.permute(0, 1, 4, 2, 3)

    def _indexed(self, narrow: Tensor, values: Values, kept: Any) -> Tensor:
        indices, shape, plain = kept
        wide = self.facts.precision.accumulate
        c = narrow
        if not self.facts.divided:
            c = c.to(wide) * values[self.node].to(wide)
        if self._unpools(c.device):
            p = self.node.params
            windows = [list(_pair(p[k] or p["kernel_size"])) for k in ("kernel_size", "stride", "padding")]
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
        return _pair(self.node.params["dilation"]) == (1, 1) and len(self.node.example) == 4

    def _unpools(self, device: torch.device) -> bool:
        return self._undilated and ops.cpu_kernels(device)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] * 2 if isinstance(value, int) else list(value) * (2 // len(value))
    return values[0], values[1]


class LinearMap(Operation):
    """A linear function with weights of both signs: ``c_x = sign(x) L^T c + |L|^T c``."""

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        source = self.node.operands[0]
        x = values[source]
        function = self.node.target
        constants = [values[n] for n in self.node.args[1:]]
        wide = part.c.to(self.facts.precision.accumulate)
        signed = vjp(lambda u: function(u, *constants), tuple(x.shape), wide)
        absolute = vjp(lambda u: function.absolute(u, *constants), tuple(x.shape), wide)  # type: ignore[attr-defined]
        yield Flow(source, Contribution((x.sign() * signed + absolute).to(part.c.dtype), part.target))


class Bilinear(Operation):
    """``z = B(a, b)``: ``c_a = 2 B(., b+)^T c`` where ``a > 0``, ``2 B(., b-)^T c`` where ``a < 0``; likewise b.

    A junction. Gates are those of :class:`Matmul`.
    """

    pullback_kernel = "autograd"

    def needs(self) -> list[Node]:
        gated = self.facts.gated and self.node.params["role"] == "attend"
        return [*self.node.operands, *([self.node] if gated else [])]

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        gated, role = self.facts.gated, self.node.params["role"]
        c = part.c.to(self.facts.precision.accumulate)
        if gated and role == "attend":
            c = _gate(c, values[self.node])
        equation = self.node.args[0]
        a, b = (values[n].to(c.dtype) for n in self.node.operands)

        def pull(x: Tensor, other: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            positive = vjp(lambda u: product(u, gemm.positive_part(other)), tuple(x.shape), 2 * c)
            if gated and role == "scores":
                return _gate(positive, x)
            negative = vjp(lambda u: product(u, gemm.negative_part(other)), tuple(x.shape), 2 * c)
            return _selected(positive, negative, x)

        own = [
            pull(a, b, lambda u, v: torch.einsum(equation, u, v)),
            pull(b, a, lambda u, v: torch.einsum(equation, v, u)),
        ]
        masses = [book.mass(x, o, n.batch) for x, o, n in zip((a, b), own, self.node.operands, strict=True)]
        targets = _share(part.target, masses, self.facts.shares)
        for node, o, target, actual in zip(self.node.operands, own, targets, masses, strict=True):
            yield Flow(node, Contribution(o.to(part.c.dtype), target, actual))


class _AtPoint(Operation):
    """An operation of one tensor that is differentiated where it is."""

    pullback_kernel = "autograd"

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]

    def forward(self, values: Values) -> tuple[Any, Any]:
        return self.call(values[self.node.operands[0]], values), None

    def call(self, u: Tensor, values: Values) -> Tensor:
        args = (u, *g.map_nodes(values.__getitem__, self.node.args[1:]))
        y = self.node.target(*args, **g.map_nodes(values.__getitem__, self.node.kwargs))
        result: Tensor = y[0] if isinstance(y, tuple) else y
        return result

    def pull(self, x: Tensor, c: Tensor, values: Values) -> Tensor:
        """``J(x)^T c``, 0 where a slope is not finite."""
        return torch.nan_to_num(vjp(lambda u: self.call(u, values), x, c), nan=0.0, posinf=0.0, neginf=0.0)


class Extreme(_AtPoint):
    """The largest (or smallest) of several entries, as max-pooling: ``c`` (or ``z c``) goes to the chosen one."""

    def needs(self) -> list[Node]:
        return super().needs() + ([] if self.facts.divided else [self.node])

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        source = self.node.operands[0]
        c = part.c.to(self.facts.precision.accumulate)
        if not self.facts.divided:
            c = c * values[self.node].to(c.dtype)
        yield Flow(source, Contribution(self.pull(values[source], c, values).to(part.c.dtype), part.target))


class Function(_AtPoint):
    """The general definition for a function of one tensor: ``c_x = sign(x) J(x)^T c + J(|x|)^T c``."""

    def pullback(self, parts: list[Contribution], values: Values, kept: Any, book: Bookkeeping) -> Iterator[Flow]:
        part = self.merged(parts, values, book)
        source = self.node.operands[0]
        x, c = values[source], part.c.to(self.facts.precision.accumulate)
        own = x.sign() * self.pull(x, c, values) + self.pull(x.abs(), c, values)
        yield Flow(source, Contribution(own.to(part.c.dtype), part.target))


class Generic(_Diagonal):
    """strict=False: an unknown elementwise operation under the general definition."""

    pullback_kernel = "autograd"

    def forward(self, values: Values) -> tuple[Any, Any]:
        source = self.node.operands[0]

        def function(u: Tensor) -> Tensor:
            args = [u if a is source else values[a] if isinstance(a, Node) else a for a in self.node.args]
            y: Tensor = self.node.target(*args, **self.node.kwargs)
            return y

        y, factor = smooth_factor(function, values[source])
        return y, factor.to(self.facts.precision.pullback)


TABLE: dict[str, type[Operation]] = {
    g.LINEAR: Linear,
    g.CONV: Conv,
    g.BATCH_NORM: BatchNorm,
    g.LAYER_NORM: LayerNorm,
    g.GROUP_NORM: GroupNorm,
    g.RMS_NORM: RmsNorm,
    g.ACTIVATION: Activation,
    g.ADD: Add,
    g.MUL: Mul,
    g.DIV: Div,
    g.SCALE: Scale,
    g.MATMUL: Matmul,
    g.SOFTMAX: Softmax,
    g.ATTENTION: Attention,
    g.MAX_POOL: MaxPool,
    g.LINEAR_POOL: LinearPool,
    g.GATE: Gate,
    g.LINEAR_MAP: LinearMap,
    g.BILINEAR: Bilinear,
    g.EXTREME: Extreme,
    g.FUNCTION: Function,
    g.PARTS: Parts,
    g.PART: Part,
    g.GENERIC: Generic,
}
