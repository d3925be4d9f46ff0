"""Relevance of inner layers, conditions on it, and how much of it every module keeps."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_models import CLASSES, FAMILIES, images, vgg, vit
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "rules"))
import modified_autograd as oracle


def swin() -> nn.Module:
    torch.manual_seed(4)
    sizes = {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, num_classes=CLASSES, **sizes)
    return model.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "vit": (vit, 16, ["patch_embed", "blocks.0", "blocks.0.attn.proj", "blocks.1", "norm"]),
    "resnet": (FAMILIES["resnet"], 16, ["maxpool", "layer2", "layer3.0.conv1", "layer4"]),
    "vgg": (vgg, 16, ["0", "1", "2", "4"]),
    "swin": (swin, 32, ["layers.0", "layers.0.blocks.0.attn", "layers.1"]),
}
ORACLES: dict[str, Callable[[], oracle.Modified]] = {
    "attnlrp": lambda: oracle.Modified(),
    "lrp-gamma": lambda: oracle.Modified(oracle.gamma(0.25)),
}


def network(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    build, size, layers = NETWORKS[name]
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # some are zero to begin with
    return model, images(2, size=size).double(), layers


@contextmanager
def hooked(model: nn.Module, hooks: dict[str, Callable[[Tensor], Any]]) -> Iterator[None]:
    """Call a function for the output of each module."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, f=function: f(output))
        for name, function in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_autograd(model: nn.Module, name: str) -> nn.Module:
    return oracle.folded(copy.deepcopy(model)) if name == "resnet" else model


