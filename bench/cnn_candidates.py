"""Forms of ``ramp`` for convolutional networks, to be chosen from: ``bench/evaluation.py --search``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ramp_fast.rules import Composite, Epsilon, Flat, Gamma, LayerRule, SameSign, WSquare, ZPlus
from ramp_fast.rules.ramp import RampHead

_ZPLUS = ZPlus(0.0, zero_bias=True)


@dataclass(frozen=True, repr=False)
class Form(Composite):
    """A composite whose contrast is with the other classes as the softmax of ``logits / temperature`` weighs them."""

    temperature: float = 1.0

    def others(self, positive: Tensor, logits: Tensor) -> Tensor:
        """As :meth:`ramp_fast.rules.Rule.others`."""
        return (logits / self.temperature).masked_fill(positive > 0, float("-inf")).softmax(-1)


def form(
    conv: LayerRule = _ZPLUS, first: LayerRule | None = None, head: LayerRule | None = None, **options: Any
) -> Form:
    """``ramp``'s own form but for what is given."""
    return Form({"conv": conv, "linear": head or RampHead()}, first=first or Flat(0.0), **options)


CANDIDATES = {
    "head a = 0": form(head=RampHead(0.0)),
    "head a = 0.6": form(head=RampHead(0.6)),
    "head LRP-0": form(head=Epsilon(0.0)),
    "T = 3": form(temperature=3.0),
    "first layer same sign": form(first=SameSign()),
    "first layer w2": form(first=WSquare(0.0, zero_bias=True)),
    "convolutions same sign": form(conv=SameSign()),
    "convolutions gamma 1": form(conv=Gamma(1.0, 0.0, zero_bias=True)),
    "convolutions gamma 0.25": form(conv=Gamma(0.25, 0.0, zero_bias=True)),
    "biases take": form(conv=ZPlus(0.0)),
}
