"""``ramp``: a signed rule of our own (docs/signed-rules.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast._checks import fraction, is_number
from ramp_fast.gemm import LinearOp
from ramp_fast.graph import Graph, Node
from ramp_fast.ops._common import divide
from ramp_fast.rules.layer_rules import Epsilon, Flat, Layer, LayerContext, LayerPullback, LayerRule, SameSign, ZPlus
from ramp_fast.rules.rule import Rule
from ramp_fast.rules.signed import Signed, layer_kind

_TOKEN_KINDS = frozenset({g.LAYER_NORM, g.RMS_NORM, g.GROUP_NORM, g.ATTENTION, g.SOFTMAX})


@dataclass(frozen=True)
class Ramp(Signed):
    """AttnLRP for transformers with all relevance of a token given to its pixels; z+ with a signed head for others.

    Networks with attention or LayerNorm: LRP-0 in linear layers and convolutions of one pixel, the halves of AttnLRP,
    and in the patch embedding and other convolutions only contributions of the output's own sign, so that neither
    biases nor position embeddings take relevance. Others: :class:`RampHead` at the end, z+ without bias in the layers,
    shares of equal size in the first.

    Parameters
    ----------
    temperature : float, optional
        The contrast is with the other classes as the softmax of ``logits / temperature`` weighs them. By default 3
        for networks with attention or LayerNorm and 1 for others.
    """

    temperature: float | None = None
    divides_nowhere = True  # but in convolutions, where a scale of the output makes no difference

    def __post_init__(self) -> None:
        if self.temperature is not None and not (is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"Ramp: temperature must be a positive number, got {self.temperature!r}")

    @property
    def name(self) -> str:
        """What Engine takes, or the options."""
        return "ramp" if self.temperature is None else f"ramp:temperature={self.temperature:g}"

    def for_graph(self, graph: Graph) -> Rule:
        """As :meth:`ramp_fast.rules.Rule.for_graph`."""
        if any(node.kind in _TOKEN_KINDS for node in graph.nodes):
            return _Tokens(3.0 if self.temperature is None else self.temperature, self.name)
        head = graph.output if graph.output.kind == g.LINEAR else None
        return _Convolutions(1.0 if self.temperature is None else self.temperature, self.name, head)

    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        """Decided for each graph (:meth:`for_graph`)."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Form(Signed):
    temperature: float
    label: str

    @property
    def name(self) -> str:
        return self.label

    def others(self, positive: Tensor, logits: Tensor) -> Tensor:
        """As :meth:`ramp_fast.rules.Rule.others`: the softmax of the other logits."""
        return (logits / self.temperature).masked_fill(positive > 0, float("-inf")).softmax(-1)


@dataclass(frozen=True)
class _Tokens(_Form):
    constants_take_nothing = True

    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        return SameSign() if first or _reads_windows(node) else Epsilon(0.0)


def _reads_windows(node: Node) -> bool:
    """Whether a layer is a convolution of more than one pixel; one of one pixel is a linear layer in other words."""
    if node.kind == g.CONV:
        window: int = math.prod(node.params.weight.example[2:])
        return window > 1
    return layer_kind(node) == g.CONV


@dataclass(frozen=True)
class _Convolutions(_Form):
    head: Node | None = None

    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        if node is self.head:
            return RampHead()
        return Flat(0.0) if first else ZPlus(0.0, zero_bias=True)


@dataclass(frozen=True)
class RampHead(LayerRule):
    """The last layer of a convolutional network, at pooled features ``p`` that are not negative.

    From coefficients ``c`` at the logits, with ``N(v) = v / sum |p v|`` and ``u_j = 1 / |logit_j|`` where ``c_j < 0``::

        c_p = share N(W^T c) + (1 - share) (N(W+^T c+) - N(W+^T u))

    (The sum of ``p v`` itself is the class's logit less the others' mean, which is negative for most classes that are
    not predicted: it would turn their maps around.)

    Parameters
    ----------
    share : float
    """

    share: float = 0.6

    def __post_init__(self) -> None:
        fraction("RampHead", "share", self.share)

    def pack(self, layer: Layer) -> LayerPullback:
        """As :meth:`LayerRule.pack`."""
        return _Head(layer.transposed(layer.weight), layer.transposed(layer.weight.clamp_min(0)), self.share)


class _Head(LayerPullback):
    kernel = "head"

    def __init__(self, whole: LinearOp, positive: LinearOp, share: float) -> None:
        super().__init__(whole, positive)
        self.share = share

    def __call__(self, at: LayerContext) -> Tensor:
        c, p = at.coefficients(), at.x
        whole, positive = self.functions
        z = at.z.expand(c.shape)
        others = divide(torch.ones_like(z), z.abs()) * (c < 0)

        def unit(function: LinearOp, s: Tensor) -> Tensor:
            v = at.transposed(function, s).to(z.dtype)
            total = (p * v).abs().flatten(2).sum(-1)
            return divide(v, total.view(*total.shape, *[1] * (v.dim() - 2)).expand_as(v))

        evidence = unit(positive, c.clamp_min(0)) - unit(positive, others)
        return self.share * unit(whole, c) + (1 - self.share) * evidence
