"""How few pixels a map needs: sparseness, entropy, and the count of pixels that matter.

They look at the map alone. A map of several channels is summed over them, since a pixel is what is shown to a person;
signs are dropped. A map of nothing but zeros says nothing, so that its values are NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics._maps import scaled
from ramp_fast.metrics.base import Metric, MetricInputs


def _sizes(sample: MetricInputs) -> Tensor:
    """``|sum over channels|``, the largest 1, ``[N, H W]`` in float64."""
    return scaled(sample.scores.double().abs().flatten(1))


class Sparseness(Metric):
    """Gini index of a map's absolute values: 0 if all pixels weigh the same, nearly 1 if one has all the weight.

    With the d pixels' absolute values (of the sum over channels) in ascending order, ``v_1 <= ... <= v_d``::

        G = sum_k (2 k - d - 1) v_k / (d sum_k v_k)

    in [0, 1 - 1 / d]; higher is better. NaN for a map of zeros. Source: Chalasani et al., ICML 2020, arXiv 1810.06583.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.

    Notes
    -----
    Quantus adds 1e-7 to the values, after dividing them by the largest of the whole batch; that lowers the index where
    few of many pixels have weight (a single pixel of 224 x 224: 0.995 instead of 0.99998). The paper has no such term,
    and the index does not depend on the scale.
    """

    name = "sparseness"
    higher_is_better = True

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        ordered = _sizes(sample).sort(1).values
        count = ordered.shape[1]
        weights = torch.arange(1 - count, count, 2, dtype=ordered.dtype, device=ordered.device)
        return {self.name: (ordered * weights).sum(1) / (count * ordered.sum(1))}


class Complexity(Metric):
    """Entropy of a map's absolute values: 0 if one pixel has all the weight, log(H W) if all weigh the same.

    With ``p`` the pixels' shares of the sum of absolute values (of the sum over channels)::

        H = -sum_i p_i log p_i

    in nats, in [0, log(H W)]; lower is better. NaN for a map of zeros. Source: Bhatt, Weller, Moura, IJCAI 2020, arXiv
    2005.00631.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.

    Notes
    -----
    Quantus takes ``log(p + 1e-12)``, which makes no difference above 1e-12 H W.
    """

    name = "complexity"
    higher_is_better = False

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        sizes = _sizes(sample)
        shares = sizes / sizes.sum(1, keepdim=True)
        return {self.name: -torch.xlogy(shares, shares).sum(1)}


class EffectiveComplexity(Metric):
    """How many pixels matter: those whose absolute value exceeds ``eps`` times the map's largest.

    ``#{i: |v_i| > eps max |v|}`` with ``v`` the map summed over channels: an integer in [1, H W]; lower is better. NaN
    for a map of zeros. After Nguyen and Rodríguez Martínez 2020, arXiv 2007.07584, in the form that Quantus gave it
    (the paper asks how few pixels keep the expected loss below a bound, which needs a model of the data).

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`; nothing is random here.
    eps : float
        Share of the largest value that does not count yet, in [0, 1).

    Notes
    -----
    Quantus divides maps by the largest value of the whole batch, so that a value depends on the other images; here each
    map is divided by its own. For single images both are the same.
    """

    name = "effective_complexity"
    higher_is_better = False

    def __init__(self, model: Model, *, eps: float = 1e-5, seed: int = 0, batch_size: int | None = None) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        if not isinstance(eps, (int, float)) or not math.isfinite(eps) or not 0 <= eps < 1:
            raise InputError(f"{self.name}: eps must be a number in [0, 1), got {eps!r}")
        self.eps = float(eps)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "eps": self.eps}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        sizes = _sizes(sample)
        count = (sizes > self.eps).sum(1).double()
        return {self.name: count.masked_fill((sizes == 0).all(1), torch.nan)}
