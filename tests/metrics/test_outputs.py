"""What metrics watch where a model has one logit, or returns probabilities."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from small import classifier, normal
from torch import Tensor, nn

from ramp_fast import Engine, InputError
from ramp_fast.evaluation import evaluate
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import GAE, METRICS, ROAD, Deletion, Infidelity, Sufficiency

IMAGES = normal(8, 3, 8, 8, seed=1)


def single() -> nn.Sequential:
    """One logit; of half of the images it is negative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 1)).double().eval()
    with torch.no_grad():
        model[3].bias.copy_(-model(IMAGES).median())
    return model


def with_zero(model: nn.Module) -> nn.Module:
    """The same classifier as two logits, of which the first is always 0: its softmax is the sigmoid."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            logit = self.inner(x)
            return torch.cat([torch.zeros_like(logit), logit], 1)

    return Two().eval()


@pytest.mark.parametrize(
    "name", ["deletion", "insertion", "abpc", "aopc", "irof", "monotonicity", "sensitivity_n", "infidelity"]
)
def test_one_logit_counts_by_its_sigmoid(name: str) -> None:
    settings = {"irof": {"granularity": "patch:4"}, "aopc": {"regions": 3}, "infidelity": {"samples": 5, "sizes": (4,)}}
    given = settings.get(name, {"samples": 5} if name == "sensitivity_n" else {"steps": 4})
    model = single()
    one = METRICS[name](model, **given).update(IMAGES, 0, input_x_gradient)[name]
    maps = input_x_gradient(model, IMAGES, torch.zeros(8, dtype=torch.long))
    two = METRICS[name](with_zero(model), **given).update(IMAGES, 1, None, maps=maps)[name]
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, equal_nan=True)
    if name != "monotonicity":
        assert one.unique().numel() > 1


def test_one_logit_decides_by_its_sign() -> None:
    model, percentages = single(), (0, 50, 100)
    found = ROAD(model, percentages=percentages).update(IMAGES, 0, input_x_gradient)["curve"]
    assert (found[:, 0] == 1).all()
    assert found.unique().numel() == 2
    two = with_zero(model)
    maps = input_x_gradient(model, IMAGES, torch.zeros(8, dtype=torch.long))
    expected = ROAD(two, percentages=percentages).update(IMAGES, None, None, maps=maps)["curve"]
    assert torch.equal(found, expected)
    assert Sufficiency(model, threshold=1.0).update(IMAGES, 0, input_x_gradient)["sufficiency"].unique().numel() == 2


def test_an_engine_of_one_logit_has_no_contrast() -> None:
    engine = Engine(single().float(), precision="float32")
    images = IMAGES.float()
    found = engine.evaluate((images, torch.zeros(8, dtype=torch.long)), ["deletion:steps=4"], strict=True)
    maps = engine.attribute(images, 0, "none").maps
    expected = Deletion(engine, steps=4).update(images, 0, None, maps=maps)["deletion"]
    assert torch.equal(found.results["abslrp"]["deletion:steps=4"].values["deletion"], expected.double())


def test_evaluate_can_be_told_the_contrast() -> None:
    engine = Engine(classifier().float(), precision="float32")
    images = IMAGES.float()
    target = torch.arange(8) % 5
    found = engine.evaluate((images, target), {"deletion": "deletion:steps=4"}, contrast="none", strict=True)
    maps = engine.attribute(images, target, "none").maps
    expected = Deletion(engine, steps=4).update(images, target, None, maps=maps)["deletion"]
    assert torch.equal(found.results["abslrp"]["deletion"].values["deletion"], expected.double())
    with pytest.raises(InputError, match="contrast must be one of 'others', 'none', or None; got 'all'"):
        engine.evaluate(images, ["deletion"], contrast="all")


def test_refused_for_one_logit() -> None:
    with pytest.raises(InputError, match="gae: the model has a single class"):
        GAE(single()).update(IMAGES, None, input_x_gradient)
    with pytest.raises(InputError, match="target must be 0 to 0"):
        Deletion(single(), steps=2).update(IMAGES, 1, input_x_gradient)


class Functional(nn.Module):
    """A sigmoid that is no module, and a reshape behind it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.inner(x)).flatten(1)


ENDS = {
    "softmax": lambda: nn.Sequential(classifier(), nn.Softmax(1)),
    "sigmoid": lambda: nn.Sequential(classifier(), nn.Sigmoid()),
    "sigmoid of one": lambda: Functional(single()),
    "softmax of one": lambda: nn.Sequential(single(), nn.Softmax(1)),
}


@pytest.mark.parametrize(
    ("kind", "end"), [(k, e) for k in ("deletion", "road", "gae") for e in ENDS if k != "gae" or "one" not in e]
)
def test_probabilities_are_noticed(kind: str, end: str) -> None:
    model = ENDS[end]().eval()
    metric = METRICS[kind](model)
    message = f"{kind}: .* returns probabilities, its last operation is a {end.split()[0]}: .* without its"
    if kind == "road" and "one" not in end:  # the largest probability is the largest logit
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metric.update(IMAGES, None, input_x_gradient)
        return
    with pytest.warns(RuntimeWarning, match=message):
        metric.update(IMAGES, None, input_x_gradient)


