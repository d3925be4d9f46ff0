"""Rules: how relevance is pulled back through every kind of operation.

``resolve`` turns what :class:`ramp_fast.Engine` was given, a name or an object, into a rule.
"""

from __future__ import annotations

from ramp_fast._checks import nearest
from ramp_fast.rules.abslrp import AbsLRP, RelativeStabilizer
from ramp_fast.rules.conservation import Conservation
from ramp_fast.rules.rule import Rule

__all__ = ["AbsLRP", "Conservation", "RelativeStabilizer", "Rule", "resolve"]

_NAMED = {"abslrp": AbsLRP(), "abslrp-release": AbsLRP(shares="equal")}


def resolve(rule: str | Rule) -> Rule:
    """The rule object for ``rule``.

    Raises
    ------
    ValueError
        Unknown name; the message lists the known ones.
    TypeError
        Neither a name nor a rule.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or a rule object, got {type(rule).__name__}")
    if rule not in _NAMED:
        known = ", ".join(sorted(_NAMED))
        raise ValueError(f"unknown rule {rule!r}{nearest(rule, _NAMED)}; known: {known}, or a rule object")
    return _NAMED[rule]
