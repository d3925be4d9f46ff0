"""Rules: how relevance is pulled back through every kind of operation.

``resolve`` turns what :class:`ramp_fast.Engine` was given, a name or an object, into a rule.
"""

from __future__ import annotations

from ramp_fast.rules.abslrp import AbsLRP, RelativeStabilizer
from ramp_fast.rules.composite import Composite
from ramp_fast.rules.conservation import Conservation
from ramp_fast.rules.layer_rules import AlphaBeta, Epsilon, Flat, Gamma, LayerRule, SameSign, WSquare, ZBox, ZPlus
from ramp_fast.rules.named import NAMED, Named, named
from ramp_fast.rules.ramp import Ramp
from ramp_fast.rules.rule import Rule
from ramp_fast.rules.undivided import Undivided

__all__ = [
    "NAMED",
    "AbsLRP",
    "AlphaBeta",
    "Composite",
    "Conservation",
    "Epsilon",
    "Flat",
    "Gamma",
    "LayerRule",
    "Named",
    "Ramp",
    "RelativeStabilizer",
    "Rule",
    "SameSign",
    "Undivided",
    "WSquare",
    "ZBox",
    "ZPlus",
    "resolve",
]


def resolve(rule: str | Rule | LayerRule) -> Rule:
    """The rule object for ``rule``: a name with settings, a rule, or a rule for layers, which all of them follow then.

    Raises
    ------
    ValueError
        Unknown name or setting; the message names the nearest.
    TypeError
        Neither a name nor a rule.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, LayerRule):
        return Composite(rule)
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or a rule object, got {type(rule).__name__}")
    return named(rule)
