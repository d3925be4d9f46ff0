"""Agreement with Quantus 0.6 on the same images, maps and draws.

Quantus divides maps by the largest value of all images that it gets at once, so it gets them one by one where that
matters. Maps have one channel, as Quantus' own examples make them: both then measure the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ramp_fast import metrics
from ramp_fast.methods import input_x_gradient

quantus = pytest.importorskip("quantus")

# 17: every pixel is under a filter of stride 2, so that no two entries of a map are equal
SIZE, COUNT, CLASSES = 17, 5, 6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, CLASSES)
    ).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def target() -> Tensor:
    return torch.arange(COUNT) % CLASSES


@pytest.fixture(scope="module")
def masks() -> Tensor:
    return torch.rand(COUNT, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) < 0.4


def method(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Input x gradient, negative relevance halved: a sum near 0 would magnify the rounding of Quantus' float32 sums."""
    maps = input_x_gradient(model, images, target).sum(1, keepdim=True)
    return torch.where(maps > 0, maps, maps / 2)


def explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
    """The method as Quantus calls it."""
    return method(model, torch.as_tensor(inputs), torch.as_tensor(targets)).numpy()


def theirs(
    name: str,
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    masks: Tensor | None = None,
    at_once: int = 1,
    **settings: Any,
) -> list[float]:
    values: list[float] = []
    for start in range(0, COUNT, at_once):
        here = slice(start, start + at_once)
        metric = getattr(quantus, name)(disable_warnings=True, **settings)
        x, y = images[here].numpy(), target[here].numpy()
        values += metric(
            model=model,
            x_batch=x,
            y_batch=y,
            a_batch=explain(model, x, y),
            s_batch=None if masks is None else masks[here].numpy(),
            explain_func=explain,
            device="cpu",
        )
    return [float(v) for v in values]


def agree(ours: Tensor, expected: list[float], spread: float = 1e-3) -> None:
    """Equal, and not all the same, so that there is something to agree in."""
    assert max(expected) - min(expected) > spread
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("Sparseness", metrics.Sparseness),
        ("Complexity", metrics.Complexity),
        ("EffectiveComplexity", metrics.EffectiveComplexity),
    ],
)
def test_complexity(
    model: nn.Module, images: Tensor, target: Tensor, name: str, ours: Callable[..., metrics.Metric]
) -> None:
    settings = {"eps": 0.1} if name == "EffectiveComplexity" else {}
    metric = ours(model, **settings)
    found = metric.update(images, target, method)[metric.name]
    agree(found, theirs(name, model, images, target, **settings))


@pytest.mark.parametrize(
    ("name", "ours", "settings", "theirs_settings"),
    [
        ("PointingGame", metrics.PointingGame, {}, {}),
        ("PointingGame", metrics.PointingGame, {"sign": "absolute"}, {"abs": True}),
        ("RelevanceMassAccuracy", metrics.RelevanceMassAccuracy, {"sign": "signed"}, {}),
        ("RelevanceMassAccuracy", metrics.RelevanceMassAccuracy, {"sign": "absolute"}, {"abs": True}),
        ("RelevanceRankAccuracy", metrics.RelevanceRankAccuracy, {}, {}),
        ("RelevanceRankAccuracy", metrics.RelevanceRankAccuracy, {"sign": "absolute"}, {"abs": True}),
        ("TopKIntersection", metrics.TopKIntersection, {"k": 30}, {"k": 30}),
        (
            "TopKIntersection",
            metrics.TopKIntersection,
            {"k": 30, "concept_influence": True, "sign": "absolute"},
            {"k": 30, "concept_influence": True, "abs": True},
        ),
    ],
)
def test_localisation(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    masks: Tensor,
    name: str,
    ours: Callable[..., metrics.Metric],
    settings: dict[str, Any],
    theirs_settings: dict[str, Any],
) -> None:
    metric = ours(model, **settings)
    found = metric.update(images, target, method, masks=masks)[metric.name]
    agree(found, theirs(name, model, images, target, masks, at_once=COUNT, **theirs_settings))


