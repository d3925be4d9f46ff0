"""The engine as a captum method, used by captum's own metrics and wrappers."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import captum.attr
import captum.attr._utils.lrp_rules
import captum.metrics
import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import images, vgg, vit  # beside this folder
from test_no_trace import Watch

import ramp_fast.integrations.captum as adapter
from ramp_fast import Engine, InputError, UnsupportedModelError
from ramp_fast.integrations.captum import LRP, AbsLRP, LayerLRP

TARGET = torch.tensor([1, 7, 4])


def test_gives_the_engines_maps() -> None:
    model, x = vit(), images()
    engine = Engine(model, "abslrp-release", "float32")
    with Watch(model, x):
        method = AbsLRP(model, "abslrp-release", "float32", contrast="none", normalize="sum")
        found = method.attribute(x, TARGET)
    assert isinstance(method, captum.attr.Attribution)
    assert torch.equal(found, engine.attribute(x, TARGET, "none", "sum").maps)
    assert method.forward_func is model
    assert not method.has_convergence_delta()
    for missing in (method.attribute_future, method.compute_convergence_delta):
        with pytest.raises(NotImplementedError, match=r"AbsLRP has no attribute_future|no convergence delta"):
            missing()


def test_captums_ways_to_name_classes_and_inputs() -> None:
    method, x = AbsLRP(vgg()), images()
    expected = method.attribute(x, 4)
    for target in (
        torch.tensor(4),
        torch.tensor([4]),
        [4, 4, 4],
        torch.tensor([4, 4, 4]),
        (4,),
        [(4,)] * 3,
        np.int64(4),
        np.array(4),
        np.array([4, 4, 4], dtype=np.uint16),
    ):
        assert torch.equal(method.attribute(x, target=target), expected)
    assert torch.equal(method.attribute(x, 4, (), internal_batch_size=2), expected)
    (inside,) = method.attribute((x,), 4)
    assert torch.equal(inside, expected)
    assert torch.equal(method.attribute(x, [1, 7, 4]), method.attribute(x, TARGET))
    assert not torch.equal(method.attribute(x, [1, 7, 4]), method.attribute(x, [4, 7, 1]))
    assert method.attribute(x.double(), 4).dtype == torch.float64


def test_no_target_is_for_models_of_one_logit() -> None:
    """Captum's wrappers pass noisy copies on: each of them could be predicted as another class."""
    method, x = AbsLRP(vgg()), images()
    for call in (method.attribute, captum.attr.NoiseTunnel(method).attribute):
        with pytest.raises(InputError, match=r"target is None, and the model has 10 classes: .*argmax\(1\)"):
            call(x)
    model = nn.Sequential(*vgg()[:-1], nn.Linear(256, 1)).eval()
    single = AbsLRP(model, contrast="none")
    assert torch.equal(single.attribute(x), single.attribute(x, 0))
    for target in (None, 0):
        assert torch.equal(AbsLRP(model).attribute(x, target), single.attribute(x, 0))


def test_noise_tunnel() -> None:
    model, x = vgg(), images()
    method = AbsLRP(model, normalize="none")
    torch.manual_seed(8)
    found = captum.attr.NoiseTunnel(method).attribute(x, nt_samples=3, stdevs=0.2, target=TARGET)
    torch.manual_seed(8)
    noisy = x.repeat_interleave(3, 0) + torch.normal(0, torch.full((9, 3, 16, 16), 0.2))
    expected = method.engine.attribute(noisy, TARGET.repeat_interleave(3), normalize="none").maps
    torch.testing.assert_close(found, expected.unflatten(0, (3, 3)).mean(1), rtol=1e-5, atol=1e-9)


