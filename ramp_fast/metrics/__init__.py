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
from ramp_fast.metrics.complexity import Complexity, EffectiveComplexity, Sparseness
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
from ramp_fast.metrics.localisation import (
    PointingGame,
    RelevanceMassAccuracy,
    RelevanceRankAccuracy,
    TopKIntersection,
    boxes_to_masks,
)
from ramp_fast.metrics.randomisation import ParameterRandomisation, RandomLogit
from ramp_fast.metrics.robustness import AvgSensitivity, MaxSensitivity

_CLASSES: Iterable[type[Metric]] = (
    ABPC,
    AOPC,
    AvgSensitivity,
    Complexity,
    Deletion,
    EffectiveComplexity,
    FaithfulnessCorrelation,
    GAE,
    Infidelity,
    Insertion,
    IROF,
    MaxSensitivity,
    Monotonicity,
    MonotonicityCorrelation,
    ParameterRandomisation,
    PointingGame,
    RandomLogit,
    RelevanceMassAccuracy,
    RelevanceRankAccuracy,
    ROAD,
    SensitivityN,
    Sparseness,
    Sufficiency,
    TopKIntersection,
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
    "AvgSensitivity",
    "Complexity",
    "Deletion",
    "EffectiveComplexity",
    "FaithfulnessCorrelation",
    "Infidelity",
    "Insertion",
    "MaxSensitivity",
    "MethodError",
    "Metric",
    "Monotonicity",
    "MonotonicityCorrelation",
    "ParameterRandomisation",
    "PointingGame",
    "RandomLogit",
    "RelevanceMassAccuracy",
    "RelevanceRankAccuracy",
    "Result",
    "Sample",
    "SensitivityN",
    "Sparseness",
    "Sufficiency",
    "TopKIntersection",
    "boxes_to_masks",
    "make_metric",
]
