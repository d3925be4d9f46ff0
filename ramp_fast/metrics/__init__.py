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
from ramp_fast.metrics.gae import GAE

_CLASSES: Iterable[type[Metric]] = (GAE,)

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
    known = inspect.signature(metric).parameters
    for setting in settings:
        if setting not in known or setting == "model":
            names = ", ".join(sorted(set(known) - {"model"}))
            raise InputError(f"{name} has no setting {setting!r}; it has {names}")
    return metric(model, **settings)


__all__ = ["GAE", "METRICS", "MethodError", "Metric", "Result", "Sample", "make_metric"]
