"""Metrics of attribution methods, each a class with ``update`` and ``compute``.

::

    gae = ramp_fast.metrics.GAE(model)
    for images, labels in loader:
        gae.update(images, labels, engine)
    print(gae.compute())
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ramp_fast.errors import InputError
from ramp_fast.metrics.base import MethodError, Metric, Result, Sample
from ramp_fast.metrics.curves import ABPC, AOPC, IROF, ROAD, Deletion, Insertion
from ramp_fast.metrics.faithfulness import (
    FaithfulnessCorrelation,
    Infidelity,
    Monotonicity,
    MonotonicityCorrelation,
    SensitivityN,
    Sufficiency,
)
from ramp_fast.metrics.gae import GAE

_CLASSES: Iterable[type[Metric]] = (
    GAE,
    Deletion,
    Insertion,
    ABPC,
    AOPC,
    IROF,
    ROAD,
    SensitivityN,
    FaithfulnessCorrelation,
    Infidelity,
    Monotonicity,
    MonotonicityCorrelation,
    Sufficiency,
)

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in _CLASSES}
"""Every metric by its name."""


def make_metric(name: str, model: nn.Module, **settings: Any) -> Metric:
    """A metric by its name, with its class's settings.

    Raises
    ------
    InputError
        There is no such metric, or a setting is not one of the metric's.
    """
    try:
        metric = METRICS[name]
    except KeyError:
        raise InputError(f"no metric {name!r}; there are {', '.join(sorted(METRICS))}") from None
    known = known_settings(metric)
    for setting in settings:
        if setting not in known:
            raise InputError(f"{name} has no setting {setting!r}; it has {', '.join(sorted(known))}")
    return metric(model, **settings)


def known_settings(metric: type[Metric]) -> set[str]:
    """Names of the settings that a class of metrics takes, those it hands on to its base classes included."""
    names: set[str] = set()
    for cls in metric.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[2:]  # without self and model
        names |= {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return names


__all__ = [
    "ABPC",
    "AOPC",
    "GAE",
    "IROF",
    "METRICS",
    "ROAD",
    "Deletion",
    "FaithfulnessCorrelation",
    "Infidelity",
    "Insertion",
    "MethodError",
    "Metric",
    "Monotonicity",
    "MonotonicityCorrelation",
    "Result",
    "Sample",
    "SensitivityN",
    "Sufficiency",
    "make_metric",
]
