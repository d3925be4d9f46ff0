"""Metrics that mask an image step by step in the order of its map, and watch the output of the explained class."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ramp_fast._ranges import ranges
from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics._counts import check_bytes, checked_count
from ramp_fast.metrics.base import Metric, MetricInputs
from ramp_fast.metrics.baselines import Baseline, Fill, Impute, check_baseline, filling
from ramp_fast.metrics.features import Entries, Features, Granularity, kind_of_feature

OUTPUTS = ("probability", "logit")


class Masking(Metric):
    """What metrics share that mask features of images: kinds of features, baselines, masked copies through the model.

    Parameters
    ----------
    model, seed, batch_size
        As for :class:`Metric`. ``batch_size`` counts masked copies: the steps of one or of several images.
    granularity : str or object
        What is masked as one: "entry" (a channel of a pixel), "pixel", "patch" or "patch:16" (squares of 16 pixels),
        "superpixel" or "superpixel:100" (about so many segments by SLIC; needs scikit-image), or an object of
        ``ramp_fast.metrics.features``. Maps are summed over channels but for "entry"; superpixels take the mean.
    baseline : str, float or Tensor
        What masked features become: "zero" (the mean colour of usual preprocessing), "mean" (of every channel of the
        image), "black", "white" (its smallest and largest value), "blur", "uniform" (random), "road" (noisy linear
        imputation), a number, or values ``[C]``, ``[C, H, W]``, ``[1 or N, C, H, W]``.
    output : {"probability", "logit"}
        What is watched: the softmax probability of the explained class (the sigmoid where the model has one logit), or
        its logit. For a model that ends in a softmax or sigmoid "logit" is that probability.
    noise : float
        Standard deviation of what the baseline "road" adds.
    """

    usual_granularity: ClassVar[str] = "pixel"
    usual_baseline: ClassVar[str] = "zero"

    def __init__(
        self,
        model: Model,
        *,
        granularity: str | Granularity | None = None,
        baseline: Baseline | None = None,
        output: str = "probability",
        noise: float = 0.01,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        if output not in OUTPUTS:
            raise InputError(f"{self.name}: output must be probability or logit, got {output!r}")
        self.baseline = self.usual_baseline if baseline is None else baseline
        check_baseline(self.baseline, self.name)
        self.granularity = kind_of_feature(self.usual_granularity if granularity is None else granularity)
        if not isinstance(noise, (int, float)) or not 0 <= noise < float("inf"):
            raise InputError(f"{self.name}: noise must be a number of at least 0, got {noise!r}")
        self.output, self.noise = output, noise
        if self.imputes and isinstance(self.granularity, Entries):
            raise InputError(
                f'{self.name}: baseline "road" fills in whole pixels: take another granularity than "entry"'
            )

    def settings(self) -> dict[str, Any]:
        baseline = self.baseline.tolist() if isinstance(self.baseline, Tensor) else self.baseline
        return {
            **super().settings(),
            "granularity": self.granularity.name,
            "baseline": baseline,
            "output": self.output,
            **({"noise": self.noise} if self.imputes else {}),
        }

    @property
    def imputes(self) -> bool:
        """Whether masked pixels are filled in from the others."""
        return isinstance(self.baseline, str) and self.baseline == "road"

    def features(self, sample: MetricInputs) -> Features:
        """Of the sample's images, scored by its maps."""
        return self.granularity.of(sample.images, sample.maps)

    def filling(self, sample: MetricInputs, stream: int = 0) -> Fill | Impute:
        """What masked features of the sample's images become; another ``stream`` draws random values anew."""
        generators = [self.generator(n, stream) for n in sample.numbers]
        return filling(self.baseline, sample.images, generators, self.noise, self.name)

    def watched(self, sample: MetricInputs, logits: Tensor, target: Tensor) -> Tensor:
        """The output of the explained class, ``[..., N]`` of logits ``[..., N, classes]``, float32 or better."""
        if self.output == "probability":
            values = self.probabilities(sample.images, logits)
        else:
            values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return values.gather(-1, target.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def logits_of_steps(self, sample: MetricInputs, steps: Tensor, count: int, *, reveal: bool = False) -> Tensor:
        """Logits of the copies of steps 0 to ``count - 1``, ``[count, N, classes]``."""
        images, classes = sample.logits.shape
        check_bytes(self.name, f"the logits of {count} steps of {images} images", 4 * count * images * classes)
        return self.logits_of_copies(sample.images, self.filling(sample), steps, count, reveal=reveal)

    def logits_of_copies(
        self, images: Tensor, fill: Fill | Impute, steps: Tensor, count: int, *, reveal: bool = False
    ) -> Tensor:
        """The same for images, what fills them and steps, each ``[N, ...]``.

        Many images and few steps go through the model together: the next copies take least from those before.
        """
        size = self.together(images)
        rows = []
        for start, stop in ranges(images.shape[0], size):
            here, together = slice(start, stop), max(1, size // (stop - start))
            turns = fill.of(here).in_turn(images[here], steps[here], count, together, reveal=reveal)
            with torch.no_grad():  # copied, since the memory of the images is written to again
                logits = [self.answer(copies.flatten(0, 1)).clone() for copies in turns]
            rows.append(torch.cat(logits).unflatten(0, (count, stop - start)))
        return self.finite(torch.cat(rows, 1))

    def curve(self, sample: MetricInputs, steps: Tensor, count: int, *, reveal: bool = False) -> Tensor:
        """The watched output after every step, ``[N, count]``, float32 or better."""
        return self.watched(sample, self.logits_of_steps(sample, steps, count, reveal=reveal), sample.target).t()


def area(curve: Tensor) -> Tensor:
    """Under curves ``[N, S + 1]`` over shares from 0 to 1, by trapezoids."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


class Shares(Masking):
    """Steps that mask equal shares, from none to all."""

    least_steps: ClassVar[int] = 1

    def __init__(self, model: Model, *, steps: int = 100, **masking: Any) -> None:
        super().__init__(model, **masking)
        checked_count(self.name, "steps", steps, self.least_steps)
        self.steps = steps

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "steps": self.steps}

    def axis(self) -> dict[str, Any]:
        shares = [s / self.steps for s in range(self.steps + 1)]
        return {"label": "share masked", "values": shares, "curves": ["curve"]}


class Deletion(Shares):
    """Deletion: the area under the curve of the class's probability while the most important features are masked.

    Petsiuk et al. 2018, RISE, arXiv 1806.07421. With ``granularity="entry"`` it is pixel flipping (Bach et al. 2015,
    10.1371/journal.pone.0130140, Quantus' PixelFlipping), with ``"patch:8"`` Quantus' Selectivity (Montavon et al.
    2018, arXiv 1706.07979). ``deletion`` in [0, 1] for probabilities, lower is better; ``curve`` ``[S + 1]`` starts
    with the whole image and ends with the baseline: after step s ``floor(s M / S)`` of M features are masked.

    Quantus' curves lack the first value, its areas are sums over steps, its "black" is our "black", not "zero", and its
    patches hang over all borders of an image that they do not tile, ours over the right and the lower one.

    Parameters
    ----------
    steps : int
        S.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`.
    """

    name = "deletion"
    higher_is_better = False

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        steps = self.features(sample).shares(self.steps + 1, descending=True)
        curve = self.curve(sample, steps, self.steps + 1)
        return {self.name: area(curve), "curve": curve}


class Insertion(Shares):
    """Insertion: the area under the curve of the class's probability while the most important features are revealed.

    Petsiuk et al. 2018, RISE, arXiv 1806.07421, which reveals a blurred image. ``insertion`` in [0, 1] for
    probabilities, higher is better; ``curve`` ``[S + 1]`` starts with the baseline and ends with the whole image.

    Parameters
    ----------
    steps : int
        S.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`; the baseline is "blur" by default.
    """

    name = "insertion"
    higher_is_better = True
    usual_baseline = "blur"

    def axis(self) -> dict[str, Any]:
        return {**super().axis(), "label": "share revealed"}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        steps = self.features(sample).shares(self.steps + 1, descending=True)
        curve = self.curve(sample, steps, self.steps + 1, reveal=True)
        return {self.name: area(curve), "curve": curve}


class ABPC(Shares):
    """Area between perturbation curves, also symmetric relevance gain (SRG): masking least important features first
    should change the output little, most important ones first much.

    ``abpc = area(lerf) - area(morf)`` in [-1, 1] for probabilities; 0 for a random map, higher is better. Schulz et al.
    2020, arXiv 2001.00396 (section 4.3), and Blücher et al. 2024, arXiv 2401.06654. ``morf`` and ``lerf`` ``[S + 1]``
    are the curves; both together cost the model 2 S passes.

    Parameters
    ----------
    steps : int
        S.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`.
    """

    name = "abpc"
    higher_is_better = True

    def axis(self) -> dict[str, Any]:
        return {**super().axis(), "curves": ["morf", "lerf"]}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        features, steps = self.features(sample), self.steps
        # Both curves begin with the whole image, whose logits are there, and end with the baseline, which goes through
        # the model once. Step 0 masks nothing: without it the next one is the first.
        whole = self.watched(sample, sample.logits, sample.target).unsqueeze(1)
        falling, rising = (features.shares(steps + 1, descending=descending) - 1 for descending in (True, False))
        morf = torch.cat([whole, self.curve(sample, falling, steps)], 1)
        between = self.curve(sample, rising, steps - 1) if steps > 1 else whole[:, :0]
        lerf = torch.cat([whole, between, morf[:, -1:]], 1)
        return {self.name: area(lerf) - area(morf), "morf": morf, "lerf": lerf}


class AOPC(Masking):
    """Area over the perturbation curve: how fast the output falls as regions are masked, the most important first.

    ``aopc = mean over t = 0..L of f(x_0) - f(x_t)`` where ``x_t`` has the t most important regions masked; in [-1, 1]
    for probabilities, higher is better. Samek et al. 2017, arXiv 1509.06321: L = 100 regions of 9 x 9 pixels, uniform
    noise. ``curve`` ``[L + 1]`` holds the differences; without its first value it is Quantus' RegionPerturbation.
    Where an image has fewer than L regions, its last value is repeated.

    Parameters
    ----------
    regions : int
        L.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`; "patch:9" and "uniform" by default.
    """

    name = "aopc"
    higher_is_better = True
    usual_granularity = "patch:9"
    usual_baseline = "uniform"

    def __init__(self, model: Model, *, regions: int = 100, **masking: Any) -> None:
        super().__init__(model, **masking)
        checked_count(self.name, "regions", regions)
        self.regions = regions

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "regions": self.regions}

    def axis(self) -> dict[str, Any]:
        return {"label": "regions masked", "values": list(range(self.regions + 1)), "curves": ["curve"]}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        steps = self.features(sample).steps(range(self.regions + 1), descending=True)
        outputs = self.curve(sample, steps, self.regions + 1)
        curve = outputs[:, :1] - outputs
        return {self.name: curve.mean(1), "curve": curve}


class IROF(Masking):
    """Iterative removal of features: the area over the class's probability, relative to the image's own, while
    superpixels are masked with the mean colour.

    ``irof = 1 - area(f(x_t) / f(x_0))`` over the share of segments masked; at most 1, higher is better. Rieger and
    Hansen 2020, arXiv 2003.08747. Every segment is a step. ``segments`` says how many the image has. Quantus computes
    another number: the area times the number of segments, without the part between the whole image and the first step;
    and at every step it masks with one colour, the mean over all images of the batch as they are masked by then. Its
    own masking fails for images of more than one channel.

    Parameters
    ----------
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`; superpixels and "mean" by default.
    """

    name = "irof"
    higher_is_better = True
    usual_granularity = "superpixel"
    usual_baseline = "mean"

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        features = self.features(sample)
        size = features.scores.shape[1]
        curve = self.curve(sample, features.steps(range(size + 1), descending=True), size + 1)
        relative = curve / curve[:, :1]
        counts = torch.as_tensor(features.counts, device=curve.device).expand(curve.shape[0])
        # trapezoids between steps; an image with fewer segments than others ends before
        pieces = (relative[:, 1:] + relative[:, :-1]) / 2
        within = torch.arange(size, device=curve.device) < counts.unsqueeze(1)
        return {self.name: 1 - (pieces * within).sum(1) / counts, "segments": counts}


class ROAD(Masking):
    """Remove and debias: accuracy of the model once the most important pixels are imputed from the others.

    For every percentage p the ``floor(p H W / 100)`` most important pixels are filled in by noisy linear imputation;
    ``curve`` ``[P]`` says whether the model still predicts the explained class (1 or 0), ``road`` is its mean over p,
    in [0, 1]; lower is better. A single logit has to keep the sign that it has for the whole image. Rong et al. 2022,
    arXiv 2202.00449. As Quantus', whose code takes images and maps of one channel, and reports means over the first
    batch only.

    Parameters
    ----------
    percentages : sequence of float
        Ascending, in [0, 100].
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`; the baseline is "road" by default.
    """

    name = "road"
    higher_is_better = False
    usual_baseline = "road"

    def __init__(self, model: Model, *, percentages: Sequence[float] = tuple(range(1, 100, 2)), **masking: Any) -> None:
        super().__init__(model, **masking)
        given: Any = percentages
        if not isinstance(given, Sequence) or not all(isinstance(p, Real) and p == p for p in given):
            raise InputError(f"road: percentages must be a sequence of numbers, got {percentages!r}")
        ascending = sorted(percentages) == list(percentages)
        if not percentages or not ascending or percentages[0] < 0 or percentages[-1] > 100:
            raise InputError(f"road: percentages must ascend in [0, 100], got {list(percentages)}")
        self.percentages = tuple(percentages)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "percentages": list(self.percentages)}

    def axis(self) -> dict[str, Any]:
        return {"label": "% of pixels imputed", "values": list(self.percentages), "curves": ["curve"]}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        steps = self.features(sample).percentages(self.percentages, descending=True)
        logits = self.logits_of_steps(sample, steps, len(self.percentages))
        kept = self.predictions(sample.images, sample.logits) if logits.shape[-1] == 1 else sample.target
        curve = (self.predictions(sample.images, logits) == kept).t().to(torch.float32)
        return {self.name: curve.mean(1), "curve": curve}
