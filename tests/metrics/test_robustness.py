"""Max- and average sensitivity: against their definition, and what they do not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ramp_fast import InputError
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import AvgSensitivity, MaxSensitivity, Metric

SIZE = 16
BOTH = (MaxSensitivity, AvgSensitivity)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Recorder:
    """Input x gradient that keeps what it was asked for."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.targets: list[Tensor] = []

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        self.images.append(images)
        self.targets.append(target)
        return input_x_gradient(model, images, target)


def test_definition(model: nn.Module, images: Tensor) -> None:
    method, samples = Recorder(), 4
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    found = MaxSensitivity(model, samples=samples).update(images, target, method)
    seen = torch.cat(method.images)
    start, noisy = seen[:6], seen[6:].view(6, samples, *images.shape[1:])
    assert torch.equal(start, images)
    assert torch.equal(torch.cat(method.targets), torch.cat([target, target.repeat_interleave(samples)]))
    for n in range(6):
        before = input_x_gradient(model, images[n : n + 1], target[n : n + 1])
        changes = []
        for draw in range(samples):
            after = input_x_gradient(model, noisy[n, draw].unsqueeze(0), target[n : n + 1])
            changes.append(float((after - before).norm() / before.norm()))
        assert found["max_sensitivity"][n].item() == pytest.approx(max(changes), rel=1e-9)
        assert found["change"][n].tolist() == pytest.approx(changes, rel=1e-9)
    average = AvgSensitivity(model, samples=samples).update(images, target, input_x_gradient)
    torch.testing.assert_close(average["change"], found["change"], rtol=0, atol=0)
    torch.testing.assert_close(average["avg_sensitivity"], found["change"].mean(1))


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [({}, -0.2, 0.2), ({"lower_bound": 1.5}, -1.5, 1.5), ({"lower_bound": -0.1, "upper_bound": 0.4}, -0.1, 0.4)],
)
def test_noise_is_uniform(model: nn.Module, images: Tensor, settings: dict[str, Any], low: float, high: float) -> None:
    method = Recorder()
    MaxSensitivity(model, samples=10, **settings).update(images, None, method)
    noise = torch.cat(method.images)[6:].view(6, 10, -1) - images.flatten(1).unsqueeze(1)
    width = high - low
    assert low <= noise.min() < low + 0.01 * width
    assert high - 0.01 * width < noise.max() <= high
    count = noise.numel()
    assert abs(noise.mean() - (low + high) / 2) < 4 * width / math.sqrt(12 * count)
    assert abs(noise.var() - width**2 / 12) < 4 * width**2 * math.sqrt(1 / 180 / count)
    rows = noise.flatten(0, 1) - noise.mean()
    alike = torch.corrcoef(rows) - torch.eye(60, dtype=torch.float64)
    assert alike.abs().max() < 5 / math.sqrt(rows.shape[1])  # no two draws are the same, of any image


def test_maps_that_do_not_change_and_maps_that_follow(model: nn.Module, images: Tensor) -> None:
    def fixed(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return torch.ones_like(images[:, :1])

    def follow(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return images

    for metric in BOTH:
        assert (metric(model, samples=3).update(images, None, fixed)[metric.name] == 0).all()
    small, large = (
        MaxSensitivity(model, samples=3, lower_bound=bound).update(images, None, follow)["max_sensitivity"]
        for bound in (0.1, 0.2)
    )
    torch.testing.assert_close(large, 2 * small, rtol=1e-6, atol=0)
    expected = 0.2 / math.sqrt(3) * math.sqrt(images[0].numel()) / images.flatten(1).norm(dim=1)
    average = AvgSensitivity(model, samples=20).update(images, None, follow)["avg_sensitivity"]
    torch.testing.assert_close(average, expected, rtol=0.05, atol=0)


def test_results_do_not_depend_on_batches(model: nn.Module, images: Tensor) -> None:
    for metric in BOTH:
        whole = metric(model, samples=5)
        whole.update(images, None, input_x_gradient)
        for batch_size, sizes in ((1, [6]), (7, [1, 3, 2]), (None, [4, 2])):
            pieces = metric(model, samples=5, batch_size=batch_size)
            for part in images.split(sizes):
                pieces.update(part, None, input_x_gradient)
            for name, expected in whole.compute().values.items():
                torch.testing.assert_close(pieces.compute().values[name], expected, rtol=1e-9, atol=0)


def test_no_more_than_a_batch_is_held(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    method, metric, held = Recorder(), MaxSensitivity(model, samples=5, batch_size=4), []
    attribute = metric.attribute

    def watched(method: Recorder, images: Tensor, target: Tensor, model: nn.Module | None) -> Tensor:
        held.append(len(images))
        return attribute(method, images, target, model)

    monkeypatch.setattr(metric, "attribute", watched)
    metric.update(images, None, method)
    assert held == [6, *[4] * 7, 2]
    assert [len(i) for i in method.images] == [4, 2, *[4] * 7, 2]  # full batches, of several images


def test_seeds(model: nn.Module, images: Tensor) -> None:
    def change(metric: Metric, images: Tensor) -> Tensor:
        return metric.update(images, None, input_x_gradient)["change"]

    state = torch.get_rng_state()
    first = change(MaxSensitivity(model, samples=3), images)
    assert torch.equal(change(MaxSensitivity(model, samples=3), images), first)
    assert not torch.isclose(change(MaxSensitivity(model, samples=3, seed=1), images), first).any()
    more = change(MaxSensitivity(model, samples=4), images)
    torch.testing.assert_close(more[:, :3], first, rtol=1e-9, atol=0)
    same = images[:1].repeat(2, 1, 1, 1)
    twice = change(MaxSensitivity(model, samples=2), same)
    assert twice.flatten().unique().numel() == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_a_map_of_zeros_has_no_value(model: nn.Module, images: Tensor) -> None:
    maps = input_x_gradient(model, images, torch.zeros(6).long())
    maps[2] = 0
    for metric in BOTH:
        found = metric(model, samples=2).update(images, 0, input_x_gradient, maps=maps)
        assert found[metric.name].isnan().tolist() == [n == 2 for n in range(6)]


@pytest.mark.parametrize("metric", BOTH)
def test_what_does_not_fit(model: nn.Module, images: Tensor, metric: type[MaxSensitivity | AvgSensitivity]) -> None:
    maps = images.sum(1, keepdim=True)
    one = metric(model, samples=2)
    for call, problem in (
        (lambda: one.update(images, None, None, maps=maps), " asks the method for maps of its own"),
        (lambda: one.update(images, None, input_x_gradient, maps=maps), r": the maps given are \[1, 16, 16\]"),
        (lambda: metric(model, samples=0), ": samples must be a positive integer, got 0"),
        (lambda: metric(model, lower_bound=0), ": no noise lies between 0 and 0"),
        (lambda: metric(model, lower_bound=0.3, upper_bound=0.3), ": no noise lies between 0.3 and 0.3"),
        (lambda: metric(model, lower_bound=math.nan), ": bounds of the noise must be finite numbers, got nan"),
        (lambda: metric(model, upper_bound="1"), ": bounds of the noise must be finite numbers, got '1'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=metric.name + problem):
            call()
    one.update(images[:2], None, input_x_gradient)
    for other in ({"samples": 3}, {"lower_bound": 0.1}, {"upper_bound": 0.3}):
        with pytest.raises(InputError, match="does not fit"):
            metric(model, **{"samples": 2, **other}).load_state_dict(one.state_dict())  # type: ignore[arg-type]