@pytest.mark.parametrize("rule", ORACLES)
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_those_of_modified_autograd(name: str, rule: str) -> None:
    model, x, layers = network(name)
    if name == "resnet":  # what is captured as a BatchNorm is computed by the convolution
        layers = ["bn1" if layer == "maxpool" else layer for layer in layers] + ["maxpool"]
    seed = torch.randn(2, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    outputs: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[[Tensor], None]:
        def kept(output: Tensor) -> None:
            output.register_hook(lambda gradient: outputs.__setitem__(layer, output.detach() * gradient))

        return kept

    reference = by_autograd(model, name)
    with hooked(reference, {layer: keep(layer) for layer in layers}):
        expected = oracle.relevance(reference, x, seed, ORACLES[rule]())
    engine = Engine(model, rule, "float64")
    found = engine.attribute(x, seed, "none", "none", layers=layers)
    assert list(found.layers) == layers
    if name == "swin":  # windows lie in the batch axis; images come first here
        outputs["layers.0.blocks.0.attn"] = outputs["layers.0.blocks.0.attn"].unflatten(0, (2, -1))
    for layer in layers:
        assert found.layers[layer].shape == outputs[layer].shape, layer
        assert outputs[layer].abs().max() > 0, layer
        assert (found.layers[layer] - outputs[layer]).abs().max() < 1e-10 * outputs[layer].abs().max(), layer
    assert (found.maps - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("rule", ["abslrp", "abslrp-release", "lrp-zplus"])
def test_a_layer_has_the_map_of_the_layers_behind_it(rule: str) -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))
    rest = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 49, CLASSES))
    model = nn.Sequential(stem, rest).eval().double()
    x = images(2).double()
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
    contrast = "others" if rule != "lrp-zplus" else "none"
    found = Engine(model, rule, "float64").attribute(x, targets, contrast, "none", layers=["0"])
    expected = Engine(rest, rule, "float64").attribute(stem(x).detach(), targets, contrast, "none").maps
    assert found.layers["0"].shape == (2, 3, 3, 16, 16)
    assert (found.layers["0"] - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("precision", ["float64", "mixed"])
@pytest.mark.parametrize("rule", ["abslrp", "lrp-epsilon", "ramp", "epsilon-plus-flat"])
@pytest.mark.parametrize("name", NETWORKS)
def test_asking_for_layers_leaves_maps_alone(name: str, rule: str, precision: str) -> None:
    model, x, layers = network(name)
    if precision != "float64":
        model, x = model.float(), x.float()
    engine = Engine(model, rule, precision)
    before = engine.attribute(x, 3)
    found = engine.attribute(x, 3, layers=layers)
    after = engine.attribute(x, 3)
    close = 1e-9 if precision == "float64" else 0.05  # fused steps round elsewhere
    assert (found.maps - before.maps).abs().max() < close
    assert torch.equal(after.maps, before.maps)
    one = engine.attribute(x[1:], 3, layers=layers)
    assert torch.equal(one.maps, found.maps[1:])
    assert all(torch.equal(one.layers[layer], found.layers[layer][1:]) for layer in layers)


@pytest.mark.parametrize(("name", "layer", "axis"), [("resnet", "layer3", 1), ("vgg", "1", 1), ("vit", "blocks.0", -1)])
def test_conditions_are_masks_of_the_gradient(name: str, layer: str, axis: int) -> None:
    model, x, _ = network(name)
    engine = Engine(model, "attnlrp", "float64")
    whole = engine.attribute(x, 3, "none", "none", layers=[layer])
    channels = whole.layers[layer].shape[axis]
    reference = by_autograd(model, name)

    def restricted(kept: list[int]) -> Tensor:
        def hook(output: Tensor) -> None:
            mask = torch.zeros(channels, dtype=torch.float64)
            mask[kept] = 1
            shaped = mask.view(-1, *[1] * (-(axis % output.dim()) + output.dim() - 1))
            output.register_hook(lambda gradient: gradient * shaped)

        with hooked(reference, {layer: hook}):
            return oracle.relevance(reference, x, 3, ORACLES["attnlrp"]())

    some = [0, channels - 1]
    found = engine.attribute(x, 3, "none", "none", condition={layer: some}, layers=[layer])
    expected = restricted(some)
    assert expected.abs().max() > 0
    assert (found.maps - expected).abs().max() < 1e-10 * expected.abs().max()
    others = [i for i in range(channels) if i not in some]
    kept = found.layers[layer].movedim(axis, 0)
    assert torch.equal(kept[others], torch.zeros_like(kept[others]))
    assert torch.equal(kept[some], whole.layers[layer].movedim(axis, 0)[some])
    # one condition after the other, and all of them at once
    several = engine.attribute(x, 3, "none", "none", condition=[{layer: i} for i in range(channels)])
    assert several.maps.shape == (2, channels, *x.shape[1:])
    assert several.target.tolist() == [3, 3]
    single = engine.attribute(x, 3, "none", "none", condition={layer: channels - 1})
    torch.testing.assert_close(several.maps[:, -1], single.maps, rtol=1e-9, atol=1e-15)
    assert (several.maps.sum(1) - whole.maps).abs().max() < 1e-10 * whole.maps.abs().max()


def test_a_condition_may_be_numpy_s() -> None:
    engine, x = Engine(vgg(), "lrp-epsilon", input_shape=(3, 16, 16)), images(2)

    def maps(kept: Any) -> Tensor:
        return engine.attribute(x, 1, "none", "none", condition={"0": kept}).maps

    assert torch.equal(maps(np.int64(2)), maps(2))
    assert torch.equal(maps(np.array([1, 3])), maps([1, 3]))
    assert torch.equal(maps([np.int64(1), np.int64(3)]), maps([1, 3]))
    assert torch.equal(maps(np.array([False, True, False, True]).reshape(-1, 1, 1)), maps([1, 3]))
    with pytest.raises(InputError, match="must be a channel"):
        maps(np.array([0.5]))


def test_a_condition_may_be_a_mask_and_name_several_modules() -> None:
    model, x, _ = network("swin")
    engine = Engine(model, "attnlrp", "float64")
    layer = engine.attribute(x, 3, "none", "none", layers=["layers.0"]).layers["layers.0"]  # [B, H, W, C]
    mask = torch.zeros(layer.shape[-1], dtype=torch.bool)
    mask[:4] = True
    parts = [
        engine.attribute(x, 3, "none", "none", condition={"layers.0": m, "layers.1": ~torch.zeros(1, dtype=torch.bool)})
        for m in (mask, ~mask)
    ]
    whole = engine.attribute(x, 3, "none", "none").maps
    assert (parts[0].maps + parts[1].maps - whole).abs().max() < 1e-10 * whole.abs().max()


@pytest.mark.parametrize(("rule", "contrast"), [("attnlrp", "none"), ("abslrp", "others")])
def test_one_condition_holds_for_all_targets(rule: str, contrast: str) -> None:
    model, x, _ = network("resnet")
    engine, condition = Engine(model, rule, "float64"), {"layer3": [0, 5], "layer2": [1, 2, 3]}
    classes = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = engine.attribute(x, classes, contrast, condition=condition, layers=["layer3"])
    assert found.layers["layer3"].shape[:2] == (2, 3)
    for i in range(3):
        single = engine.attribute(x, classes[:, i], contrast, condition=condition)
        torch.testing.assert_close(found.maps[:, i], single.maps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("contrast", ["others", "none"])
def test_conditions_under_abslrp_keep_the_mass_that_is_left(contrast: str) -> None:
    model, x, _ = network("vgg")
    engine = Engine(model, "abslrp", "float64")
    every = engine.attribute(x, 3, contrast, "none", condition={"1": [0, 1, 2, 3]})
    assert (every.maps - engine.attribute(x, 3, contrast, "none").maps).abs().max() < 1e-12
    found = engine.attribute(x, 3, contrast, "none", condition=[{"1": [0]}, {"1": [1, 2, 3]}], layers=["1"])
    assert found.layers["1"].shape == (2, 2, 4, 16, 16)
    if contrast == "none":
        assert torch.allclose(found.maps.abs().sum((2, 3, 4)), found.layers["1"].abs().sum((2, 3, 4)))
        assert torch.allclose(found.maps.abs().sum((1, 2, 3, 4)), torch.ones(2, dtype=torch.float64))


def test_what_no_relevance_reaches_is_zero() -> None:
    model = vgg().double()
    nn.init.zeros_(model[4].weight[3])
    found = Engine(model, "lrp-epsilon", "float64").attribute(images(2).double(), 3, "none", "none", layers=["0", "2"])
    assert all(torch.equal(r, torch.zeros_like(r)) for r in (found.maps, *found.layers.values()))


def test_new_weights_count_for_layers_too() -> None:
    model, x, layers = network("resnet")
    engine = Engine(model, "lrp-epsilon", "float64")
    engine.attribute(x, 3, layers=layers)
    with torch.no_grad():
        model.layer3[0].conv1.weight.mul_(-1)
    found = engine.attribute(x, 3, layers=layers)
    expected = Engine(model, "lrp-epsilon", "float64").attribute(x, 3, layers=layers)
    assert all(torch.equal(found.layers[layer], expected.layers[layer]) for layer in layers)


def test_the_model_s_nan_is_seen_in_layers() -> None:
    model, x, layers = network("resnet")
    model.fc.bias.data[2] = float("nan")
    found = Engine(model, "lrp-epsilon", "float64").attribute(x, 3, layers=layers)
    assert all(r.isnan().all() for r in (found.maps, *found.layers.values()))


class Shared(nn.Module):
    """One activation module that is called twice, a module with two outputs, and one that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.act, self.nothing, self.halves = nn.ReLU(), nn.Dropout(0.5), Halves()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        a, b = self.halves(x.mean((2, 3)))
        return self.act(self.nothing(self.second(torch.cat([a, b], 1))))


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :4] * 2, x[:, 4:] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["frist"]}, "no module 'frist' .did you mean 'first'"),
        ({"layers": "first"}, "layers must be a list of module names"),
        ({"layers": [1]}, "layers must be a list of module names"),
        ({"layers": ["act"]}, "'act' has several outputs"),
        ({"layers": ["halves"]}, "'halves' has several outputs"),
        ({"layers": ["nothing"]}, "'nothing' computes nothing"),
        ({"condition": {"first": [8]}}, "'first' has 8 channels, from 0; got 8"),
        ({"condition": {"first": [-1]}}, "must be a channel, a list of channels or a boolean mask"),
        ({"condition": {"first": 0.5}}, "must be a channel, a list of channels or a boolean mask"),
        ({"condition": {"first": torch.ones(7, dtype=torch.bool)}}, r"must broadcast to .* \[8, 14, 14\], got \[7\]"),
        ({"condition": {"frist": 0}}, "no module 'frist'"),
        ({"condition": ["first"]}, "condition must be a dict"),
        ({"condition": []}, "condition must be a dict"),
        ({"condition": {}}, "condition must be a dict"),
        ({"condition": [{"first": 0}], "target": torch.zeros(2, 2, dtype=torch.long)}, "one class per image"),
        ({"check_conservation": 1}, "check_conservation must be True or False"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    engine = Engine(Shared().eval(), "lrp-epsilon", "float32")
    with pytest.raises(InputError, match=message):
        engine.attribute(images(2), **arguments)


def test_what_a_rule_computes_inside_another_operation_is_refused() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=CLASSES).eval()
    engine = Engine(model, "abslrp", "float32")  # rotary embeddings are one linear map
    engine.attribute(images(1, size=28), 3, layers=["blocks.0.attn"])
    with pytest.raises(InputError, match=r"name the module around it|computes nothing"):
        engine.attribute(images(1, size=28), 3, layers=["blocks.0.attn.q_norm"])


def test_conservation_says_what_biases_keep() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 196, CLASSES)).eval().double()
    x = images(2).double()
    engine = Engine(model, "lrp-epsilon:epsilon=0", "float64")
    found = engine.attribute(x, 3, "none", "none", check_conservation=True)
    balance = found.conservation
    assert balance is not None
    assert balance.operations == [("3", "linear"), ("2", "rearrange"), ("1", "activation"), ("0", "conv")]
    kept = balance.kept
    assert kept.shape == (2, 4)
    assert torch.allclose(kept[:, 0], model[3].bias[3].expand(2))
    coefficients = model[3].weight[3].view(4, 14, 14)
    firing = (model[0](x) > 0).double()
    assert torch.allclose(kept[:, 3], (firing * coefficients * model[0].bias.view(-1, 1, 1)).sum((1, 2, 3)))
    assert kept[:, 1:3].abs().max() < 1e-12
    assert torch.allclose(balance.arrived[:, 0], found.logits[:, 3])
    assert torch.allclose(balance.left[:, -1], found.maps.sum((1, 2, 3)))
    assert "3       linear" in str(balance)


def test_layers_and_conditions_of_the_rule_without_divisions() -> None:
    model, x, layers = network("resnet")
    engine = Engine(model, "lrp-undivided", "float64")
    found = engine.attribute(x, 3, "none", layers=[*layers, "layer3"])
    assert torch.equal(found.maps, engine.attribute(x, 3, "none").maps)
    assert all(torch.allclose(r.abs().flatten(1).amax(1), r.new_ones(2)) for r in found.layers.values())
    largest = int(found.layers["layer3"].abs().amax((0, 2, 3)).argmax())
    part = engine.attribute(x, 3, "none", condition={"layer3": largest}, layers=["layer3"]).layers["layer3"]
    assert part[:, largest].abs().amax() == 1
    assert part[:, torch.arange(part.shape[1]) != largest].abs().amax() == 0
    with pytest.raises(InputError, match="multiplies relevance"):
        engine.attribute(x, 3, check_conservation=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_conservation_adds_up_from_the_logits_to_the_pixels(name: str) -> None:
    model, x, layers = network(name)
    engine = Engine(model, "lrp-epsilon", "float64")
    classes = torch.tensor([[1, 2], [3, 4]])
    found = engine.attribute(x, classes, "none", "none", check_conservation=True, layers=layers)
    assert found.conservation is not None
    stayed = found.conservation.kept.sum(-1)
    logits = found.logits.gather(1, classes)
    assert torch.allclose(logits - stayed, found.maps.sum((2, 3, 4)), rtol=1e-8, atol=1e-10)
    assert (found.maps - engine.attribute(x, classes, "none", "none").maps).abs().max() < 1e-12


@pytest.mark.parametrize(("rule", "reason"), [("abslrp", "restores the mass"), ("guided-backprop", "are gradients")])
def test_conservation_is_refused_where_sums_say_nothing(rule: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Engine(vgg(), rule).attribute(images(1), 3, check_conservation=True)