def test_infidelity() -> None:
    model, x = vgg(), images()
    maps = AbsLRP(model).attribute(x, TARGET)

    def perturb(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(inputs, 0.1), inputs - 0.1

    found = captum.metrics.infidelity(model, perturb, x, maps, target=TARGET, n_perturb_samples=1)
    with torch.no_grad():
        fall = (model(x) - model(x - 0.1)).gather(1, TARGET[:, None])[:, 0]
    torch.testing.assert_close(found, (0.1 * maps.sum((1, 2, 3)) - fall).square(), rtol=1e-4, atol=1e-6)


def test_sensitivity() -> None:
    method, x = AbsLRP(vgg()), images()
    torch.manual_seed(0)
    found = captum.metrics.sensitivity_max(method.attribute, x, perturb_radius=0.05, n_perturb_samples=2, target=TARGET)
    assert found.shape == (3,)
    assert bool((found > 0).all())


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        (images(), {"additional_forward_args": 3}, "additional_forward_args"),
        (images(), {"additional_forward_args": images()}, "additional_forward_args"),
        (images(), {"target": 1, "return_convergence_delta": True}, "has no convergence delta"),
        (images(), {"target": (1, 2)}, r"one index, the class, .* got \(1, 2\)"),
        (images(), {"target": True}, "got bool True"),
        ((images(), images()), {}, "one input, the images; got 2"),
        ([1], {}, r"inputs must be a Tensor \[N, C, H, W\], got list"),
        (images(), {"target": [1, 2]}, r"list of 3 classes, one per image; got \[1, 2\]"),
        (images(), {"target": [1.0, 2.0, 3.0]}, "a list of these or an integer Tensor; got float 1.0"),
        (images(), {"target": torch.rand(3, 10)}, r"target must be integers \[3\], got \[3, 10\], torch.float32"),
        (images(), {"target": (TARGET,)}, "a list of these or an integer Tensor; got Tensor"),
        (images(), {"target": np.array([0.5, 1, 2])}, r"target must be integers \[3\], got \[3\], torch.float64"),
        (images(), {"target": np.array(["a", "b", "c"])}, "target must be integers .* got an array of <U1"),
        (images(), {"target": "cat"}, "integer Tensor; got str 'cat'"),
        (images(), {"target": 10}, "target must be between 0 and 9"),
    ],
)
def test_refused(inputs: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AbsLRP(vgg()).attribute(inputs, **arguments)


def test_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="contrast must be one of 'others', 'none'; got 'all'"):
        AbsLRP(vgg(), contrast="all")
    with pytest.raises(ValueError, match="normalize must be one of"):
        AbsLRP(vgg(), normalize="mean")
    with pytest.raises(UnsupportedModelError, match="training mode"):
        AbsLRP(nn.Sequential(vgg(), nn.Dropout()))


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = AbsLRP(vgg()).attribute(images(), TARGET)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    try:
        alone = importlib.reload(adapter)
        method = alone.AbsLRP(vgg())
        assert type(method).__mro__[-2].__bases__ == (object,)
        assert torch.equal(method.attribute(images(), TARGET), expected)
    finally:
        monkeypatch.undo()
        importlib.reload(adapter)


class SmallCnn(nn.Sequential):
    """Of layers that captum's LRP has rules for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten(1)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()]
    return SmallCnn(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 10, 1)).eval().double()


def test_lrp_gives_what_captum_gives() -> None:
    model, x = small_cnn(), images().double()
    theirs = captum.attr.LRP(copy.deepcopy(model))
    expected, delta = theirs.attribute(x, TARGET, return_convergence_delta=True)
    method = LRP(model, precision="float64")
    with Watch(model, x):
        found, own = method.attribute(x, TARGET, return_convergence_delta=True)
    assert isinstance(method, captum.attr.Attribution)
    assert method.has_convergence_delta()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(own, delta.detach(), rtol=1e-5, atol=1e-6)
    assert delta.abs().max() > 1e-3
    (inside,) = method.attribute((x,), TARGET)
    assert torch.equal(inside, found)


def test_the_delta_is_that_of_the_scores_below_a_softmax() -> None:
    model, x = small_cnn(), images().double()
    expected = LRP(model, precision="float64").attribute(x, TARGET, return_convergence_delta=True)
    found = LRP(nn.Sequential(model, nn.Softmax(1)), precision="float64").attribute(
        x, TARGET, return_convergence_delta=True
    )
    torch.testing.assert_close(found, expected)


def test_layer_lrp_gives_what_captum_gives() -> None:
    model, x = small_cnn(), images().double()
    twin = copy.deepcopy(model)
    expected = captum.attr.LayerLRP(twin, [twin[0], twin[3]]).attribute(x, 3)
    method = LayerLRP(model, [model[0], model[3]], precision="float64")
    found = method.attribute(x, 3)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs.detach(), rtol=1e-5, atol=1e-7)
    one, delta = LayerLRP(model, model[3], precision="float64").attribute(x, 3, return_convergence_delta=True)
    assert torch.equal(one, found[1])
    torch.testing.assert_close(delta, model(x)[:, 3].detach() - one.sum((1, 2, 3)))


def test_lrp_takes_every_rule_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = vit(), images()
    found = LRP(model, "attnlrp").attribute(x, 3, verbose=True)
    assert torch.equal(found, Engine(model, "attnlrp").attribute(x, 3, "none", "none", check_conservation=True).maps)
    assert "blocks.1.mlp.fc2" in capsys.readouterr().out
    block = LayerLRP(model, model.blocks[0], "attnlrp").attribute(x, 3)
    assert block.shape == (3, 5, 24)
    assert captum.attr.NoiseTunnel(LRP(model, "attnlrp")).attribute(x, target=3, nt_samples=2).shape == x.shape


def test_lrp_refuses_what_it_does_not_do() -> None:
    model, x = small_cnn().float(), images()
    model[3].rule = captum.attr._utils.lrp_rules.GammaRule()
    with pytest.raises(InputError, match=r"modules 3 carry rules in their attribute `rule`"):
        LRP(model)
    del model[3].rule
    with pytest.raises(InputError, match="restores the mass"):
        LRP(model, "abslrp")
    with pytest.raises(InputError, match="Linear is none"):
        LayerLRP(model, nn.Linear(2, 2))
    with pytest.raises(InputError, match="'3' is none"):
        LayerLRP(model, "3")
    with pytest.raises(InputError, match="name the layer before it"):
        LayerLRP(model, model[3]).attribute(x, 3, attribute_to_layer_input=True)
    with pytest.raises(InputError, match="target is None"):
        LRP(model).attribute(x)
