"""Whether a map depends on what it explains: on the class, and on what the model has learnt."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ramp_fast._checks import positive
from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics._maps import SIMILARITIES, WINDOW, Sign, checked_sign, scaled, with_sign
from ramp_fast.metrics.base import Metric, MetricInputs


class _Randomisation(Metric):
    """Compares maps with those of something else."""

    higher_is_better = False
    asks_method = True

    def __init__(
        self, model: Model, similarity: str, *, sign: Sign, seed: int = 0, batch_size: int | None = None
    ) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        if similarity not in SIMILARITIES:
            names = ", ".join(map(repr, SIMILARITIES))
            raise InputError(f"{self.name}: similarity must be one of {names}; got {similarity!r}")
        self.similarity, self.sign = similarity, checked_sign(self.name, sign)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "similarity": self.similarity, "sign": self.sign}

    def _check_size(self, sample: MetricInputs) -> None:
        height, width = sample.images.shape[-2:]
        if self.similarity in ("ssim", "ssim_flat") and min(height, width) < WINDOW:
            raise InputError(
                f"{self.name}: similarity {self.similarity!r} needs images of at least {WINDOW} x {WINDOW} pixels, got "
                f"{height} x {width}: choose 'spearman'"
            )

    def _alike(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarity of scores ``[N, H, W]``, ``[N]``."""
        a, b = (scaled(with_sign(scores.double(), self.sign)) for scores in (a, b))
        return SIMILARITIES[self.similarity](a, b)


class RandomLogit(_Randomisation):
    """How alike the maps of the class explained and of another class are: 1 for a method that cannot tell them apart.

    ``similarity(R(x, y), R(x, y'))``, ``y'`` drawn from all other classes alike. Maps are summed over channels and
    divided by their own largest absolute value. In [-1, 1]; lower is better; NaN where the similarity is not defined
    (constant maps). Source: Sixt, Granz, Landgraf, ICML 2020, arXiv 1912.09818.

    Parameters
    ----------
    model, batch_size
        As for :class:`Metric`. The model needs at least two classes.
    similarity : {"ssim", "ssim_flat", "spearman", "pearson"}
        Structural similarity in windows of 7 x 7 pixels, as in the paper; in windows of 7 pixels in reading order, as
        Quantus computes it; correlation of ranks; correlation.
    sign : {"signed", "positive", "absolute"}
        What of the maps is compared.
    seed : int
        Of the other classes.

    Notes
    -----
    Values, ``[N]``, are random_logit and other, the class ``y'``. Quantus flattens maps, so that its windows go over
    the ends of rows, and divides them by the largest value of the whole batch, so that a value depends on the other
    images; for single images ``similarity="ssim_flat"`` gives its numbers.
    """

    name = "random_logit"

    def __init__(
        self,
        model: Model,
        similarity: str = "ssim",
        *,
        sign: Sign = "signed",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, similarity, sign=sign, seed=seed, batch_size=batch_size)

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        self._check_size(sample)
        others = (self._classes or sample.logits.shape[1]) - 1
        if others < 1:
            raise InputError(f"{self.name}: the model has a single class: there is no other one to explain")
        # a generator for each image, so that classes do not depend on the batch
        drawn = torch.cat(
            [torch.randint(others, (1,), generator=self.generator(n), device="cpu") for n in sample.numbers]
        )
        other = drawn.to(sample.target)
        other = other + (other >= sample.target)
        maps = sample.attribute(sample.images, other)
        return {self.name: self._alike(sample.scores, maps.sum(1)), "other": other}


class ParameterRandomisation(_Randomisation):
    """How alike maps stay while the model forgets what it has learnt (model parameter randomisation test, MPRT).

    A copy of the model has its layers initialised anew, from the last to the first, each stage on top of the ones
    before; ``s_k`` is the similarity of the map after stage k to the model's own, both of the same class. The metric is
    the mean of ``s_k``. Maps are summed over channels and divided by their own largest absolute value. In [-1, 1];
    lower is better. Source: Adebayo et al., NeurIPS 2018, arXiv 1810.03292.

    Parameters
    ----------
    model, batch_size
        As for :class:`Metric`.
    similarity : {"spearman", "pearson", "ssim", "ssim_flat"}
        As for :class:`RandomLogit`.
    stages : int or None
        How many stages the layers are divided into, evenly; None, or more than there are layers: one for each layer, as
        in the paper. Every ``update`` makes this many maps of every image (and an :class:`~ramp_fast.Engine` plans the
        copy in each of them): give it many images at a time.
    sign : {"absolute", "signed", "positive"}
        What of the maps is compared.
    seed : int
        Of the new parameters, the same for all images.

    Notes
    -----
    Layers are the modules with parameters of their own, in the reverse of the order in which the model names them. They
    get new parameters from their own ``reset_parameters`` where they have it (normalizations return to 1 and 0); else
    from a normal distribution with each parameter's mean and standard deviation. Numbers are drawn on the CPU: every
    device gets the same, and the user's random numbers stay as they are, as does the model.

    Values are parameter_randomisation ``[N]`` and similarity ``[N, stages]``, NaN for stages whose maps the similarity
    is not defined for (constant ones); they do not count in the mean.

    Quantus takes a stage for each layer, leaves alone parameters of modules without ``reset_parameters``, starts every
    layer from the same random numbers, and counts the model before randomisation, whose similarity is 1, in its mean.
    """

    name = "parameter_randomisation"

    def __init__(
        self,
        model: Model,
        similarity: str = "spearman",
        *,
        stages: int | None = 8,
        sign: Sign = "absolute",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, similarity, sign=sign, seed=seed, batch_size=batch_size)
        if stages is not None:
            positive(self.name, "stages", stages)
        if not _layers(self.model):
            raise InputError(f"{self.name}: the model has no parameters to randomise")
        self.stages = stages

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "stages": self.stages}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        self._check_size(sample)
        scores, forgetful = sample.scores, self._copied()
        layers = _layers(forgetful)
        stages = min(self.stages or len(layers), len(layers))
        ends = [stage * len(layers) // stages for stage in range(stages + 1)]
        similarities = []
        for stage in range(stages):
            for number in range(ends[stage], ends[stage + 1]):
                _forget(layers[number], self.generator(number).initial_seed())
            maps = sample.attribute(sample.images, sample.target, model=forgetful)
            similarities.append(self._alike(scores, maps.sum(1)))
        similarity = torch.stack(similarities, 1)
        return {self.name: similarity.nanmean(1), "similarity": similarity}

    def _copied(self) -> nn.Module:
        try:
            return copy.deepcopy(self.model)
        except Exception as error:
            raise InputError(
                f"{self.name}: the model cannot be copied ({type(error).__name__}: {error}), and parameters are only "
                "randomised in a copy: pass a model that copy.deepcopy takes"
            ) from error


def _layers(model: nn.Module) -> list[nn.Module]:
    """Modules with parameters of their own, the last first."""
    return [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None][::-1]


def _forget(layer: nn.Module, seed: int) -> None:
    """Initialise a layer anew."""
    device = next(layer.parameters(recurse=False)).device
    reset = getattr(layer, "reset_parameters", None)
    layer.to("cpu")
    # not torch.manual_seed, which would seed the user's devices as well
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if callable(reset):
            reset()
        else:
            for parameter in layer.parameters(recurse=False):
                mean, spread = parameter.mean(), parameter.std(correction=0)
                parameter.copy_(torch.randn_like(parameter) * spread + mean)
    layer.to(device)
