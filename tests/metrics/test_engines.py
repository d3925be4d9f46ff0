"""Metrics of an engine: the numbers of its model, from logits that the engine's plan computes."""

from __future__ import annotations

import pytest
import torch
from small import classifier, normal
from torch import Tensor, nn

from ramp_fast import Engine, UnsupportedModelError
from ramp_fast.cli.evaluate import _answering
from ramp_fast.evaluation import evaluate
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import METRICS, make_metric

IMAGES = normal(4, 3, 16, 16, seed=1)
MASKS = torch.arange(256).view(1, 1, 16, 16).expand(4, 1, 16, 16) < 80
SETTINGS = {"top_k_intersection": {"k": 20}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(classifier(16, 16), precision="float64")


@pytest.mark.parametrize("name", sorted(METRICS))
def test_numbers_are_those_of_the_model(engine: Engine, name: str) -> None:
    made = [make_metric(name, model, seed=3, **SETTINGS.get(name, {})) for model in (engine, engine.model)]
    assert all(metric.model is engine.model for metric in made)
    masks = MASKS if METRICS[name].needs_masks else None
    ours, expected = (metric.update(IMAGES, None, input_x_gradient, masks=masks) for metric in made)
    assert ours.keys() == expected.keys()
    for part, found in ours.items():
        torch.testing.assert_close(found, expected[part], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", ["deletion", "aopc", "faithfulness_correlation", "max_sensitivity"])
def test_the_plan_computes_the_logits(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits = engine.logits

    def counted(images: Tensor, **options: bool) -> Tensor:
        seen.append(images.shape[0])
        return logits(images, **options)

    monkeypatch.setattr(engine, "logits", counted)
    make_metric(name, engine).update(IMAGES, None, input_x_gradient)
    assert sum(seen) >= len(IMAGES)
    seen.clear()
    make_metric(name, engine.model).update(IMAGES, None, input_x_gradient)
    assert not seen


def test_evaluations_of_an_engine(engine: Engine) -> None:
    names = ["deletion:steps=4", "sparseness"]
    result = evaluate(engine, IMAGES, names, ["abslrp", "ixg"])
    expected = evaluate(engine.model, IMAGES, names, {"abslrp": engine, "ixg": "ixg"})
    for method in ("abslrp", "ixg"):
        for metric in names:
            torch.testing.assert_close(result.results[method][metric].values, expected.results[method][metric].values)


def test_the_command_takes_an_engine_where_there_is_one(engine: Engine) -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(-1)[0][:, :5]

    cpu, shape = torch.device("cpu"), tuple(IMAGES.shape[1:])
    assert isinstance(_answering(engine.model, cpu, shape), Engine)
    assert _answering(engine.model, torch.device("cuda"), shape) is engine.model
    other = Unsupported().eval()
    with pytest.raises(UnsupportedModelError):
        Engine(other, input_shape=shape)
    assert _answering(other, cpu, shape) is other
