"""Steps that are taken by kernels over pixels, channels innermost, against float64 without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramp_fast import Engine, ops
from ramp_fast.params import Window
from ramp_fast.rules.conservation import Conservation
from ramp_fast.rules.masses import Masses
from ramp_fast.rules.pools import LinearPool


class Dense(nn.Module):
    """Every layer reads the outputs of all before it, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 7 * i) for i in range(4))
        self.layers = nn.ModuleList(nn.Conv2d(16 + 7 * i, 7, 3, padding=1) for i in range(3))
        self.head = nn.Linear(37, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            found.append(layer(norm(torch.cat(found, 1)).relu()))
        return self.head(self.norms[3](torch.cat(found, 1)).relu().mean((2, 3)))


class Pooled(nn.Module):
    """An average pool between convolutions, of a tensor with both signs."""

    def __init__(self, size: Any, stride: Any, padding: Any, counts_padding: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.pool = nn.AvgPool2d(size, stride, padding, count_include_pad=counts_padding)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.pool(self.first(x))).relu().mean((2, 3)))


class Normed(nn.Module):
    """A GroupNorm of one group, of images or of their pixels in a row."""

    def __init__(self, weights: bool, in_a_row: bool = False) -> None:
        super().__init__()
        self.in_a_row = in_a_row
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8, affine=weights)
        self.last, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(x.flatten(2)).unflatten(2, x.shape[2:]) if self.in_a_row else self.norm(x)
        return self.head(self.last(x).relu().mean((2, 3)))


MODELS = {
    "concatenations": Dense,
    "pool 2": lambda: Pooled(2, 2, 0, True),
    "pool 3 x 2, uncounted": lambda: Pooled((3, 2), (3, 2), 0, False),
    "pool 3, stride 1": lambda: Pooled(3, 1, 1, True),
    "pool 3, stride 1, uncounted": lambda: Pooled(3, 1, 1, False),
    "pool 5, stride 2, uncounted": lambda: Pooled(5, 2, 2, False),
    "pool 2 of 3": lambda: Pooled(2, 3, 0, True),
    "group norm": lambda: Normed(True),
    "group norm without weights": lambda: Normed(False),
    "group norm in a row": lambda: Normed(True, True),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()  # type: ignore[union-attr]  # there is one
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 12, 18, generator=torch.Generator().manual_seed(1))


def maps(model: nn.Module, precision: str, x: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs want a keyword less
    return Engine(model, precision=precision).attribute(x.contiguous(memory_format=layout)).maps


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are scaled and copied, readers merged in pairs, pools pulled back by autograd."""
    monkeypatch.setattr(Masses, "cut", Conservation.cut)
    monkeypatch.setattr(Masses, "_merged_pieces", lambda self, x, parts, axis: None)
    monkeypatch.setattr(Window, "tiles", lambda self, height, width: False)
    monkeypatch.setattr(LinearPool, "_fits", lambda self, x: False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-5), ("mixed", 0.05)])
@pytest.mark.parametrize("name", MODELS)
def test_against_float64(
    name: str, precision: str, most: float, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = maps(made(name), precision, images(), channels_last).double()
    plainly(monkeypatch)
    exact = maps(made(name).double(), "float64", images().double(), False)
    assert float((found - exact).abs().amax() / exact.abs().amax()) < most


@pytest.mark.parametrize(("name", "shape"), [("group norm", [8, 12, 18]), ("group norm in a row", [8, 216])])
def test_a_group_norm_of_one_group_is_a_layer_norm(name: str, shape: list[int]) -> None:
    group, layer = made(name).double(), made(name).double()
    norm = nn.LayerNorm(shape).double()
    with torch.no_grad():
        for own, each in ((norm.weight, group.norm.weight), (norm.bias, group.norm.bias)):
            own.copy_(each.view(8, *[1] * (len(shape) - 1)).expand(shape))  # type: ignore[operator]  # a parameter
    layer.norm = norm.eval()
    found, expected = (maps(model, "float64", images().double(), True) for model in (group, layer))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_do_not_show(name: str) -> None:
    model, x = made(name), images()
    together = maps(model, "mixed", x, True)
    assert torch.equal(together[1:2], maps(model, "mixed", x[1:2], True))


@pytest.mark.skipif(bool(ops.unavailable("cpu")), reason="needs the C++ extension")
def test_concatenations_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("piece_masses", "merge_pieces"):
        whole = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, whole=whole: called.append(name) or whole(*args))
    maps(made("concatenations"), "mixed", images(1), True)
    assert called.count("piece_masses") == 3
    assert called.count("merge_pieces") == 3  # all but the last layer have several readers


def test_pieces_without_relevance_stay_without() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.first(x).relu(), F.relu(-self.second(x).square())], 1)
            return self.head(both.mean((2, 3)))

    torch.manual_seed(0)
    found = Engine(Half().eval(), precision="mixed").attribute(images(2)).maps
    assert bool(found.isfinite().all())
    assert bool((found != 0).any())
