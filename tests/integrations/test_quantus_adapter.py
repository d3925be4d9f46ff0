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
        found = explain(
            model, X, Y, rule="abslrp-release", precision="float64", contrast="none", normalize="sum", reduce_axes=()
        )
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
    for four in (4, np.int64(4), torch.tensor(4)):
        np.testing.assert_array_equal(explain(model, X, four), explain(model, X, np.array([4, 4, 4])))


def test_a_model_of_one_logit_is_explained_without_contrast() -> None:
    model = nn.Sequential(vgg(), nn.ReLU(), nn.Linear(10, 1)).eval()
    x = images(2)
    expected = Engine(model).attribute(x, 0, "none").maps.sum(1, keepdim=True).numpy()
    for targets in (None, 0, np.zeros(2, np.int64)):
        np.testing.assert_array_equal(explain(model, x.numpy(), targets), expected)
    with pytest.raises(InputError, match='contrast="others" needs at least two classes; pass contrast="none"'):
        explain(model, x.numpy(), 0, contrast="others")


def test_channels_are_summed_as_by_quantus() -> None:
    model = vgg()
    whole = explain(model, X, Y, reduce_axes=())
    assert whole.shape == X.shape
    summed = explain(model, X, Y)
    assert summed.shape == quantus.explain(model, X, Y, method="Saliency", device="cpu").shape
    np.testing.assert_array_equal(summed, whole.sum(1, keepdims=True))
    np.testing.assert_array_equal(explain(model, X, Y, reduce_axes=[-3], keepdims=False), whole.sum(1))
    np.testing.assert_array_equal(explain(model, X, Y, abs=True, softmax=False, method="any"), np.abs(summed))
    largest = np.abs(explain(model, X, Y, normalise=True)).max((1, 2, 3))
    np.testing.assert_allclose(largest, 1, rtol=1e-6)
    by_quantus = explain(model, X, Y, normalise=True, normalise_func=quantus.normalise_func.normalise_by_max)
    np.testing.assert_array_equal(by_quantus, quantus.normalise_func.normalise_by_max(summed))


class ChannelsLast(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = vgg()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.permute(0, 3, 1, 2))


def test_channels_last() -> None:
    model = ChannelsLast().eval()
    found = explain(model, X.transpose(0, 2, 3, 1), Y, channel_first=False)
    np.testing.assert_allclose(found, explain(model.inner, X, Y).transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-7)


# What every metric of Quantus is given beside its defaults, so that it is quick on three images of 16 x 16 pixels.
STEPS = {"features_in_step": 64}
QUICK: dict[str, dict[str, Any]] = {
    "FaithfulnessCorrelation": {"nr_runs": 4, "subset_size": 16},
    "FaithfulnessEstimate": STEPS,
    "PixelFlipping": STEPS,
    "RegionPerturbation": {"patch_size": 4, "regions_evaluation": 3},
    "MonotonicityCorrelation": {"nr_samples": 2, **STEPS},
    "Selectivity": {"patch_size": 8},
    "SensitivityN": STEPS,
    "Infidelity": {"perturb_patch_sizes": [8], "n_perturb_samples": 2},
    "Sufficiency": {},
    "LocalLipschitzEstimate": {"nr_samples": 2},
    "MaxSensitivity": {"nr_samples": 2},
    "AvgSensitivity": {"nr_samples": 2},
    "RelativeInputStability": {"nr_samples": 2},
    "RelativeOutputStability": {"nr_samples": 2},
    "PointingGame": {},
    "AttributionLocalisation": {},
    "TopKIntersection": {"k": 20},
    "RelevanceRankAccuracy": {},
    "RelevanceMassAccuracy": {},
    "AUC": {},
    "Sparseness": {},
    "Complexity": {},
    "EffectiveComplexity": {},
    "MPRT": {},
    "EfficientMPRT": {},
    "RandomLogit": {"num_classes": 10},
    "InputInvariance": {},
}


@pytest.mark.filterwarnings("ignore")
def test_evaluate() -> None:
    """By ``quantus.evaluate``, which hands every function its name and prints the errors it swallows."""
    objects = np.zeros((3, 1, 16, 16), bool)
    objects[:, :, 3:9, 4:12] = True
    metrics = {name: getattr(quantus, name)(disable_warnings=True, **own) for name, own in QUICK.items()}
    methods = {"absLRP": explain}
    call = {"once": {"device": "cpu", "channel_first": True}}
    found = quantus.evaluate(metrics, methods, vgg(), X, Y, objects, explain_func_kwargs={}, call_kwargs=call)
    assert list(found["absLRP"]) == list(QUICK)
    assert all(len(scores) for scores in found["absLRP"].values())


def test_max_sensitivity() -> None:
    model = vgg()
    engine = Engine(model, precision="float32")
    kept: list[np.ndarray] = []

    def ours(model: torch.nn.Module, inputs: np.ndarray, targets: np.ndarray, **options: Any) -> np.ndarray:
        kept.append(np.array(inputs))
        maps = engine.attribute(torch.from_numpy(inputs).float(), torch.from_numpy(targets), "none").maps
        return maps.numpy().sum(1, keepdims=True)

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
    np.testing.assert_array_equal(explain(model, X, Y, reduce_axes=()), expected)
    assert len(captures) == 1


def test_few_models_are_kept() -> None:
    models = [vgg() for _ in range(6)]
    alive = [weakref.ref(model) for model in models]
    while models:
        explain(models.pop(0), X, Y)
    gc.collect()
    assert [a() is not None for a in alive] == [False] * 2 + [True] * 4
    adapter.forget()
    gc.collect()
    assert not any(a() for a in alive)


class Plain(nn.Module):
    """Everything that a forward pass may read lies in the outermost module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.head = nn.Linear(6, 10)
        self.scale, self.switch, self.shift, self.function = 1.0, False, torch.zeros(6), torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.function(nn.functional.conv2d(x, self.weight) + self.scale)
        x = (x + self.shift[:, None, None]).relu()
        return self.head((x.flip(1) if self.switch else x).mean((2, 3)))


class Other(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(1)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flip(0) * 2


CHANGES: dict[str, Any] = {
    "scale": lambda m: setattr(m, "scale", -0.5),
    "switch": lambda m: setattr(m, "switch", True),
    "tensor": lambda m: setattr(m, "shift", torch.linspace(-1, 1, 6)),
    "function": lambda m: setattr(m, "function", nn.functional.gelu),
    "forward": lambda m: setattr(m, "forward", lambda x: Plain.forward(m, x).roll(1, 1)),
    "class": lambda m: setattr(m, "__class__", Other),
    "parametrization": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Doubled()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_outermost_module_are_noticed(change: str) -> None:
    model = Plain().eval()
    before = explain(model, X, Y, strict=False, reduce_axes=())
    CHANGES[change](model)
    found = explain(model, X, Y, strict=False, reduce_axes=())
    expected = Engine(model, strict=False).attribute(torch.from_numpy(X), torch.from_numpy(Y)).maps.numpy()
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, before)


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
        (X, Y, {"softmax": True}, "absLRP explains logits, not probabilities"),
        (X, Y, {"reduce_axes": (0,)}, r"reduce_axes must be axes of an image's map, 1 to 3; got \(0,\)"),
        (X, Y, {"reduce_axes": (1, -3)}, r"reduce_axes names an axis twice: \(1, -3\)"),
        (X, Y, {"reduce_axes": 1.5}, "reduce_axes must be integers, got 1.5"),
        (X, True, {}, r"targets must be 3 integers, one per image; got \[\], torch.bool"),
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
