"""Faithfulness metrics agree with Quantus 0.6 where definitions coincide; where they do not, what it does instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import classifier, normal
from torch import Tensor, nn

from ramp_fast.metrics import (
    AOPC,
    IROF,
    ROAD,
    Deletion,
    FaithfulnessCorrelation,
    Infidelity,
    Monotonicity,
    MonotonicityCorrelation,
    Sufficiency,
)
from ramp_fast.metrics._maps import Sign

quantus = pytest.importorskip("quantus")

pytestmark = pytest.mark.filterwarnings("ignore")  # Quantus explains itself in warnings
COUNT, SIZE = 3, 8
TARGET = torch.tensor([0, 3, 1])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # Quantus computes outputs in float32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return classifier().float()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return normal(COUNT, 3, SIZE, SIZE, seed=7).float()


@pytest.fixture(scope="module", params=[1, 3])
def maps(request: pytest.FixtureRequest) -> Tensor:
    return normal(COUNT, request.param, SIZE, SIZE, seed=8).float()


def theirs(
    metric: Any, model: nn.Module, images: Tensor, maps: Tensor, *, softmax: bool = True, batch_size: int = 64
) -> np.ndarray:
    found = metric(
        model=model,
        x_batch=images.numpy().copy(),
        y_batch=TARGET.repeat(4)[: len(images)].numpy(),
        a_batch=maps.numpy().copy(),
        channel_first=True,
        softmax=softmax,
        batch_size=batch_size,
        device="cpu",
    )
    return np.asarray(found, dtype=np.float64)


def quiet(name: str, **settings: Any) -> Any:
    """A metric of Quantus that takes maps as they are and returns a value per image."""
    return getattr(quantus, name)(
        **{"normalise": False, "abs": False, "return_aggregate": False, "disable_warnings": True, **settings}
    )


def test_pixel_flipping(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    if maps.shape[1] == 1:
        maps = maps + torch.tensor([0.0, 1e-3, 2e-3]).view(1, 3, 1, 1)  # they sort equal scores in no order
    expected = theirs(quiet("PixelFlipping", features_in_step=16), model, images, maps)
    metric = Deletion(model, granularity="entry", baseline="black", steps=12)
    np.testing.assert_allclose(metric.update(images, TARGET, None, maps=maps)["curve"][:, 1:], expected, **CLOSE)


def test_region_perturbation(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    for order, sign in (("morf", 1), ("lerf", -1)):
        expected = theirs(
            quiet("RegionPerturbation", patch_size=2, regions_evaluation=11, order=order), model, images, maps
        )
        metric = AOPC(model, granularity="patch:2", baseline="black", regions=11)
        found = metric.update(images, TARGET, None, maps=sign * maps)["curve"]
        np.testing.assert_allclose(found[:, 1:], expected, **CLOSE)


def test_selectivity(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    expected = theirs(quiet("Selectivity", patch_size=2), model, images, maps)
    metric = Deletion(model, granularity="patch:2", baseline="black", steps=16)
    np.testing.assert_allclose(metric.update(images, TARGET, None, maps=maps)["curve"][:, 1:], expected, **CLOSE)


def test_road() -> None:
    """Of images with one channel: their imputation takes no others with fewer maps."""
    model = classifier(channels=1, seed=3).float()
    images, maps = normal(COUNT, 1, SIZE, SIZE, seed=7).float(), normal(COUNT, 1, SIZE, SIZE, seed=8).float()
    percentages = [5, 20, 40, 60, 80, 95]
    metric = quiet("ROAD", noise=0.0, percentages=percentages)
    scores = metric(
        model=model,
        x_batch=images.numpy().copy(),
        y_batch=model(images).argmax(1).numpy(),
        a_batch=maps.numpy().copy(),
        channel_first=True,
        softmax=True,
        device="cpu",
    )
    found = ROAD(model, noise=0.0, percentages=percentages).update(images, None, None, maps=maps)["curve"]
    np.testing.assert_allclose(found.mean(0), [scores[p] for p in percentages], **CLOSE)
    assert 0 < float(found.mean()) < 1
    # and what is imputed, to the last pixel
    from quantus.functions.perturb_func import noisy_linear_imputation

    from ramp_fast.metrics.baselines import impute

    masked = maps > 0
    for image, mask, ours in zip(images, masked, impute(images.double(), masked), strict=True):
        indices = mask.flatten().nonzero().flatten().numpy()
        np.testing.assert_allclose(ours, noisy_linear_imputation(image.numpy(), indices, noise=0.0), **CLOSE)


def test_irof(monkeypatch: pytest.MonkeyPatch, model: nn.Module, images: Tensor, maps: Tensor) -> None:
    """They count from the first step on and by segments instead of by their share; baselines that are numbers agree."""
    if not hasattr(np, "trapz"):  # NumPy 2.4 has taken away what they call
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)

    def mask_all_channels(arr: np.ndarray, mask: np.ndarray, **kwargs: Any) -> np.ndarray:
        return np.where(mask, kwargs["perturb_baseline"], arr).astype(arr.dtype)

    with pytest.raises(AssertionError, match="shape of arr must be the same as the mask"):
        theirs(quiet("IROF", perturb_baseline=0.25), model, images, maps)  # only one channel is possible
    expected = theirs(quiet("IROF", perturb_baseline=0.25, perturb_func=mask_all_channels), model, images, maps)
    found = IROF(model, baseline=0.25).update(images, TARGET, None, maps=maps)
    drops = AOPC(model, granularity="superpixel", baseline=0.25, regions=1).update(images, TARGET, None, maps=maps)
    whole = model(images).softmax(1).detach()[torch.arange(COUNT), TARGET]
    first_step = 1 - drops["curve"][:, 1] / whole
    np.testing.assert_allclose(found["irof"] * found["segments"] + (1 + first_step) / 2, expected, **CLOSE)


def test_irof_of_one_channel_hangs_on_the_batch_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(np, "trapz"):
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    model = classifier(channels=1).float()
    images, maps = normal(COUNT, 1, SIZE, SIZE, seed=7).float(), normal(COUNT, 1, SIZE, SIZE, seed=8).float()
    alone, together = (theirs(quiet("IROF"), model, images, maps, batch_size=size) for size in (1, COUNT))
    assert not np.allclose(alone, together, rtol=1e-3)


def test_sensitivity_n_is_another_quantity(model: nn.Module, images: Tensor) -> None:
    """Theirs correlates, at every step, what masking by rank has cost so far with the step's sum, over images."""
    maps = normal(COUNT, 3, SIZE, SIZE, seed=8).float()
    step = 16
    expected = theirs(quiet("SensitivityN", features_in_step=step, n_max_percentage=0.75), model, images, maps)
    curve = Deletion(model, granularity="entry", baseline="black", steps=192 // step)
    curves = curve.update(images, TARGET, None, maps=maps)["curve"].double()
    drops = (curves[:, :1] - curves[:, 1:]).numpy()
    sums = maps.flatten(1).sort(1, descending=True).values.unflatten(1, (-1, step)).sum(2).numpy()
    found = [np.corrcoef(drops[:, s], sums[:, s])[0, 1] for s in range(len(expected))]
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert len(expected) == 3  # three quarters of the pixels, not of the entries


def test_faithfulness_correlation(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, images: Tensor, maps: Tensor
) -> None:
    samples, subset_size = 14, 20
    metric = FaithfulnessCorrelation(model, granularity="entry", samples=samples, subset_size=subset_size)
    entries = images[0].numel()
    orders = [metric.priorities(i, entries).argsort(1)[:, :subset_size].numpy() for i in range(COUNT)]
    drawn = iter([orders[i][draw] for draw in range(samples) for i in range(COUNT)])

    def choice(count: int, size: int, replace: bool) -> np.ndarray:
        assert (count, size, replace) == (entries, subset_size, False)
        return next(drawn)

    monkeypatch.setattr(np.random, "choice", choice)
    expected = theirs(quiet("FaithfulnessCorrelation", nr_runs=samples, subset_size=subset_size), model, images, maps)
    found = metric.update(images, TARGET, None, maps=maps)["faithfulness_correlation"]
    np.testing.assert_allclose(found, expected, **CLOSE)


def in_place_of(images: Tensor) -> Callable[..., np.ndarray]:
    """Shows the entries of images where they would mask."""

    def show(arr: np.ndarray, indices: np.ndarray, **kwargs: Any) -> np.ndarray:
        shown, rows = arr.copy(), np.arange(len(arr))[:, None]
        shown[rows, indices] = images.flatten(1).numpy()[rows, indices]
        return shown

    return show


@pytest.mark.parametrize("sign", ["absolute", "signed"])
def test_monotonicity(model: nn.Module, sign: Sign) -> None:
    images, maps = (normal(12, 3, SIZE, SIZE, seed=seed).float() for seed in (7, 8))
    settings: dict[str, Any] = {"features_in_step": 64, "abs": sign == "absolute"}
    expected = theirs(quiet("Monotonicity", perturb_func=in_place_of(images), **settings), model, images, maps)
    metric = Monotonicity(model, granularity="entry", steps=3, sign=sign)
    found = metric.update(images, TARGET.repeat(4), None, maps=maps)["monotonicity"]
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.sum() < 12
    # as it comes it masks the baseline with the baseline: every map is monotonous
    assert theirs(quiet("Monotonicity", **settings), model, images, maps).all()


@pytest.mark.parametrize("sign", ["absolute", "signed"])
@pytest.mark.parametrize("baseline", ["black", "white"])
def test_monotonicity_correlation(model: nn.Module, images: Tensor, sign: Sign, baseline: str) -> None:
    maps = normal(COUNT, 3, SIZE, SIZE, seed=8).float()
    quantus_metric = quiet(
        "MonotonicityCorrelation", features_in_step=16, nr_samples=1, abs=sign == "absolute", perturb_baseline=baseline
    )
    expected = theirs(quantus_metric, model, images, maps)
    metric = MonotonicityCorrelation(model, granularity="entry", groups=12, sign=sign, baseline=baseline)
    found = metric.update(images, TARGET, None, maps=maps)["monotonicity_correlation"]
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("sign", ["absolute", "signed"])
def test_sufficiency(model: nn.Module, sign: Sign) -> None:
    images, maps = (normal(20, channels, SIZE, SIZE, seed=8).float() for channels in (3, 1))
    maps += 2 * maps[:5].repeat(4, 1, 1, 1)  # five kinds
    metric = Sufficiency(model, sign=sign, threshold=0.8)
    first, second = (
        metric.update(part, 0, None, maps=m) for part, m in zip(images.split(10), maps.split(10), strict=True)
    )
    for batch_size, found in ((10, torch.cat([first["sufficiency"], second["sufficiency"]])), (20, None)):
        quantus_metric = quiet("Sufficiency", threshold=0.8, abs=sign == "absolute")
        expected = quantus_metric(
            model=model,
            x_batch=images.numpy().copy(),
            y_batch=np.zeros(20, dtype=int),
            a_batch=maps.numpy().copy(),
            channel_first=True,
            softmax=True,
            batch_size=batch_size,
            device="cpu",
        )
        ours = metric.compute().values["sufficiency"] if found is None else found
        np.testing.assert_allclose(ours.nan_to_num(0), expected, **CLOSE)
        assert len(set(np.round(expected, 3))) > 2


def test_infidelity(model: nn.Module, images: Tensor, maps: Tensor) -> None:
    def ours(**settings: Any) -> Tensor:
        metric = Infidelity(model, baseline="black", samples=None, **settings)
        return metric.update(images, TARGET, None, maps=maps)["infidelity"]

    # one square: the whole image
    whole = quiet("Infidelity", perturb_patch_sizes=[SIZE], n_perturb_samples=2)
    np.testing.assert_allclose(
        ours(sizes=(SIZE,)), theirs(whole, model, images, maps, softmax=False), rtol=1e-5, atol=1e-6
    )

    # all squares of one pixel, if every one is masked in the image itself
    def mask(arr: np.ndarray, indices: np.ndarray, **kwargs: Any) -> np.ndarray:
        masked = images.flatten(1).numpy().copy()
        masked[np.arange(len(masked))[:, None], indices] = masked.min(1, keepdims=True)
        return masked

    single = quiet("Infidelity", perturb_patch_sizes=[1], n_perturb_samples=1, perturb_func=mask)
    expected = theirs(single, model, images, maps, softmax=False)
    np.testing.assert_allclose(ours(sizes=(1,)), expected, **CLOSE)
    # as it comes squares stay masked, and repetitions repeat
    kept, again = (
        theirs(quiet("Infidelity", perturb_patch_sizes=[1], n_perturb_samples=n), model, images, maps, softmax=False)
        for n in (1, 2)
    )
    assert not np.allclose(kept, expected, rtol=0.1)
    np.testing.assert_allclose(kept, again, rtol=1e-6)
