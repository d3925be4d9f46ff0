"""The engine as Quantus' explain_func, used by Quantus' own metrics."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantus
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import images, vgg  # beside this folder
from test_no_trace import Watch

from ramp_fast import Engine, InputError, UnsupportedModelError
from ramp_fast.integrations import quantus as adapter
from ramp_fast.integrations.quantus import explain

X, Y = images().numpy(), np.array([1, 7, 4])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every engine that is made."""
    made: list[Engine] = []

    class Counted(Engine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(adapter, "Engine", Counted)
    return made


def test_gives_the_engines_maps() -> None:
    model = vgg()
    with Watch(model):
        found = explain(model, X, Y, rule="abslrp-release", precision="float64", contrast="none", normalize="sum")
    engine = Engine(model, "abslrp-release", "float64")
    expected = engine.attribute(torch.from_numpy(X), torch.from_numpy(Y), "none", "sum").maps.numpy()
    assert found.dtype == expected.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


def test_arrays_tensors_and_predicted_classes() -> None:
    model = vgg()
    expected = explain(model, X, Y)
    np.testing.assert_array_equal(explain(model, torch.from_numpy(X), torch.from_numpy(Y)), expected)
    np.testing.assert_array_equal(explain(model, X, [1, 7, 4], batch_size=2, device="cpu"), expected)  # type: ignore[arg-type]
    np.testing.assert_array_equal(explain(model, X.astype(np.float64), Y), expected)
    predicted = model(torch.from_numpy(X)).argmax(1)
    np.testing.assert_array_equal(explain(model, X, None), explain(model, X, predicted))
    np.testing.assert_array_equal(explain(model, X, 4), explain(model, X, np.array([4, 4, 4])))


def test_max_sensitivity() -> None:
    model = vgg()
    engine = Engine(model, precision="float32")
    kept: list[np.ndarray] = []

    def ours(model: torch.nn.Module, inputs: np.ndarray, targets: np.ndarray, **options: Any) -> np.ndarray:
        kept.append(np.array(inputs))
        return engine.attribute(torch.from_numpy(inputs).float(), torch.from_numpy(targets), "none").maps.numpy()

    def scores(function: Any, **options: Any) -> list[float]:
        np.random.seed(0)  # noqa: NPY002  # what Quantus draws from
        metric = quantus.MaxSensitivity(nr_samples=2, disable_warnings=True, return_nan_when_prediction_changes=False)
        found = metric(model, X, Y, a_batch=None, device="cpu", explain_func=function, explain_func_kwargs=options)
        return [float(f) for f in found]

    found = scores(explain, precision="float32", contrast="none")
    assert found == scores(ours)
    assert len(found) == 3
    assert all(f > 0 for f in found)
    assert len(kept) == 3  # the images, and twice with noise


def test_a_model_is_captured_once(captures: list[Engine]) -> None:
    model = vgg()
    for _ in range(5):
        explain(model, X, Y)
    assert len(captures) == 1
    explain(model, X, Y, precision="float64")
    explain(model, X, Y, rule="abslrp-release", contrast="none")
    explain(vgg(), X, Y)
    explain(model, X, Y, normalize="sum", batch_size=1)
    assert len(captures) == 4


def test_weights_that_change_are_noticed(captures: list[Engine]) -> None:
    model = vgg()
    before = explain(model, X, Y)
    state = copy.deepcopy(model.state_dict())
    for value in state.values():
        value.neg_()
    model.load_state_dict(state)
    after = explain(model, X, Y)
    assert not np.allclose(after, before)
    model[4] = torch.nn.Linear(256, 10).eval()
    expected = Engine(model).attribute(torch.from_numpy(X), torch.from_numpy(Y)).maps.numpy()
    np.testing.assert_array_equal(explain(model, X, Y), expected)
    assert len(captures) == 1


def test_models_are_not_kept() -> None:
    model = vgg()
    explain(model, X, Y)
    (engine,) = adapter._ENGINES[model].values()
    alive = [weakref.ref(model), weakref.ref(engine), weakref.ref(model[4])]
    del model, engine
    gc.collect()
    assert [a() for a in alive] == [None, None, None]


def test_training_mode_is_noticed() -> None:
    model = nn.Sequential(vgg(), nn.Dropout()).eval()
    explain(model, X, Y)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"training mode \(1\)"):
        explain(model, X, Y)


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "message"),
    [
        ("cat", Y, {}, "inputs must be an array or a Tensor of numbers, got str"),
        (X[0], Y, {}, r"images must be \[B, C, H, W\]"),
        ((X * 9).astype(np.int64), Y, {}, "images must be floating point"),
        (X, Y[:2], {}, r"targets must be 3 integers, one per image; got \[2\]"),
        (X, Y + 0.5, {}, r"targets must be 3 integers, one per image; got \[3\], torch.float64"),
        (X, Y + 3, {}, "target must be between 0 and 9, got 4 to 10"),
        (X, Y, {"device": "gpu"}, "device must be the name of a torch device, got 'gpu'"),
        (X, Y, {"device": "cuda"}, r"the model is on cpu, not on cuda: move it there first, model.to\('cuda'\)"),
        (X, Y, {"batch_size": 0}, "batch_size must be a positive integer"),
    ],
)
def test_refused(inputs: Any, targets: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        explain(vgg(), inputs, targets, **options)


def test_refused_before_anything_is_captured(captures: list[Engine]) -> None:
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module, got str"):
        explain("vgg", X, Y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="xai_lib"):
        explain(vgg(), X, Y, xai_lib="captum")  # type: ignore[call-arg]
    with pytest.raises(InputError):
        explain(vgg(), X, Y[:1])
    assert not captures
