"""Metrics of attribution methods, each a class with ``update`` and ``compute``.

::

    gae = ramp_fast.metrics.GAE(model)
    for images, labels in loader:
        gae.update(images, labels, engine)
    print(gae.compute())
"""

from __future__ import annotations

from ramp_fast.metrics.base import Metric, Result, input_x_gradient
from ramp_fast.metrics.gae import GAE

__all__ = ["GAE", "Metric", "Result", "input_x_gradient"]
