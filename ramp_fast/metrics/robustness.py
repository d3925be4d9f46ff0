"""How much maps change when images hardly do: max- and average sensitivity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics._counts import checked_count
from ramp_fast.metrics.base import Metric, MetricInputs


class _Sensitivity(Metric):
    """Relative changes of maps under noise, ``[N, samples]``, and what a subclass makes of them."""

    higher_is_better = False
    asks_method = True

    def __init__(
        self,
        model: Model,
        *,
        samples: int = 200,
        lower_bound: float = 0.2,
        upper_bound: float | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        checked_count(self.name, "samples", samples)
        for bound in (lower_bound, lower_bound if upper_bound is None else upper_bound):
            if not isinstance(bound, (int, float)) or not math.isfinite(bound):
                raise InputError(f"{self.name}: bounds of the noise must be finite numbers, got {bound!r}")
        low, high = (-lower_bound, lower_bound) if upper_bound is None else (lower_bound, upper_bound)
        if low >= high:
            raise InputError(
                f"{self.name}: no noise lies between {low} and {high}: lower_bound must be above 0 or below upper_bound"
            )
        self.samples, self.lower_bound, self.upper_bound = samples, lower_bound, upper_bound
        self._low, self._width = low, high - low

    def settings(self) -> dict[str, Any]:
        own = {"samples": self.samples, "lower_bound": self.lower_bound, "upper_bound": self.upper_bound}
        return {**super().settings(), **own}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        changes = self._changes(sample)
        return {self.name: self._summary(changes), "change": changes}

    def _summary(self, changes: Tensor) -> Tensor:
        """Of changes ``[N, samples]``, ``[N]``."""
        raise NotImplementedError

    def _changes(self, sample: MetricInputs) -> Tensor:
        """Norms of differences by the norm of the map, ``[N, samples]``.

        Draws of all images go through the model together, and only a batch of them is held at a time.
        """
        images, maps = sample.images, sample.maps
        total, size = images.shape[0] * self.samples, self.together(images)
        pieces = []
        for start in range(0, total, size):
            pairs = range(start, min(start + size, total))
            rows = torch.arange(pairs.start, pairs.stop, device=images.device) // self.samples
            perturbed = sample.attribute(images[rows] + self._noise(sample, pairs), sample.target[rows])
            if perturbed.shape[1:] != maps.shape[1:]:
                raise InputError(
                    f"{self.name}: the maps given are {list(maps.shape[1:])}, but the method makes "
                    f"{list(perturbed.shape[1:])}: pass the method's own maps, or none"
                )
            pieces.append(_norm(perturbed - maps[rows]))
        norm = _norm(maps).unsqueeze(1)
        return (torch.cat(pieces).view(-1, self.samples) / norm).masked_fill(norm == 0, torch.nan)

    def _noise(self, sample: MetricInputs, pairs: range) -> Tensor:
        """For pairs of image and draw, counted ``image * samples + draw``."""
        shape = sample.images.shape[1:]
        noise = torch.empty(len(pairs), *shape, device="cpu")
        # one generator for each pair, so that noise hangs neither on the batch nor on the device
        for place, pair in enumerate(pairs):
            image, draw = divmod(pair, self.samples)
            torch.rand(shape, generator=self.generator(sample.numbers[image], draw), out=noise[place], device="cpu")
        return noise.mul_(self._width).add_(self._low).to(sample.images)


class MaxSensitivity(_Sensitivity):
    """The largest relative change of a map under small noise.

    ``max_j ||R(x + d_j) - R(x)|| / ||R(x)||`` over ``samples`` draws, the entries of ``d_j`` uniform and
    independent, the class explained fixed, Frobenius norms of whole maps (channels are not summed). In [0, inf); lower
    is better; NaN where the map of ``x`` is zero. Source: Yeh et al., NeurIPS 2019, arXiv 1901.09392; formula and
    defaults are those of Quantus (the paper's formula does not divide by the norm of the map).

    Parameters
    ----------
    model, batch_size
        As for :class:`Metric`.
    samples : int
        Draws for each image.
    lower_bound, upper_bound : float
        Noise is uniform from ``-lower_bound`` to ``lower_bound``, or from ``lower_bound`` to ``upper_bound`` if there
        is one, in units of the images as the model gets them.
    seed : int
        Of the noise. Both sensitivities get the same draws from the same seed.

    Notes
    -----
    Values are max_sensitivity ``[N]``, and change ``[N, samples]``, of every draw: its mean is the average
    sensitivity. The method is asked for ``samples`` maps of every image, so ``maps`` alone will not do.
    """

    name = "max_sensitivity"

    def _summary(self, changes: Tensor) -> Tensor:
        return changes.amax(1)


class AvgSensitivity(_Sensitivity):
    """The average relative change of a map under small noise.

    ``mean_j ||R(x + d_j) - R(x)|| / ||R(x)||``; otherwise as :class:`MaxSensitivity`, with the same parameters. In
    [0, inf); lower is better; NaN where the map of ``x`` is zero. Sources: Bhatt, Weller, Moura, IJCAI 2020, arXiv
    2005.00631, and Yeh et al., NeurIPS 2019, arXiv 1901.09392; formula and defaults are those of Quantus.

    Parameters
    ----------
    model, samples, lower_bound, upper_bound, seed, batch_size
        As for :class:`MaxSensitivity`.

    Notes
    -----
    Values are avg_sensitivity ``[N]``, and change ``[N, samples]``, of every draw.
    """

    name = "avg_sensitivity"

    def _summary(self, changes: Tensor) -> Tensor:
        return changes.mean(1)


def _norm(maps: Tensor) -> Tensor:
    return maps.flatten(1).double().square().sum(1).sqrt()
