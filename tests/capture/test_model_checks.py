"""What is refused before a model is captured, and what is not: modes, weights, wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import SIZE, images, vgg, vit
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.capture.model_checks import check_model
from ramp_fast.errors import UnsupportedModelError
from ramp_fast.methods import make_method

SHAPE = (3, SIZE, SIZE)


class Wrapper(nn.Module):
    """Around an eval model; in training mode itself, as it was just made."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inner = vgg()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class ReadsFlag(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2 if self.training else self.inner(x)


class ReadsFlagByName(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if getattr(self, "training", False) else 1)


class ReadsFlagInMethod(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self._scaled(self.inner(x))

    def _scaled(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self._active)

    @property
    def _active(self) -> bool:
        return self.training


class Derived(ReadsFlagInMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class InPlaceOfForward(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: self.inner(x) * (2 if self.training else 1)  # type: ignore[method-assign]


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_prob, self.training)


def _exported() -> nn.Module:
    batch = torch.export.Dim("batch")
    return torch.export.export(vgg(), (images(2),), dynamic_shapes=({0: batch},)).module()


class Convolutions(nn.Module):
    """Convolutions, norms and pools that PyTorch takes apart, or gives other names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True)
        self.up, self.down = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 6, 3, groups=3, padding="same")
        self.group, self.line, self.head = nn.GroupNorm(2, 6), nn.Conv1d(6, 4, 3), nn.Linear(16, 5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        nn.init.constant_(self.line.bias, 0.5)  # so that several features are not zero

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.norm(self.stem(x)).relu())
        x = self.group(self.down(x)).relu() + F.interpolate(x, size=x.shape[-2:])
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 2), (2, 3))
        return self.head(self.line(x.flatten(2)).relu().flatten(1))


@pytest.mark.parametrize("make", [vgg, vit, Convolutions], ids=lambda f: f.__name__)
@pytest.mark.parametrize("whole", [False, True], ids=["core ATen", "functions kept"])
def test_exported_programs_that_were_decomposed(make: Callable[[], nn.Module], whole: bool) -> None:
    """Relevance goes through what PyTorch has made of functions: other maps where attention is in pieces."""
    model, x = make().eval(), images(2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    program = program.run_decompositions({} if whole else None)
    found = Engine(program.module(), precision="float64").attribute(x, 1)
    expected = Engine(model, precision="float64").attribute(x, 1)
    torch.testing.assert_close(found.logits, expected.logits)
    if whole or make is not vit:
        torch.testing.assert_close(found.maps, expected.maps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(vgg(), nn.Softmax(1)),
        Wrapper,
        lambda: nn.Sequential(vgg(), nn.Dropout(0.0), DropPath(0.0)),
        lambda: nn.DataParallel(vgg()),
        _exported,
        lambda: nn.Sequential(_exported(), nn.Softmax(1)),
        lambda: torch.compile(Wrapper(), backend="eager"),
    ],
    ids=[
        "container",
        "wrapper",
        "dropout of nothing",
        "DataParallel",
        "exported",
        "exported, in a container",
        "compiled",
    ],
)
def test_training_mode_that_changes_nothing_is_fine(make: Callable[[], nn.Module]) -> None:
    model, x = make(), images(2)
    a = Engine(model, precision="float32").attribute(x)
    torch.testing.assert_close(a.logits, model(x).detach(), rtol=0, atol=1e-5)  # float32, other orders of sums


def test_methods_and_metrics_ask_the_same() -> None:
    wrapped, target = nn.Sequential(vgg(), nn.Softmax(1)), torch.zeros(2, dtype=torch.long)
    assert make_method("ixg", wrapped)(wrapped, images(2), target).shape == (2, *SHAPE)
    inside = nn.Sequential(vgg(), nn.Dropout()).eval()
    inside[1].train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        make_method("ixg", inside)(inside, images(2), target)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (ReadsFlag, "(model)"),
        (ReadsFlagByName, "(model)"),
        (ReadsFlagInMethod, "(model)"),
        (Derived, "(model)"),
        (InPlaceOfForward, "(model)"),
        (lambda: nn.Sequential(vgg(), nn.Dropout(0.5)), "1"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), vgg()), "0"),
        (lambda: nn.Sequential(nn.RReLU(), vgg()), "0"),
        (lambda: nn.Sequential(vgg(), DropPath(0.1)), "1"),
    ],
)
def test_training_mode_that_a_module_reads_is_refused(make: Callable[[], nn.Module], name: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=r"training mode.*eval\(\)") as caught:
        Engine(model)
    assert f"({name})" in str(caught.value)
    check_model(model.eval())


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10)).eval()


def _narrow() -> nn.Module:
    model = vgg()
    model[4].weight = nn.Parameter(model[4].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def _partly_empty() -> nn.Module:
    model = vgg()
    model[4].to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.jit.trace(vgg(), images(1)), "the model is a torch.jit module"),
        (lambda: nn.Sequential(torch.jit.trace(vgg(), images(1))).eval(), "0 is a torch.jit module"),
        (lambda: torch.jit.freeze(torch.jit.trace(vgg(), images(1))), "torch.jit module"),
        (_lazy, "1.weight has no shape yet"),
        (_narrow, "4.weight is torch.float8"),
        (lambda: vgg().to(torch.complex64), "0.weight is torch.complex64"),
        (_partly_empty, "4.weight is on the meta device"),
    ],
    ids=["traced", "traced inside", "frozen", "lazy", "float8", "complex", "meta"],
)
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_refusals_say_what_was_found(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        Engine(make())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.export.export(vgg(), (images(2),)), r"ExportedProgram.*module\(\)"),
        (lambda: nn.Linear, "class Linear.*instance"),
        (lambda: lambda x: x, "function.*wrap"),
        (lambda: "resnet18", "got str"),
    ],
    ids=["program", "class", "function", "name"],
)
def test_what_is_no_module(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Engine(make())


def test_float_functional_is_not_quantised() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.sum = vgg(), torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            return self.sum.add(self.inner(x), self.inner(x))

    assert Engine(Sum().eval()).attribute(images(1)).maps.isfinite().all()


def test_a_configured_shape_that_the_model_does_not_take_waits_for_images() -> None:
    model = vit()
    model.patch_embed.proj = nn.Conv2d(1, 24, 8, 8)
    model.pretrained_cfg = {"input_size": SHAPE}
    engine = Engine(model)
    with pytest.raises(RuntimeError, match="no plan yet"):
        _ = engine.plan
    assert engine.attribute(images(2)[:, :1]).maps.shape == (2, 1, SIZE, SIZE)


@pytest.mark.parametrize("shape", [224, (224, 224), (3, 0, 224), (3.0, 224, 224), "abc"])
def test_shapes_that_are_none(shape: Any) -> None:
    with pytest.raises(ValueError, match="input_shape"):
        Engine(vgg(), input_shape=shape)
