"""Forms of ``ramp`` for convolutional networks, to be chosen from: ``bench/evaluation.py --search``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramp_fast.gemm import LinearOp
from ramp_fast.ops._common import divide
from ramp_fast.rules import Composite, Epsilon, Flat, Gamma, LayerRule, SameSign, WSquare, ZPlus
from ramp_fast.rules.layer_rules import Layer, LayerContext, LayerPullback
from ramp_fast.rules.ramp import RampHead

_ZPLUS = ZPlus(0.0, zero_bias=True)


@dataclass(frozen=True, repr=False)
class Form(Composite):
    """A composite whose contrast is with the other classes as the softmax of ``logits / temperature`` weighs them."""

    temperature: float = 1.0

    def others(self, positive: Tensor, logits: Tensor) -> Tensor:
        """As :meth:`ramp_fast.rules.Rule.others`."""
        return (logits / self.temperature).masked_fill(positive > 0, float("-inf")).softmax(-1)


@dataclass(frozen=True)
class OtherHead(LayerRule):
    """:class:`RampHead` in other forms.

    Parameters
    ----------
    share : float
    signed : bool
        Divide by ``sum p v`` and not by ``sum |p v|``, as ``ramp`` did at first. It is the class's logit less the
        others' mean: where the class explained is not the predicted one it is negative, and turns the map around.
    by_softmax : bool
        Weight the positive evidence of the others as the seed weighs them, and not by ``1 / |logit|``.
    """

    share: float = 0.3
    signed: bool = False
    by_softmax: bool = False

    def pack(self, layer: Layer) -> LayerPullback:
        """As :meth:`LayerRule.pack`."""
        whole, positive = layer.transposed(layer.weight), layer.transposed(layer.weight.clamp_min(0))
        return _OtherHead(whole, positive, self)


class _OtherHead(LayerPullback):
    kernel = "head"

    def __init__(self, whole: LinearOp, positive: LinearOp, rule: OtherHead) -> None:
        super().__init__(whole, positive)
        self.rule = rule

    def __call__(self, at: LayerContext) -> Tensor:
        c, p, z = at.coefficients(), at.x, at.z
        whole, positive = self.functions
        z = z.expand(c.shape)
        others = -c.clamp_max(0) if self.rule.by_softmax else divide(torch.ones_like(z), z.abs()) * (c < 0)

        def unit(function: LinearOp, s: Tensor) -> Tensor:
            v = at.transposed(function, s).to(z.dtype)
            shares = p * v if self.rule.signed else (p * v).abs()
            total = shares.flatten(2).sum(-1)
            return divide(v, total.view(*total.shape, *[1] * (v.dim() - 2)).expand_as(v))

        evidence = unit(positive, c.clamp_min(0)) - unit(positive, others)
        return self.rule.share * unit(whole, c) + (1 - self.rule.share) * evidence


def form(
    conv: LayerRule = _ZPLUS, first: LayerRule | None = None, head: LayerRule | None = None, **options: Any
) -> Form:
    """``ramp``'s own form but for what is given."""
    return Form({"conv": conv, "linear": head or RampHead()}, first=first or Flat(0.0), **options)


def _normalized(conv: LayerRule, linear: LayerRule, first: LayerRule | None = None) -> Form:
    """The form for networks with LayerNorm but for layers."""
    return Form({"conv": conv, "linear": linear}, first=first or SameSign(), temperature=3.0)


_TURNING = OtherHead(signed=True)
_LRP0 = Epsilon(0.0)

CANDIDATES = {
    "turning head": form(head=_TURNING),
    "turning head, first layer same sign": form(head=_TURNING, first=SameSign()),
    "turning head, convolutions same sign": form(head=_TURNING, conv=SameSign()),
    "turning head, convolutions gamma 1": form(head=_TURNING, conv=Gamma(1.0, 0.0, zero_bias=True)),
    "a = 0": form(head=RampHead(0.0)),
    "a = 0.15": form(head=RampHead(0.15)),
    "a = 0.3": form(head=RampHead(0.3)),
    "a = 0.3, others by softmax": form(head=OtherHead(by_softmax=True)),
    "a = 0.3, first layer same sign": form(head=RampHead(0.3), first=SameSign()),
    "a = 0.15, biases take": form(head=RampHead(0.15), conv=ZPlus(0.0)),
    "a = 0.3, biases take": form(head=RampHead(0.3), conv=ZPlus(0.0)),
    "biases take": form(conv=ZPlus(0.0)),
    "head LRP-0": form(head=Epsilon(0.0)),
    "head LRP-0, biases take": form(head=Epsilon(0.0), conv=ZPlus(0.0)),
    "first layer same sign": form(first=SameSign()),
    "first layer w2": form(first=WSquare(0.0, zero_bias=True)),
    "convolutions same sign": form(conv=SameSign()),
    "convolutions gamma 1": form(conv=Gamma(1.0, 0.0, zero_bias=True)),
    "T = 3": form(temperature=3.0),
    # Of networks with LayerNorm, whose own form is "same sign in convolutions". There is no form for their last layer.
    "LRP-0 in convolutions": _normalized(_LRP0, _LRP0),
    "z+ in convolutions": _normalized(_ZPLUS, _LRP0),
    "z+ in convolutions, first layer flat": _normalized(_ZPLUS, _LRP0, Flat(0.0)),
    "z+ in convolutions, biases take": _normalized(ZPlus(0.0), _LRP0),
    "z+ in layers": _normalized(_ZPLUS, _ZPLUS),
    "same sign in convolutions": _normalized(SameSign(), _LRP0),
    "same sign in layers": _normalized(SameSign(), SameSign()),
    "gamma 0.25 in convolutions": _normalized(Gamma(0.25, 0.0, zero_bias=True), _LRP0),
    "gamma 0.25 in layers": _normalized(Gamma(0.25, 0.0, zero_bias=True), Gamma(0.25, 0.0, zero_bias=True)),
    "gamma 0.25 in linear layers": _normalized(_LRP0, Gamma(0.25, 0.0, zero_bias=True)),
}
