"""Metrics by name."""

from __future__ import annotations

import inspect
from typing import Any

from ramp_fast._checks import nearest
from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics import complexity, curves, faithfulness, gae, localisation, randomisation, robustness
from ramp_fast.metrics.base import Metric
from ramp_fast.specs import check_flags

_MODULES = complexity, curves, faithfulness, gae, localisation, randomisation, robustness

METRICS: dict[str, type[Metric]] = {
    found.name: found
    for module in _MODULES
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, Metric) and hasattr(found, "name")
}
"""Every metric by its name."""


def make_metric(name: str, model: Model, **settings: Any) -> Metric:
    """A metric by its name, with its class's settings.

    Raises
    ------
    InputError
        There is no such metric, or a setting is not one of the metric's.
    """
    metric = METRICS.get(name)
    if metric is None:
        raise InputError(f"no metric {name!r}{nearest(name, METRICS)}; there are {', '.join(sorted(METRICS))}")
    known = known_settings(metric)
    for setting in settings:
        if setting not in known:
            raise InputError(f"{name} has no setting {setting!r}; it has {', '.join(sorted(known))}")
    check_flags(name, settings, known)
    return metric(model, **settings)


def known_settings(metric: type[Metric]) -> dict[str, Any]:
    """The settings of a class of metrics with their defaults, those it hands on to its base classes included."""
    found: dict[str, Any] = {}
    for cls in metric.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[2:]  # without self and model
        handed_on = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        found = {**{p.name: p.default for p in parameters if p not in handed_on}, **found}
        if not handed_on:
            break
    return found
