"""Under ``torch.set_default_device`` with another device than the model's: the same maps, logits and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import vit
from torch import Tensor, nn

from ramp_fast import Engine, rules
from ramp_fast.evaluation import evaluate
from ramp_fast.methods import METHODS
from ramp_fast.metrics import METRICS


def cnn() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12)).eval()


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), device="cpu")


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call returns whose tensors without a device have no numbers."""
    torch.set_default_device("meta")
    try:
        return call()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("build", [cnn, vit])
@pytest.mark.parametrize("rule", ["abslrp", "ramp"])
def test_maps(build: Callable[[], nn.Module], rule: str) -> None:
    model, x = build(), images(9, 32 if build is cnn else 16)

    def maps() -> list[Tensor]:
        engine = Engine(model, rule)
        found = engine.attribute(x)
        return [found.maps, found.logits, engine.logits(x)]

    for here, there in zip(maps(), elsewhere(maps), strict=True):
        assert torch.equal(here, there)


def test_conditions() -> None:
    model, x = cnn(), images(2, 32)

    def maps() -> Tensor:
        return Engine(model, rules.Epsilon()).attribute(x, 1, condition=[{"4": [0, 3]}, {"4": [1]}]).maps

    assert torch.equal(maps(), elsewhere(maps))


@pytest.mark.parametrize(
    ("metrics", "methods"),
    [
        (sorted(METRICS), ["abslrp"]),
        (["sparseness"], sorted({*METHODS} - {"rollout", "epsilon-gamma-box"})),
    ],
)
def test_metrics_and_methods(metrics: list[str], methods: list[str]) -> None:
    model, x = cnn(), images(5, 32)
    boxes = torch.zeros(5, 1, 32, 32, dtype=torch.bool)
    boxes[..., 4:20, 8:28] = True
    labels = torch.arange(5)

    def evaluated() -> Any:
        return evaluate(model, (x, labels, boxes), metrics, methods)

    here, there = evaluated(), elsewhere(evaluated)
    assert here.failures == there.failures == {}
    for method in methods:
        for metric in metrics:
            for name, values in here.results[method][metric].values.items():
                assert torch.equal(values.nan_to_num(7.0), there.results[method][metric].values[name].nan_to_num(7.0))
