"""Contrast where no relevance of the other classes arrives: their map is zero and the result is that of the class."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast import Engine, gemm
from ramp_fast.rules import AbsLRP, RelativeStabilizer


class Heads(nn.Module):
    """Features, and a head by name; ``scale`` multiplies the logits."""

    def __init__(self, head: str, classes: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.head, self.scale = head, scale
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.first, self.second = nn.Linear(8, classes), nn.Linear(8, classes)
        self.weight, self.bias = nn.Parameter(torch.randn(8, classes)), nn.Parameter(torch.randn(classes) * 0.1)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(x + self.branch(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        logits = {
            "one": lambda: self.first(f),
            "two averaged": lambda: (self.first(f) + self.second(f)) / 2,
            "copies averaged": lambda: (self.first(f) + self.first(self.features(x.flip(3)))) / 2,
            "sum at the end": lambda: f @ self.weight + self.bias,
            "ReLU at the end": lambda: F.relu(self.first(f)),
            "tanh at the end": lambda: torch.tanh(self.first(f)),
            "sigmoid at the end": lambda: torch.sigmoid(self.first(f)) - 0.5,
        }[self.head]()
        return logits * self.scale


def distilled(classes: int, scale: float) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "depth": 2, "num_classes": classes}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes)
    for own in (model.head, model.head_dist):
        nn.init.normal_(own.weight, std=scale)
    return model


def affected(model: nn.Module, x: Tensor, precision: str, rule: str) -> tuple[Tensor, Tensor]:
    """Maps with contrast, and those without, of images where the other classes' map is zero."""
    own = AbsLRP(stabilizer=RelativeStabilizer(0.1)) if precision == "fast" else rule
    dtype = torch.float64 if precision == "float64" else torch.float32
    engine, x = Engine(model.to(dtype).eval(), own, precision), x.to(dtype)
    plain = engine.attribute(x, contrast="none", normalize="none")
    classes = plain.logits.shape[1]
    rest = torch.ones(len(x), classes).scatter(1, plain.target.view(-1, 1), 0)
    others = engine.attribute(x, rest.to(dtype), contrast="none", normalize="none").maps
    found = (others.abs().flatten(1).sum(1) == 0) & (plain.maps.abs().flatten(1).sum(1) > 0.5)
    return engine.attribute(x, normalize="none").maps[found], plain.maps[found]


ENDS = ["one", "sum at the end", "ReLU at the end", "tanh at the end", "sigmoid at the end"]


@pytest.mark.parametrize(
    ("head", "precision"),
    [(head, precision) for head in ENDS for precision in ("float64", "mixed")]
    + [(head, p) for head in ("two averaged", "copies averaged") for p in ("float64", "float32", "mixed", "fast")],
)
def test_the_map_is_that_of_the_class(head: str, precision: str) -> None:
    count = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = Heads(head, 2 + seed % 2, (1.0, 1e-7, 1e7)[seed % 3])
        maps, expected = affected(model, torch.randn(3, 3, 8, 8), precision, ("abslrp", "abslrp-release")[seed // 3])
        count += len(maps)
        assert torch.equal(maps, expected)
    assert count or head == "one"


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_transformers_with_two_heads(precision: str) -> None:
    count = 0
    for seed in range(4):
        torch.manual_seed(seed)
        maps, expected = affected(distilled(2, 0.1), torch.randn(3, 3, 16, 16), precision, "abslrp")
        count += len(maps)
        assert torch.equal(maps, expected)
    assert count


@pytest.mark.parametrize("head", ["two averaged", "copies averaged"])
def test_relevance_that_is_lost_stays_lost(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where products round P and D apart, as those do that scale every row by its own largest number."""
    product = gemm.Matrix.__call__

    def rounded(self: gemm.Matrix, x: Tensor) -> Tensor:
        y = product(self, x)
        rows = torch.arange(y[..., 0].numel(), dtype=y.dtype).view(*y.shape[:-1], 1)
        return y * (1 + 1e-12 * rows)

    monkeypatch.setattr(gemm.Matrix, "__call__", rounded)
    count = 0
    for seed in range(4):
        torch.manual_seed(seed)
        maps, expected = affected(Heads(head), torch.randn(3, 3, 8, 8), "float64", "abslrp")
        count += len(maps)
        torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-12)
    assert count


class OneFeature(nn.Module):
    """Sixteen features, of which the fourth alone is not zero, at the end of a network of one of several kinds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(12, 16) if how == "linear" else nn.Conv2d(3, 16, 1)
        self.head = nn.Conv2d(16, 5, 1) if how == "convolution as head" else nn.Linear(16, 5)
        with torch.no_grad():
            self.first.weight.abs_()
            self.first.bias.fill_(-1e3)
            self.first.bias[3] = 0.1
            self.head.weight.abs_()
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1) if self.how == "linear" else x))
        if self.how == "mean":
            x = x.mean((2, 3))
        elif self.how == "maximum":
            x = x.amax((2, 3))
        elif self.how == "convolution as head":
            return self.head(x).mean((2, 3))
        return self.head(x)


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
@pytest.mark.parametrize("how", ["linear", "mean", "maximum", "convolution as head"])
def test_one_feature_tells_no_classes_apart(how: str, precision: str) -> None:
    """Of one feature that is not zero every class has all relevance, whatever coefficients those that are zero have."""
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "float64" else torch.float32
    model, x = OneFeature(how).to(dtype).eval(), torch.rand(3, 3, 2, 2, dtype=dtype)
    engine = Engine(model, precision=precision, input_shape=(3, 2, 2))
    assert not engine.attribute(x, 1).maps.any()
    assert engine.attribute(x, 1, "none").maps.abs().sum() > 0


class _Residual(nn.Module):
    """Two residual branches, and a classifier behind them or the features themselves."""

    def __init__(self, classifier: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 5) if classifier else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x + self.first(x).relu()
        return self.head(x + self.last(x).relu())


@pytest.mark.parametrize(("classifier", "head"), [(True, "head"), (False, "last")])
def test_classes_are_told_apart_at_the_last_layer_alone(classifier: bool, head: str) -> None:
    engine = Engine(_Residual(classifier).eval())
    engine.logits(torch.randn(1, 3, 2, 2))
    steps = [step for step in engine.plan.steps if step.operation is not None]
    assert [step.node.module for step in steps if step.operation.fusion.adds_classes] == [head]  # type: ignore[union-attr]
