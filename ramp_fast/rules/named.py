"""Rules by short names, ``Engine(model, rule="lrp-epsilon:epsilon=0.1")``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ramp_fast._checks import nearest
from ramp_fast.rules.abslrp import AbsLRP
from ramp_fast.rules.composite import Composite
from ramp_fast.rules.layer_rules import AlphaBeta, Epsilon, Flat, Gamma, LayerRule, ZBox, ZPlus
from ramp_fast.rules.ramp import Ramp
from ramp_fast.rules.rule import Rule
from ramp_fast.rules.undivided import Undivided
from ramp_fast.specs import check_flags, parse_spec


@dataclass(frozen=True)
class Named:
    """A rule with a short name.

    Attributes
    ----------
    about : str
        One line.
    make : callable
        From settings to the rule; their names and defaults are those of its arguments.
    """

    about: str
    make: Callable[..., Rule]

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """What the rule can be told."""
        return dict(inspect.signature(self.make).parameters)


def _abslrp(shares: str) -> Callable[..., Rule]:
    def make(*, stabilizer: float = 1e-9, maxpool: str = "auto", fold_batchnorm: bool = False) -> Rule:
        return AbsLRP(stabilizer, shares, maxpool, fold_batchnorm)

    return make


def _epsilon(*, epsilon: float = 1e-6) -> Rule:
    return Composite(Epsilon(epsilon))


def _gamma(*, gamma: float = 0.25, stabilizer: float = 1e-6) -> Rule:
    return Composite(Gamma(gamma, stabilizer))


def _zplus(*, stabilizer: float = 1e-6) -> Rule:
    return Composite(ZPlus(stabilizer))


def _excitation(*, stabilizer: float = 1e-6) -> Rule:
    return Composite(ZPlus(stabilizer), stabilizer=stabilizer)


def _alpha_beta(*, alpha: float = 2.0, beta: float = 1.0, stabilizer: float = 1e-6) -> Rule:
    return Composite(AlphaBeta(alpha, beta, stabilizer))


def _composite(convolutions: LayerRule, first: Any = None) -> Callable[..., Rule]:
    def make(*, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Rule:
        conv = replace(convolutions, stabilizer=stabilizer)  # type: ignore[call-arg]  # all of them have one
        below = None if first is None else replace(first, stabilizer=stabilizer)
        return Composite({"conv": conv, "linear": Epsilon(epsilon)}, first=below, stabilizer=stabilizer)

    return make


def _gamma_box(*, low: Any, high: Any, epsilon: float = 1e-6, gamma: float = 0.25, stabilizer: float = 1e-6) -> Rule:
    layers = {"conv": Gamma(gamma, stabilizer), "linear": Epsilon(epsilon)}
    return Composite(layers, first={"conv": ZBox(low, high, stabilizer)}, stabilizer=stabilizer)


def _attnlrp(*, epsilon: float = 0.0) -> Rule:
    return Composite(Epsilon(epsilon))


def _cp_lrp(*, epsilon: float = 0.0) -> Rule:
    return Composite(Epsilon(epsilon), attention="values")


def _reslrp(*, gamma: float = 1.0, epsilon: float = 0.0) -> Rule:
    return Composite(Epsilon(epsilon), residual_gamma=gamma)


def _gradients(activations: str, times_input: bool = False) -> Callable[..., Rule]:
    def make() -> Rule:
        return Composite(Epsilon(0.0), activations=activations, times_input=times_input)

    return make


def _smooth(*, beta_smooth: float = 10.0) -> Rule:
    return Composite(Epsilon(0.0), activations="smooth", times_input=False, beta_smooth=beta_smooth)


NAMED: dict[str, Named] = {
    "abslrp": Named("absLRP: shares kept at sums and products", _abslrp("kept")),
    "abslrp-release": Named("absLRP as the published package: equal shares", _abslrp("equal")),
    "attnlrp": Named("AttnLRP (Achtibat et al. 2024): LRP-0, halves at products", _attnlrp),
    "beta-smooth": Named("gradients of ReLUs as of a softplus (Dombrowski et al. 2019), zennit's BetaSmooth", _smooth),
    "cp-lrp": Named("CP-LRP (Ali et al. 2022): attention to the values alone", _cp_lrp),
    "deconvnet": Named("DeconvNet (Zeiler and Fergus 2014): positive gradients through ReLUs", _gradients("deconvnet")),
    "dpa": Named("Dual Path Attribution (Jantsch et al. 2026): as AttnLRP, a half along each path", _attnlrp),
    "epsilon-alpha2-beta1": Named("zennit's EpsilonAlpha2Beta1", _composite(AlphaBeta())),
    "epsilon-alpha2-beta1-flat": Named("zennit's EpsilonAlpha2Beta1Flat", _composite(AlphaBeta(), Flat())),
    "epsilon-gamma-box": Named("zennit's EpsilonGammaBox; needs low and high of the pixels", _gamma_box),
    "epsilon-plus": Named("zennit's EpsilonPlus: z+ in convolutions, epsilon in linear layers", _composite(ZPlus())),
    "epsilon-plus-flat": Named("zennit's EpsilonPlusFlat: the first layer flat", _composite(ZPlus(), Flat())),
    "excitation-backprop": Named("excitation backprop (Zhang et al. 2016): z+ in all layers", _excitation),
    "gradient-x-input": Named("the gradient times the pixels (Shrikumar et al. 2016)", _gradients("gradient", True)),
    "guided-backprop": Named("guided backprop (Springenberg et al. 2015)", _gradients("guided")),
    "lrp-alpha2-beta1": Named("alpha-beta in all layers (Bach et al. 2015)", _alpha_beta),
    "lrp-epsilon": Named("epsilon in all layers (Bach et al. 2015); LRP-0 with epsilon=0", _epsilon),
    "lrp-gamma": Named("generalised gamma in all layers (Montavon et al. 2019)", _gamma),
    "lrp-undivided": Named("no division: a reading of Relative LRP (Nyiri and Gibaru 2025); no attention", Undivided),
    "lrp-zplus": Named("z+ in all layers (Montavon et al. 2017)", _zplus),
    "ramp": Named("ours: AttnLRP with all relevance of a token to its own pixels; z+ and a signed head for CNNs", Ramp),
    "reslrp": Named("AttnLRP with a residual gamma", _reslrp),
}
"""Every rule by its short name."""


def named(spec: str) -> Rule:
    """The rule of ``name`` or ``name:setting=value,setting=value``.

    Raises
    ------
    ValueError
        As :func:`make_rule`.
    """
    name, settings = parse_spec(spec)
    return make_rule(name, **settings)


def make_rule(name: str, **settings: Any) -> Rule:
    """A rule by its name in :data:`NAMED`, with settings.

    Raises
    ------
    ValueError
        Unknown name or setting, with the nearest one that is known; or a value that is none.
    """
    if name not in NAMED:
        known = ", ".join(sorted(NAMED))
        raise ValueError(f"unknown rule {name!r}{nearest(name, NAMED)}; known: {known}, or a rule object")
    arguments = NAMED[name].settings
    for setting in settings:
        if setting not in arguments:
            takes = f"it takes {', '.join(arguments)}" if arguments else "it has no settings"
            raise ValueError(f"rule {name}: unknown setting {setting!r}{nearest(setting, arguments)}; {takes}")
    needed = [a.name for a in arguments.values() if a.default is a.empty and a.name not in settings]
    if needed:
        raise ValueError(f"rule {name} needs {' and '.join(needed)}: {name}:{','.join(f'{n}=...' for n in needed)}")
    defaults = {a.name: a.default for a in arguments.values()}
    check_flags(name, settings, defaults)
    rule = NAMED[name].make(**settings)
    changed = {k: v for k, v in settings.items() if v != defaults[k]}
    label = name + (":" + ",".join(f"{k}={v}" for k, v in changed.items()) if changed else "")
    return replace(rule, label=label) if isinstance(rule, Composite) else rule
