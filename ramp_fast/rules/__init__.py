"""Rules: how relevance is pulled back through every kind of operation.

``resolve`` turns what :class:`ramp_fast.Engine` was given, a name or an object, into a rule.
"""

from __future__ import annotations

from ramp_fast.rules.abslrp import AbsLRP, RelativeStabilizer

__all__ = ["AbsLRP", "RelativeStabilizer", "name_of", "resolve"]

_NAMED = {"abslrp": AbsLRP(), "abslrp-release": AbsLRP(shares="equal")}


def resolve(rule: str | AbsLRP) -> AbsLRP:
    """The rule object for ``rule``.

    Raises
    ------
    ValueError
        Unknown name; the message lists the known ones.
    TypeError
        Neither a name nor a rule.
    """
    if isinstance(rule, AbsLRP):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or an AbsLRP object, got {type(rule).__name__}")
    if rule not in _NAMED:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(sorted(_NAMED))}, or an AbsLRP object")
    return _NAMED[rule]


def name_of(rule: AbsLRP) -> str:
    """The name that stands for a rule, or its options."""
    return next((name for name, named in _NAMED.items() if named == rule), repr(rule))
