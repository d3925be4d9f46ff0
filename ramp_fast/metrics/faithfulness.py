"""Metrics that compare maps with what the model does under perturbations: correlations, infidelity, monotonicity and
sufficiency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ramp_fast import ops
from ramp_fast._checks import is_whole, positive
from ramp_fast._ranges import ranges
from ramp_fast.errors import InputError
from ramp_fast.explainer import Model
from ramp_fast.metrics._counts import check_bytes, checked_count
from ramp_fast.metrics._maps import Sign, checked_sign, pearson, spearman, with_sign
from ramp_fast.metrics.base import Metric, MetricInputs, Result
from ramp_fast.metrics.baselines import Baseline
from ramp_fast.metrics.curves import Masking, Shares
from ramp_fast.metrics.features import Granularity, Superpixels, kind_of_feature

# Streams of random numbers: baselines are drawn from 0 on, one for each repetition.
_SUBSETS = 1 << 32

PERTURBATIONS = ("square", "gaussian", "noisy_baseline")


class _Subsets(Masking):
    """Random subsets of features: how the sums of their maps go with what the output loses when they are masked."""

    def __init__(self, model: Model, *, samples: int = 100, **masking: Any) -> None:
        super().__init__(model, **masking)
        checked_count(self.name, "samples", samples)
        self.samples = samples

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "samples": self.samples}

    def priorities(self, number: int, count: int) -> Tensor:
        """``[samples, count]``: the subset of n features of a draw are the n smallest."""
        return torch.rand(self.samples, count, generator=self.generator(number, _SUBSETS), device="cpu")

    def correlations(self, sample: MetricInputs, sizes: Sequence[int] | Sequence[float]) -> Tensor:
        """Pearson's over the subsets, ``[N, sizes]``; sizes are numbers of features or shares of them, ascending."""
        images, maps, fill = sample.images, sample.maps, self.filling(sample)
        found = []
        for start, stop in ranges(images.shape[0], max(1, self.together(images) // (self.samples * len(sizes)))):
            here = slice(start, stop)
            features = self.granularity.of(images[here], maps[here])
            width = features.scores.shape[1]
            each = (stop - start) * (4 * images[0].numel() + 16 * width)
            check_bytes(self.name, f"samples={self.samples}", self.samples * each)
            counts = torch.as_tensor(features.counts, device="cpu").expand(stop - start).tolist()
            orders = [
                self._steps(number, count, width, sizes, images.device)
                for number, count in zip(sample.numbers[here], counts, strict=True)
            ]
            steps = torch.stack(orders, 1)  # [samples, n, M]
            rows = torch.arange(start, stop, device=images.device).repeat(self.samples)
            spread = features.spread(steps).flatten(0, 1)
            logits = self.logits_of_copies(images[rows], fill.of(rows), spread, len(sizes))
            outputs = self.watched(sample, logits, sample.target[rows]).unflatten(1, (self.samples, stop - start))
            drops = self.watched(sample, sample.logits[here], sample.target[here]) - outputs  # [sizes, samples, n]
            sums = torch.stack([((steps <= s) * features.sums.double()).sum(-1) for s in range(len(sizes))])
            found.append(pearson(sums.movedim(1, -1), drops.movedim(1, -1)).t())
        return torch.cat(found)

    def _steps(
        self, number: int, count: int, width: int, sizes: Sequence[int] | Sequence[float], device: torch.device
    ) -> Tensor:
        """When each of ``width`` features is masked, ``[samples, width]``; an image has the first ``count``."""
        ks = [n if isinstance(n, int) else max(1, int(n * count)) for n in sizes]
        if ks[-1] > count:
            raise InputError(
                f"{self.name}: subsets of {ks[-1]} features of an image that has {count}: take smaller subsets, or a "
                f"finer granularity"
            )
        steps = torch.full((self.samples, width), len(ks), dtype=torch.int32, device=device)
        steps[:, :count] = ops.mask_steps(self.priorities(number, count).to(device), ks, False)
        return steps


class SensitivityN(_Subsets):
    """Sensitivity-n: whether the map's sum over n features goes with what the output loses when they are masked.

    ``sensitivity_n`` is the mean over the sizes n of ``correlations`` ``[N, sizes]``: Pearson's, over ``samples``
    random subsets of n features, of ``sum R_i`` with ``f(x) - f(x without them)``; in [-1, 1], higher is better. Ancona
    et al. 2018, arXiv 1711.06104 (section 4), who take 100 subsets of 1 to 80 % of the features. A correlation is NaN
    where sums or losses are all the same, and is left out of the mean then.

    Quantus' SensitivityN is another quantity, of no single image: it masks features in the order of the map, and
    correlates, for every step, the loss so far with the sum of the step's features alone, over the images of the first
    batch.

    Parameters
    ----------
    sizes : sequence of int or of float
        The numbers n, ascending, or shares of the features in (0, 1), rounded down but at least one.
    samples : int
        Subsets of every size.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`. Maps of superpixels are summed here, not averaged.
    """

    name = "sensitivity_n"
    higher_is_better = True

    def __init__(
        self, model: Model, *, sizes: Sequence[int] | Sequence[float] = (0.01, 0.03, 0.1, 0.3, 0.8), **subsets: Any
    ) -> None:
        super().__init__(model, **subsets)
        numbers = all(is_whole(n) for n in sizes)
        shares = all(isinstance(n, float) and 0 < n < 1 for n in sizes)
        if not sizes or not (numbers or shares) or sorted(sizes) != list(sizes):
            raise InputError(
                f"{self.name}: sizes must ascend and be positive integers, or shares between 0 and 1; got {list(sizes)}"
            )
        self.sizes = tuple(sizes)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sizes": list(self.sizes)}

    def axis(self) -> dict[str, Any]:
        what = "features" if isinstance(self.sizes[0], int) else "share of features"
        return {"label": f"{what} masked", "values": list(self.sizes), "curves": ["correlations"]}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        found = self.correlations(sample, self.sizes)
        return {self.name: found.nanmean(1), "correlations": found}


class FaithfulnessCorrelation(_Subsets):
    """Faithfulness correlation: of the map's sums over random subsets of features with what the output loses.

    Pearson's over ``samples`` subsets of ``subset_size`` features, of ``sum R_i`` with ``f(x) - f(x without them)``; in
    [-1, 1], higher is better; NaN where sums or losses are all the same. Bhatt et al. 2020, arXiv 2005.00631. As
    Quantus', whose features are entries (channels of pixels).

    Parameters
    ----------
    subset_size : int
        Features of a subset.
    samples : int
        Subsets.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`; the baseline is "black" by default. Maps of superpixels are summed here, not averaged.
    """

    name = "faithfulness_correlation"
    higher_is_better = True
    usual_baseline = "black"

    def __init__(self, model: Model, *, subset_size: int = 224, **subsets: Any) -> None:
        super().__init__(model, **subsets)
        positive(self.name, "subset_size", subset_size)
        self.subset_size = subset_size

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "subset_size": self.subset_size}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        return {self.name: self.correlations(sample, (self.subset_size,)).squeeze(1)}


class Infidelity(Masking):
    """Infidelity: how far the map is from saying what the output loses under perturbations of the image.

    ``infidelity = E[(I . R - (f(x) - f(x - I)))^2]`` over perturbations I, at least 0, lower is better. Yeh et al.
    2019, arXiv 1901.09392. A map of one channel counts for all channels of an image. The authors' code adds up R alone
    for squares (``times_input``) and scales every map by the factor that suits it best (``rescaled``).

    Quantus' Infidelity masks the squares of a grid one after the other without putting back those before, in the same
    order every time, so that "black" repeats one number ``n_perturb_samples`` times; both agree where there is one
    square. It fails where squares do not tile the image.

    Parameters
    ----------
    perturbation : {"square", "gaussian", "noisy_baseline"}
        "square": I is what masking a random square takes away. "gaussian": I is noise. "noisy_baseline": ``x - I`` is
        the baseline and noise (what the authors' code calls Gaussian, and clips to [0, 1]).
    samples : int or None
        Perturbations of an image; None: every square of every size once.
    sizes : sequence of int
        Of squares in pixels; all places of all sizes are equally likely.
    sigma : float
        Standard deviation of noise, in the units of the images.
    times_input : bool
        Maps hold contributions, as those of LRP or input x gradient do: a change of the image times a slope already.
        Then a square's sum takes the place of ``I . R``, and a map of one channel counts once. For squares only.
    rescaled : bool
        Every map is multiplied by the factor of least infidelity first: what is left is no matter of scale.
    baseline, output, noise, seed, batch_size
        As for :class:`Masking`; the output is "logit" by default.
    """

    name = "infidelity"
    higher_is_better = False

    def __init__(
        self,
        model: Model,
        *,
        perturbation: str = "square",
        samples: int | None = 1000,
        sizes: Sequence[int] = tuple(range(1, 11)),
        sigma: float = 0.2,
        times_input: bool = False,
        rescaled: bool = False,
        baseline: Baseline | None = None,
        output: str = "logit",
        noise: float = 0.01,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, baseline=baseline, output=output, noise=noise, seed=seed, batch_size=batch_size)
        if perturbation not in PERTURBATIONS:
            raise InputError(
                f"infidelity: perturbation must be one of {', '.join(PERTURBATIONS)}, got {perturbation!r}"
            )
        if samples is not None:
            checked_count(self.name, "samples", samples)
        elif perturbation != "square":
            raise InputError("infidelity: samples=None takes every square: perturbations by noise need a number")
        if not sizes or not all(is_whole(s) for s in sizes):
            raise InputError(f"infidelity: sizes must be positive numbers of pixels, got {list(sizes)}")
        if not sigma > 0:
            raise InputError(f"infidelity: sigma must be positive, got {sigma!r}")
        if times_input and perturbation != "square":
            raise InputError(f"infidelity: times_input goes with squares, not with perturbation {perturbation!r}")
        self.perturbation, self.samples, self.sizes, self.sigma = perturbation, samples, tuple(sizes), sigma
        self.times_input, self.rescaled = times_input, rescaled

    def settings(self) -> dict[str, Any]:
        found = {
            **super().settings(),
            "perturbation": self.perturbation,
            "samples": self.samples,
            "times_input": self.times_input,
            "rescaled": self.rescaled,
            **({"sizes": list(self.sizes)} if self.perturbation == "square" else {"sigma": self.sigma}),
        }
        del found["granularity"]  # squares have sizes of their own, and noise is everywhere
        return found

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        images, maps, fill = sample.images, sample.maps, self.filling(sample)
        height, width = images.shape[2:]
        if self.perturbation == "square" and max(self.sizes) > min(height, width):
            raise InputError(
                f"infidelity: squares of {max(self.sizes)} pixels do not fit images {height} x {width}: "
                f"give smaller sizes"
            )
        whole = self.watched(sample, sample.logits, sample.target)
        values = []
        for i, number in enumerate(sample.numbers):
            generator = self.generator(number, _SUBSETS)
            squares = self._squares(generator, height, width)
            products, drops = [], []
            for first, last in ranges(squares.shape[0], self.together(images)):
                rows = torch.full((last - first,), i, device=images.device)
                image, explained = images[rows], maps[i : i + 1]
                if self.perturbation == "square":
                    inside = _inside(squares[first:last].to(images.device), height, width)
                    copies = fill.of(rows).copies(image, (~inside).to(torch.int32), 0, 1)[0]
                else:
                    # a draw for every copy, so that it does not depend on how many there are together
                    drawn = [
                        torch.randn(images.shape[1:], generator=generator, device="cpu") for _ in range(last - first)
                    ]
                    noise = torch.stack(drawn).to(images) * self.sigma
                    if self.perturbation == "gaussian":
                        copies = image - noise
                    else:
                        everything = torch.zeros_like(image[:, :1], dtype=torch.int32)
                        copies = fill.of(rows).copies(image, everything, 0, 1)[0] + noise
                counted = inside * explained if self.times_input else (image - copies) * explained
                products.append(counted.flatten(1).sum(1, dtype=torch.float64))
                drops.append(whole[i] - self.watched(sample, self.logits(copies), sample.target[i : i + 1]))
            values.append(self._distance(torch.cat(products), torch.cat(drops).double()))
        return {self.name: torch.stack(values)}

    def _distance(self, products: Tensor, drops: Tensor) -> Tensor:
        if self.rescaled:
            # a map that is zero everywhere stays so
            factor = (products * drops).sum() / (products * products).sum().clamp_min(torch.finfo(torch.float64).tiny)
            products = products * factor
        return (products - drops).square().mean()

    def _squares(self, generator: torch.Generator, height: int, width: int) -> Tensor:
        """Size, row and column of every sample's square, ``[K, 3]``, on the CPU; of noise there is only how many."""
        if self.perturbation != "square":
            return torch.empty(self.samples or 0, 0, device="cpu")
        places = torch.tensor([(height - s + 1) * (width - s + 1) for s in self.sizes], device="cpu")
        ends = places.cumsum(0)
        total = int(ends[-1])
        if self.samples is None:
            drawn = torch.arange(total, device="cpu")
        else:
            drawn = torch.randint(total, (self.samples,), generator=generator, device="cpu")
        kind = torch.searchsorted(ends, drawn, right=True)
        size = torch.tensor(self.sizes, device="cpu")[kind]
        place, columns = drawn - (ends - places)[kind], width - size + 1
        return torch.stack([size, place // columns, place % columns], 1)


class Monotonicity(Shares):
    """Monotonicity: whether the output never falls while features are revealed, those with the smallest map first.

    ``monotonicity`` is 1 where it rises or stays at every step, else 0; ``rising`` is the share of steps at which it
    does, in [0, 1]; higher is better. ``curve`` ``[S + 1]`` starts with the baseline, which is compared with nothing.
    Arya et al. 2019, arXiv 1909.03012, and its authors' AIX360, which reveals one feature at a time and takes the map
    with its sign.

    Quantus' Monotonicity fills the image with the baseline and then masks it with the baseline again: nothing is
    revealed, and every map is monotonic. Given a ``perturb_func`` that reveals the image, both agree.

    Parameters
    ----------
    steps : int
        S: after step s ``floor(s M / S)`` of M features are revealed.
    sign : {"absolute", "signed", "positive"}
        What of the map ranks features; absolute values as in Quantus.
    tolerance : float
        A fall up to this does not count: equal images need not have equal outputs to the last bit.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`; the baseline is "black" by default.
    """

    name = "monotonicity"
    higher_is_better = True
    usual_baseline = "black"
    least_steps = 2

    def __init__(
        self, model: Model, *, steps: int = 100, sign: Sign = "absolute", tolerance: float = 1e-6, **masking: Any
    ) -> None:
        super().__init__(model, steps=steps, **masking)
        if not 0 <= tolerance < math.inf:
            raise InputError(f"{self.name}: tolerance must be 0 or more, got {tolerance!r}")
        self.sign, self.tolerance = checked_sign(self.name, sign), tolerance

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sign": self.sign, "tolerance": self.tolerance}

    def axis(self) -> dict[str, Any]:
        return {**super().axis(), "label": "share revealed"}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        features = self.granularity.of(sample.images, with_sign(sample.maps, self.sign))
        steps = features.shares(self.steps + 1, descending=False)
        curve = self.curve(sample, steps, self.steps + 1, reveal=True)
        rising = curve[:, 1:].diff(dim=1) >= -self.tolerance
        return {
            self.name: rising.all(1).to(curve.dtype),
            "rising": rising.to(curve.dtype).mean(1),
            "curve": curve,
        }


class MonotonicityCorrelation(Masking):
    """Monotonicity correlation: whether features with larger maps matter more to the output when they alone change.

    Spearman's correlation, over groups of features of neighbouring rank, of the map's sum over a group with
    ``E[(f(x) - f(x with the group replaced))^2]``, the mean over ``samples`` draws of the baseline; in [-1, 1], higher
    is better, NaN where either is the same for all groups. Nguyen and Martínez 2020, arXiv 2007.07584 (section 3), with
    one feature a group. They divide by ``f(x)^2``, which no rank correlation notices.

    Quantus draws one value in [0, 1] for all of a group; here "uniform" draws every entry between the image's extremes.
    It stops with an error where an image's output is below its ``eps`` and another's is not.

    Parameters
    ----------
    groups : int
        Into how many the features are parted, as even as can be.
    samples : int
        Draws; one for a baseline that is not random.
    sign : {"absolute", "signed", "positive"}
        What of the map counts; absolute values as in the paper and Quantus.
    granularity, baseline, output, noise, seed, batch_size
        As for :class:`Masking`; the baseline is "uniform" by default.
    """

    name = "monotonicity_correlation"
    higher_is_better = True
    usual_baseline = "uniform"

    def __init__(
        self, model: Model, *, groups: int = 100, samples: int = 10, sign: Sign = "absolute", **masking: Any
    ) -> None:
        super().__init__(model, **masking)
        positive(self.name, "groups", groups, least=2)
        checked_count(self.name, "samples", samples)
        self.groups, self.samples, self.sign = groups, samples, checked_sign(self.name, sign)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "groups": self.groups, "samples": self.samples, "sign": self.sign}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        images, device = sample.images, sample.images.device
        features = self.granularity.of(images, with_sign(sample.maps, self.sign))
        counts = torch.as_tensor(features.counts, device=device).view(-1, 1)
        if int(counts.min()) < self.groups:
            raise InputError(
                f"{self.name}: {self.groups} groups of {int(counts.min())} features: take fewer groups, or a finer "
                f"granularity"
            )
        ranks = ops.mask_steps(features.scores, range(1, features.scores.shape[1] + 1), False).long()
        group = ranks * self.groups // counts  # [N, M]; of features that an image does not have, one that is none
        numbers = torch.arange(self.groups, device=device).view(-1, 1, 1)
        whole = self.watched(sample, sample.logits, sample.target)
        random = isinstance(self.baseline, str) and self.baseline in ("uniform", "road")
        squares = torch.zeros(self.groups, images.shape[0], dtype=torch.float64, device=device)
        spread = features.spread(group.to(torch.int32))
        for stream in range(self.samples if random else 1):
            fill = self.filling(sample, stream)
            for start, stop in ranges(images.shape[0], max(1, self.together(images) // self.groups)):
                rows = torch.arange(start, stop, device=device).repeat(self.groups)
                others = spread[start:stop].unsqueeze(0) != numbers.view(-1, 1, 1, 1, 1)
                steps = others.to(torch.int32).flatten(0, 1)
                logits = self.logits_of_copies(images[rows], fill.of(rows), steps, 1)[0]
                outputs = self.watched(sample, logits, sample.target[rows]).unflatten(0, (self.groups, stop - start))
                squares[:, start:stop] += (whole[start:stop] - outputs).double().square()
        sums = ((group == numbers) * features.sums.double()).sum(-1)
        return {self.name: spearman(sums.t(), squares.t())}


class Sufficiency(Metric):
    """Sufficiency: how often images that are explained alike are predicted alike.

    The share of the images explained alike that have its predicted class (its sign, where there is a single logit), in
    [0, 1], higher is better; NaN for an image without any. Two images are alike whose maps are at most ``threshold``
    times the largest distance of any two maps apart; distances are Euclidean with every feature divided by its standard
    deviation. Dasgupta, Frost and Moshkovitz 2022, arXiv 2202.00734, for maps as in Quantus.

    Necessarily an image's value depends on the others: what ``update`` returns is of its images among themselves,
    ``compute`` takes all images so far, which costs the square of their number. ``likes`` says how many an image has.
    Every image's ``signature``, its M scores of features, is kept until then, and M is the same for all images.

    Quantus looks for likes in the batch alone, counts an image without any as 0, and finds none at all where a feature
    is the same in all maps of a batch.

    Parameters
    ----------
    threshold : float
        In [0, 1].
    sign : {"absolute", "signed", "positive"}
        What of the maps is compared; absolute values as in Quantus.
    granularity : str or object
        What maps are compared by: "pixel" as in Quantus, for maps of one channel; "patch:16" stores fewer
        numbers per image. Superpixels differ between images.
    seed, batch_size
        As for :class:`Metric`.
    """

    name = "sufficiency"
    higher_is_better = True
    compares_images = True

    def __init__(
        self,
        model: Model,
        *,
        threshold: float = 0.6,
        sign: Sign = "absolute",
        granularity: str | Granularity = "pixel",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, seed=seed, batch_size=batch_size)
        if not 0 <= threshold <= 1:
            raise InputError(f"sufficiency: threshold must be in [0, 1], got {threshold!r}")
        self.granularity = kind_of_feature(granularity)
        if isinstance(self.granularity, Superpixels):
            raise InputError("sufficiency: superpixels of two images cannot be compared; take pixels or patches")
        self.threshold, self.sign = threshold, checked_sign(self.name, sign)
        self._compared: Result | None = None

    def settings(self) -> dict[str, Any]:
        own = {"threshold": self.threshold, "sign": self.sign, "granularity": self.granularity.name}
        return {**super().settings(), **own}

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        signature = self.granularity.of(sample.images, with_sign(sample.maps, self.sign)).scores
        predicted = self.predictions(sample.images, sample.logits)
        return {**self._among(signature, predicted), "signature": signature, "predicted": predicted}

    def compute(self) -> Result:
        """All values so far, every image among all images; without signatures, which would be most of them."""
        if self._compared is None:  # quadratic in the images, and asked for again and again while nothing is new
            kept = super().compute().values
            self._compared = Result(self.name, self._among(kept["signature"], kept["predicted"]))
        return self._compared

    def state_dict(self) -> dict[str, Any]:
        """Settings, values and signatures, for ``torch.save``."""
        return {**super().state_dict(), "values": super().compute().values if self._values else {}}

    def _add(self, values: dict[str, Tensor], images: int) -> None:
        if self._values:
            before, now = (v["signature"].shape[1] for v in (self._values[0], values))
            if before != now:
                raise InputError(
                    f"sufficiency: maps of {now} features cannot be compared with those before, of {before}: give "
                    f"images of one size"
                )
        self._compared = None
        super()._add(values, images)

    def _among(self, signature: Tensor, predicted: Tensor) -> dict[str, Tensor]:
        signature = signature.double()
        deviation = signature.std(0, correction=0)
        scaled = (signature - signature.mean(0)) / deviation.where(deviation > 0, 1)
        # by products equal maps would not be at distance 0
        distance = torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist")
        alike = distance <= self.threshold * distance.max()
        alike.fill_diagonal_(False)
        likes = alike.sum(1)
        same = alike & (predicted.unsqueeze(1) == predicted)
        return {self.name: same.sum(1).double() / likes, "likes": likes}


def _inside(squares: Tensor, height: int, width: int) -> Tensor:
    """Squares ``[K, 3]`` (size, row, column) as masks ``[K, 1, H, W]``."""
    size, top, left = squares.view(-1, 3, 1, 1, 1).unbind(1)
    row = torch.arange(height, device=squares.device).view(1, 1, -1, 1) - top
    column = torch.arange(width, device=squares.device) - left
    return (row >= 0) & (row < size) & (column >= 0) & (column < size)
