"""Metrics of attribution methods, each a class with ``update`` and ``compute``.

::

    gae = ramp_fast.metrics.GAE(model)
    for images, labels in loader:
        gae.update(images, labels, engine)
    print(gae.compute())
"""

from __future__ import annotations

from ramp_fast.metrics.base import MethodError, Metric, MetricInputs, Result
from ramp_fast.metrics.complexity import Complexity, EffectiveComplexity, Sparseness
from ramp_fast.metrics.curves import ABPC, AOPC, IROF, ROAD, Deletion, Insertion, Masking
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
    GridPointingGame,
    PointingGame,
    RelevanceMassAccuracy,
    RelevanceRankAccuracy,
    TopKIntersection,
    boxes_to_masks,
)
from ramp_fast.metrics.randomisation import ParameterRandomisation, RandomLogit
from ramp_fast.metrics.registry import METRICS, known_settings, make_metric
from ramp_fast.metrics.robustness import AvgSensitivity, MaxSensitivity

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
    "GridPointingGame",
    "Infidelity",
    "Insertion",
    "Masking",
    "MaxSensitivity",
    "MethodError",
    "Metric",
    "MetricInputs",
    "Monotonicity",
    "MonotonicityCorrelation",
    "ParameterRandomisation",
    "PointingGame",
    "RandomLogit",
    "RelevanceMassAccuracy",
    "RelevanceRankAccuracy",
    "Result",
    "SensitivityN",
    "Sparseness",
    "Sufficiency",
    "TopKIntersection",
    "boxes_to_masks",
    "known_settings",
    "make_metric",
]
