"""Methods by name."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ramp_fast._checks import nearest
from ramp_fast.errors import InputError
from ramp_fast.explainer import Explainer, Method
from ramp_fast.methods.base import checked_seed
from ramp_fast.methods.baseline import Random
from ramp_fast.methods.gradients import gradient, input_x_gradient
from ramp_fast.methods.rollout import attention_of, attention_rollout
from ramp_fast.methods.through_captum import GradCAM, IntegratedGradients, Occlusion, SmoothGrad
from ramp_fast.rules.named import NAMED, make_rule
from ramp_fast.specs import check_flags

# Not settings: the model has an argument of its own, the rule is the name, the seed is everyone's.
_NO_SETTINGS = frozenset({"model", "rule", "seed"})


@dataclass(frozen=True)
class MethodEntry:
    """A row of :data:`METHODS`.

    Attributes
    ----------
    description : str
        One line.
    build : callable
        ``(model, **settings) -> Method or Engine``; ``seed`` is among the settings of those that draw.
    extra : str or None
        The optional dependency it needs, ``pip install 'ramp_fast[extra]'``.
    """

    description: str
    build: Callable[..., Method | Explainer]
    extra: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What :func:`make_method` takes besides the seed, with defaults."""
        return {n: p.default for n, p in self._parameters.items() if n not in _NO_SETTINGS}

    @property
    def draws(self) -> bool:
        """Whether maps depend on a seed."""
        return "seed" in self._parameters

    @property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        build = self.build
        if isinstance(build, _EngineOf):
            return dict(inspect.signature(build.engine).parameters) | NAMED[build.rule].settings
        if isinstance(build, partial) and build.func is _plain:
            build = build.args[0]
        return dict(inspect.signature(build).parameters)


@dataclass(frozen=True)
class _EngineOf:
    """An engine under a rule. Engines stand above methods, and are imported where one is made."""

    rule: str

    @property
    def engine(self) -> type[Explainer]:
        found: type[Explainer] = pkgutil.resolve_name("ramp_fast.engine:Engine")
        return found

    def __call__(self, model: nn.Module, **settings: Any) -> Explainer:
        # Settings of the rule; the others are the engine's.
        own = {name: settings.pop(name) for name in NAMED[self.rule].settings if name in settings}
        return self.engine(model, rule=make_rule(self.rule, **own), **settings)  # type: ignore[call-arg]


def _plain(kind: Callable[..., Method], model: nn.Module, **settings: Any) -> Method:
    return kind(**settings)


def _gradient(model: nn.Module) -> Method:
    return gradient


def _input_x_gradient(model: nn.Module) -> Method:
    return input_x_gradient


def _rollout(model: nn.Module) -> Method:
    attention_of(model)
    return attention_rollout


METHODS: dict[str, MethodEntry] = {
    **{name: MethodEntry(entry.about, _EngineOf(name)) for name, entry in NAMED.items()},
    "ixg": MethodEntry("input x gradient", _input_x_gradient),
    "gradient": MethodEntry("gradient, signed", _gradient),
    "ig": MethodEntry("integrated gradients", partial(_plain, IntegratedGradients), extra="captum"),
    "smoothgrad": MethodEntry("SmoothGrad", partial(_plain, SmoothGrad), extra="captum"),
    "gradcam": MethodEntry("Grad-CAM", partial(_plain, GradCAM), extra="captum"),
    "occlusion": MethodEntry("occlusion by a sliding window", partial(_plain, Occlusion), extra="captum"),
    "rollout": MethodEntry("attention rollout, for Vision Transformers", _rollout),
    "random": MethodEntry("noise, the baseline", partial(_plain, Random)),
}
"""Every method by the name that :func:`make_method` takes."""


def make_method(name: str, model: nn.Module, seed: int = 0, **settings: Any) -> Method | Explainer:
    """A method by its name.

    Parameters
    ----------
    name : str
        A key of :data:`METHODS`.
    model : torch.nn.Module
        In eval mode. Functions may be called with other models too; an Engine is the model's.
    seed : int
        Of methods that draw (``smoothgrad``, ``random``); others do not use it.
    **settings
        Of the method: ``METHODS[name].settings``.

    Returns
    -------
    Engine or callable
        An :class:`~ramp_fast.Engine` for the names of absLRP, otherwise ``(model, images [N, C, H, W], target [N])
        -> maps [N, C or 1, H, W]`` with a ``__name__``. Metrics take either.

    Raises
    ------
    InputError, ValueError
        Unknown name or setting, or a value out of range.
    UnsupportedModelError
        The method cannot explain this model (found before anything is computed where possible).
    RampFastError
        The method needs a package that is not installed.

    Examples
    --------
    >>> method = make_method("ig", model, steps=20)
    >>> maps = method(model, images, target)
    """
    entry = METHODS.get(name)
    if entry is None:
        raise InputError(f"unknown method {name!r}{nearest(name, METHODS)}; known: {', '.join(METHODS)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    checked_seed(name, seed)
    known = entry.settings
    unknown = [s for s in settings if s not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"{name} has no setting {', '.join(map(repr, unknown))}; {has}")
    check_flags(name, settings, known)
    if entry.draws:
        settings["seed"] = seed
    return entry.build(model, **settings)
