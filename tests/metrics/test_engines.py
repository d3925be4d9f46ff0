"""Metrics of an engine: the numbers of its model, from logits that the engine's plan computes."""

from __future__ import annotations

import copy

import pytest
import torch
from small import classifier, normal
from torch import Tensor, nn

from ramp_fast import Engine, InputError, UnsupportedModelError
from ramp_fast.cli.evaluate import _with_engine
from ramp_fast.evaluation import evaluate
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import METRICS, make_metric
from ramp_fast.rules import AbsLRP, RelativeStabilizer

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


def test_an_engine_of_the_default_precision() -> None:
    images, model = IMAGES.float(), classifier(16, 16).float()
    metrics = [make_metric("deletion", m, steps=5) for m in (Engine(model), model)]
    ours, expected = (metric.update(images, None, input_x_gradient)["curve"] for metric in metrics)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert copy.deepcopy(metrics[0]).engine is not metrics[0].engine


@pytest.mark.parametrize("precision", ["mixed", "fast"])
def test_no_logits_of_less_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64 if precision == "mixed" else torch.float32
    model = classifier(16, 16).to(dtype)
    engine = Engine(model, AbsLRP(stabilizer=RelativeStabilizer(0.1)), precision)
    if engine.computes_in(dtype):
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr(engine, "logits", None)  # nobody calls it
    ours, expected = (
        make_metric("deletion", m, steps=5).update(IMAGES.to(dtype), None, input_x_gradient) for m in (engine, model)
    )
    assert torch.equal(ours["curve"], expected["curve"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(value: float) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)
    ).eval()
    images = IMAGES.float().clone()
    images[1, 0, 3, 3] = value
    for made in (model, Engine(model)):
        with pytest.raises(InputError, match="finite"):
            make_metric("deletion", made, steps=5).update(images, 1, None, maps=IMAGES.float())


@pytest.mark.parametrize("name", ["deletion", "aopc", "faithfulness_correlation", "max_sensitivity"])
def test_the_plan_computes_the_logits(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits = engine.logits

    def counted(images: Tensor) -> Tensor:
        seen.append(images.shape[0])
        return logits(images)

    monkeypatch.setattr(engine, "logits", counted)
    make_metric(name, engine).update(IMAGES, None, input_x_gradient)
    assert sum(seen) >= len(IMAGES)
    seen.clear()
    make_metric(name, engine.model).update(IMAGES, None, input_x_gradient)
    assert not seen


def test_evaluations_of_an_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["deletion:steps=4", "sparseness"]
    methods = {"ours": engine, "ixg": "ixg"}
    result, expected = (evaluate(m, IMAGES, names, methods) for m in (engine, engine.model))
    for method in methods:
        for metric in names:
            torch.testing.assert_close(result.results[method][metric].values, expected.results[method][metric].values)
    # predictions are the engine's as well, whatever the metrics were made for
    seen: list[int] = []
    monkeypatch.setattr(engine, "logits", lambda images: seen.append(len(images)) or engine.model(images))
    evaluate(engine, IMAGES, [make_metric("sparseness", engine.model)], methods)
    assert seen == [len(IMAGES)]


def test_the_command_takes_an_engine_where_there_is_one(engine: Engine) -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(-1)[0][:, :5]

    cpu, shape = torch.device("cpu"), tuple(IMAGES.shape[1:])
    assert isinstance(_with_engine(engine.model, cpu, shape), Engine)
    assert _with_engine(engine.model, torch.device("cuda"), shape) is engine.model
    other = Unsupported().eval()
    with pytest.raises(UnsupportedModelError):
        Engine(other, input_shape=shape)
    assert _with_engine(other, cpu, shape) is other