@pytest.mark.parametrize(
    ("name", "ours"), [("MaxSensitivity", metrics.MaxSensitivity), ("AvgSensitivity", metrics.AvgSensitivity)]
)
def test_sensitivity(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    ours: Callable[..., metrics.Metric],
) -> None:
    seen: list[Tensor] = []

    def watched(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        seen.append(images)
        return method(model, images, target)

    samples = 6
    metric = ours(model, samples=samples)
    found = metric.update(images, target, watched)[metric.name]
    noise = (torch.cat(seen)[COUNT:].view(COUNT, samples, -1) - images.flatten(1).unsqueeze(1)).double().numpy()
    draws = iter(range(samples))

    def uniform(low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        assert (low, high) == (-0.2, 0.2)  # Quantus' default is ours
        return noise[:, next(draws)].reshape(size)

    monkeypatch.setattr(np.random, "uniform", uniform)
    agree(found, theirs(name, model, images, target, at_once=COUNT, nr_samples=samples))
    assert next(draws, None) is None


def flat_to_image(a: np.ndarray, b: np.ndarray, batched: bool) -> list[float]:
    """Quantus' own SSIM, given maps instead of rows."""
    shape = (SIZE, SIZE)
    return [quantus.similarity_func.ssim(u.reshape(shape), v.reshape(shape)) for u, v in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    ("similarity", "theirs_similarity"),
    [
        ("ssim_flat", None),
        ("ssim", flat_to_image),
        ("spearman", quantus.similarity_func.correlation_spearman),
        ("pearson", quantus.similarity_func.correlation_pearson),
    ],
)
def test_random_logit(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    similarity: str,
    theirs_similarity: Callable[..., Any] | None,
) -> None:
    metric = metrics.RandomLogit(model, similarity)
    found = metric.update(images, target, method)
    other = iter((found["other"] - (found["other"] > target).long()).tolist())  # counted without the target

    def randint(low: int, high: int, size: int) -> np.ndarray:
        assert (low, high, size) == (0, CLASSES - 1, 1)
        return np.array([next(other)])

    monkeypatch.setattr(np.random, "randint", randint)
    expected = theirs("RandomLogit", model, images, target, num_classes=CLASSES, similarity_func=theirs_similarity)
    agree(found["random_logit"], expected)


class SameSeed(metrics.ParameterRandomisation):
    """Starts every layer from the same numbers, as Quantus does with its default seed."""

    def generator(self, number: int, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(43)


def test_parameter_randomisation(model: nn.Module, images: Tensor, target: Tensor) -> None:
    found = SameSeed(model, stages=None).update(images, target, method)["similarity"]
    metric = quantus.MPRT(disable_warnings=True)
    expected = metric(
        model=model,
        x_batch=images.numpy(),
        y_batch=target.numpy(),
        a_batch=None,
        explain_func=explain,
        device="cpu",
    )
    layers = [name for name in expected if name != "original"]
    assert layers == ["5", "2", "0"]
    for stage, layer in enumerate(layers):
        agree(found[:, stage], expected[layer])


def test_defaults(model: nn.Module) -> None:
    for name, ours in (
        ("EffectiveComplexity", metrics.EffectiveComplexity(model)),
        ("TopKIntersection", metrics.TopKIntersection(model)),
        ("MaxSensitivity", metrics.MaxSensitivity(model)),
        ("AvgSensitivity", metrics.AvgSensitivity(model)),
    ):
        known = inspect.signature(getattr(quantus, name)).parameters
        shared = {k: v for k, v in ours.settings().items() if k in known}
        assert len(shared) >= 1
        assert shared == {k: known[k].default for k in shared}


def test_differences_that_docstrings_tell_of(model: nn.Module, images: Tensor, target: Tensor, masks: Tensor) -> None:
    """If Quantus changes in one of them, its docstring is to change too."""
    quiet: dict[str, Any] = {"disable_warnings": True}
    pixel = np.zeros((1, 1, 224, 224))
    pixel[..., 3, 4] = 1
    blank = np.zeros((1, 3, 224, 224))
    labels = np.zeros(1, dtype=int)
    found = quantus.Sparseness(**quiet)(model=None, x_batch=blank, y_batch=labels, a_batch=pixel)
    assert found == pytest.approx([0.995], abs=1e-4)
    ours = metrics.Sparseness(model).update(torch.zeros(1, 3, 224, 224), None, None, maps=torch.as_tensor(pixel))
    assert ours["sparseness"].item() == pytest.approx(0.99998, abs=1e-5)

    empty = masks.clone()
    empty[0] = False
    assert theirs("PointingGame", model, images, target, empty, at_once=COUNT)[0] == 1
    settings = {"eps": 0.3}
    alone = theirs("EffectiveComplexity", model, images, target, **settings)
    assert theirs("EffectiveComplexity", model, images, target, at_once=COUNT, **settings) != alone