class After(nn.Module):
    """A function of a classifier's logits."""

    def __init__(self, function: Any, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.function = inner or classifier(), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


SQUASHED: dict[str, Any] = {
    "hardsigmoid": nn.functional.hardsigmoid,
    "written out": lambda z: 1 / (1 + (-z).exp()),
    "clamped": lambda z: z.sigmoid().clamp(1e-3, 1 - 1e-3),
    "a part": lambda z: z.sigmoid()[:, :4],
    "concatenated": lambda z: torch.cat([z.sigmoid(), z.sigmoid()], 1),
    "a mean": lambda z: (z.sigmoid() + (2 * z).sigmoid()) / 2,
    "tanh": lambda z: (z.tanh() + 1) / 2,
    "two heads": lambda z: torch.cat([z.softmax(1), z.softmax(1)], 1),
    "scaled": lambda z: z.softmax(1) * 0.999,
    "without gradient": lambda z: z.detach().softmax(1),
}


@pytest.mark.parametrize("how", SQUASHED)
def test_outputs_between_0_and_1_are_noticed(how: str) -> None:
    with pytest.warns(RuntimeWarning, match="of After every output lies between 0 and 1") as said:
        Deletion(After(SQUASHED[how]).eval(), steps=2).update(IMAGES, None, None, maps=IMAGES)
    assert len(said) == 1
    assert "its last operation is" not in str(said[0].message)
    assert ("add up to 1" in str(said[0].message)) == (how == "without gradient")


def test_the_mean_of_two_heads() -> None:
    """Of two softmax it is a probability, below which there are several scores; of two log_softmax it is logits."""
    heads: dict[str, Any] = {
        "softmax": lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2,
        "log_softmax": lambda z: (z.log_softmax(1) + (2 * z).log_softmax(1)) / 2,
        "log of the mean": lambda z: torch.log((z.softmax(1) + (2 * z).softmax(1)) / 2),
    }
    said = {}
    for name, function in heads.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Deletion(After(function).eval(), steps=2).update(IMAGES, None, None, maps=IMAGES)
        said[name] = [str(w.message) for w in caught]
    assert said.pop("log_softmax") == said.pop("log of the mean") == []
    (message,) = said.pop("softmax")
    assert "those of each image add up to 1" in message
    assert "evaluate the scores below them" in message


OTHERS: dict[str, tuple[Any, str]] = {
    "squeezed": (
        lambda z: z[:, 0],
        r"returns \[\d\], torch.float64 for \d images; .*: let it return one logit as \[N, 1\]",
    ),
    "pair": (lambda z: (z, z), "returns tuple for .* wrap it in a module whose forward returns the logits alone"),
    "dict": (lambda z: {"logits": z}, "returns dict for .* returns the logits alone"),
    "three axes": (lambda z: z[:, :, None], r"returns \[\d, 5, 1\], torch.float64 .* nn.Sequential\(model, nn.Flatten"),
    "mixed": (lambda z: z.sum(0, keepdim=True).expand(3, 5), r"returns \[3, 5\], .* returns that"),
    "whole": (lambda z: z.long(), r"returns \[\d, 5\], torch.int64"),
}


@pytest.mark.parametrize("how", OTHERS)
def test_what_is_not_logits_is_refused(how: str) -> None:
    function, message = OTHERS[how]
    model = After(function).eval()
    zeros = torch.zeros(8, dtype=torch.long)
    for call in (
        lambda: Deletion(model, steps=2).update(IMAGES, None, input_x_gradient),
        lambda: GAE(model, steps=2).update(IMAGES, 0, input_x_gradient),
        lambda: evaluate(model, IMAGES, ["deletion:steps=2"], ["ixg"]),
        lambda: evaluate(model, (IMAGES, zeros), ["road"], ["ixg"]),
    ):
        with pytest.raises(InputError, match=f"After {message}"):
            call()


def test_evaluate_notices_once() -> None:
    model = nn.Sequential(classifier(), nn.Softmax(1)).eval()
    metrics, methods = ["deletion:steps=2", "insertion:steps=2", "gae:steps=2"], ["ixg", "random"]
    with pytest.warns(RuntimeWarning) as said:
        evaluate(model, IMAGES, metrics, methods, batch_size=4)
    assert len([w for w in said if "returns probabilities" in str(w.message)]) == 1


def test_logits_are_not_taken_for_probabilities() -> None:
    """Neither small positive ones, nor those of a ReLU, nor logarithms of probabilities, whose softmax they are of."""
    bounded = copy.deepcopy(classifier())
    with torch.no_grad():
        bounded[3].weight.mul_(1e-3)
        bounded[3].bias.fill_(0.1)
    small = After(lambda z: z.detach() / 100).eval()
    relu = [nn.Sequential(classifier(), nn.ReLU()).eval(), After(lambda z: 0 * z).eval()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (bounded, small, *relu, nn.Sequential(classifier(), nn.LogSoftmax(1)).eval(), single()):
            Deletion(model, steps=2).update(IMAGES, 0, None, maps=IMAGES)
        ends = nn.Sequential(classifier(), nn.Softmax(1)).eval()
        Infidelity(ends, samples=2, sizes=(4,)).update(IMAGES, 0, input_x_gradient)
