"""Every method: equal to its definition or to captum called directly, the same in any batch, leaving no trace."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import CLASSES, FAMILIES, SIZE, images, resnet, vgg, vit  # beside this folder
from test_no_trace import Fails, Watch, with_gradients

from ramp_fast import Engine, InputError, RampFastError, UnsupportedModelError, rules
from ramp_fast.methods import (
    METHODS,
    GradCAM,
    IntegratedGradients,
    Method,
    Occlusion,
    Random,
    SmoothGrad,
    gradient,
    input_x_gradient,
    make_method,
)
from ramp_fast.methods.base import seed_of
from ramp_fast.rules import NAMED

TARGET = torch.tensor([1, 7, 4])
FUNCTIONS = [name for name in METHODS if name not in NAMED]
QUICK: dict[str, dict[str, Any]] = {
    "ig": {"steps": 6, "batch_size": 4},
    "smoothgrad": {"samples": 5, "batch_size": 2},
    "occlusion": {"window": 6, "stride": 5, "batch_size": 4},
}


def function(name: str, model: nn.Module, **settings: Any) -> Method:
    method = make_method(name, model, **{**QUICK.get(name, {}), **settings})
    assert not isinstance(method, Engine)
    return method


def cases() -> list[tuple[str, str]]:
    return [(name, family) for name in FUNCTIONS for family in FAMILIES if name != "rollout" or family == "vit"]


@pytest.mark.parametrize(("name", "family"), cases())
def test_maps_of_every_method(name: str, family: str) -> None:
    """Finite, of the right shape, without history, not constant; no trace is left, whether gradients are on or off."""
    model = with_gradients(FAMILIES[family]())
    method = function(name, model)
    x = images()
    with Watch(model, x, TARGET), warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = method(model, x, TARGET)
    assert maps.shape in (x.shape, (3, 1, SIZE, SIZE))
    assert maps.dtype == x.dtype
    assert not maps.requires_grad
    assert bool(maps.isfinite().all())
    assert bool((maps.flatten(1).std(1) > 0).any())
    with torch.no_grad(), Watch(model, x):
        assert torch.equal(method(model, x, TARGET), maps)
    assert method(model.double(), x.double(), TARGET).dtype == torch.float64


@pytest.mark.parametrize(("name", "family"), cases())
def test_independent_of_the_batch(name: str, family: str) -> None:
    model, x = FAMILIES[family](), images()
    method = function(name, model)
    whole = method(model, x, TARGET)
    turned = method(model, x.flip(0), TARGET.flip(0)).flip(0)
    single = torch.cat([method(model, x[i : i + 1], TARGET[i : i + 1]) for i in range(3)])
    if name in ("ig", "smoothgrad", "occlusion", "random"):
        assert torch.equal(whole, turned)
        assert torch.equal(whole, single)
    else:  # one batch through the model, whose sums depend on its size
        scale = whole.abs().max()
        assert (whole - turned).abs().max() <= 2e-6 * scale
        assert (whole - single).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_is_that_of_the_call(name: str) -> None:
    model, x = vit(), images()
    method = function(name, model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.detach().mul_(1.5)
    maps = method(other, x, TARGET)
    assert torch.equal(maps, function(name, other)(other, x, TARGET))
    assert torch.equal(maps, method(model, x, TARGET)) == (name == "random")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hooks_are_gone_after_an_exception_in_the_model(name: str) -> None:
    model = vit()
    method = function(name, model)
    model.head = Fails(after=0)
    x = images()
    with Watch(model, x):
        if name == "random":
            method(model, x, TARGET)
        else:
            with pytest.raises(RuntimeError, match="out of order"):
                method(model, x, TARGET)


@pytest.mark.parametrize("name", ["ig", "smoothgrad", "occlusion"])
def test_the_batch_size_bounds_what_goes_through_the_model(name: str) -> None:
    model, sizes = vgg(), set()
    method = function(name, model, batch_size=3)
    model.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    method(model, images(), TARGET)
    assert max(sizes) == 3


class TestGradients:
    def test_against_a_loop(self) -> None:
        model, x = vit().double(), images().double()
        rows = []
        for i in range(3):
            leaf = x[i : i + 1].clone().requires_grad_()
            model(leaf)[0, TARGET[i]].backward()
            rows.append(leaf.grad)
        expected = torch.cat([r for r in rows if r is not None])
        torch.testing.assert_close(gradient(model, x, TARGET), expected, rtol=1e-10, atol=1e-18)
        torch.testing.assert_close(input_x_gradient(model, x, TARGET), expected * x, rtol=1e-10, atol=1e-18)


class TestCaptum:
    """What captum returns when it is called directly, in float64."""

    @pytest.fixture
    def model(self) -> nn.Module:
        return resnet().double()

    @pytest.fixture
    def x(self) -> Tensor:
        return images(size=64).double()

    def test_integrated_gradients(self, model: nn.Module) -> None:
        x = images().double()
        found = IntegratedGradients(steps=9, baseline=0.3, batch_size=4)(model, x, TARGET)
        expected = captum.attr.IntegratedGradients(model).attribute(x, baselines=0.3, target=TARGET, n_steps=9)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)  # captum sums its steps in float32
        # completeness, of a smooth network: maps sum to the logit's rise from the baseline
        model = vit().double()
        found = IntegratedGradients(steps=40, baseline=0.3)(model, x, TARGET)
        rise = (model(x) - model(torch.full_like(x, 0.3))).gather(1, TARGET[:, None])[:, 0].detach()
        torch.testing.assert_close(found.sum((1, 2, 3)), rise, rtol=1e-4, atol=0)

    def test_smoothgrad(self, model: nn.Module, x: Tensor) -> None:
        found = SmoothGrad(samples=5, noise=0.2, batch_size=3, seed=11)(model, x, TARGET)
        for i in range(3):
            image = x[i : i + 1]
            torch.manual_seed(seed_of(image[0], 11))
            expected = captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute(
                image,
                nt_samples=5,
                nt_samples_batch_size=3,
                stdevs=0.2 * float(image.max() - image.min()),
                target=int(TARGET[i]),
                abs=False,
            )
            assert torch.equal(found[i : i + 1], expected)

    def test_occlusion(self, model: nn.Module, x: Tensor) -> None:
        found = Occlusion(window=20, stride=12, baseline=0.1, batch_size=5)(model, x, TARGET)
        expected = captum.attr.Occlusion(model).attribute(
            x, sliding_window_shapes=(3, 20, 20), strides=(3, 12, 12), baselines=0.1, target=TARGET
        )
        for channel in range(3):
            torch.testing.assert_close(found[:, 0], expected[:, channel].double(), rtol=1e-6, atol=1e-12)
        # by default: 64 // 7 = 9 pixels, every 4
        assert torch.equal(Occlusion()(model, x[:1], TARGET[:1]), Occlusion(9, 4)(model, x[:1], TARGET[:1]))

    @pytest.mark.parametrize("relu", [True, False])
    def test_gradcam(self, model: nn.Module, x: Tensor, relu: bool) -> None:
        found = GradCAM(relu=relu)(model, x, TARGET)
        expected = captum.attr.LayerGradCam(model, model.layer4).attribute(x, target=TARGET, relu_attributions=relu)
        assert expected.shape == (3, 1, 2, 2)
        expected = captum.attr.LayerAttribution.interpolate(expected, (64, 64), interpolate_mode="bilinear")
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
        assert bool((found < 0).any()) != relu
        named = GradCAM("layer3", relu)(model, x, TARGET)
        expected = captum.attr.LayerGradCam(model, model.layer3).attribute(x, target=TARGET, relu_attributions=relu)
        expected = captum.attr.LayerAttribution.interpolate(expected, (64, 64), interpolate_mode="bilinear")
        torch.testing.assert_close(named, expected, rtol=1e-10, atol=1e-15)


class TestGradCAM:
    def of_tokens(self, model: nn.Module, x: Tensor, before: int, grid: tuple[int, int]) -> Tensor:
        """By its definition: channels weighed by their mean gradient over the patches."""
        target, kept = TARGET[: len(x)], []
        handle = model.blocks[-1].norm1.register_forward_hook(lambda _, __, out: kept.append(out))
        logit = model(x).gather(1, target[:, None]).sum()
        handle.remove()
        (slope,) = torch.autograd.grad(logit, kept[0])
        patches, weights = kept[0][:, before:], slope[:, before:].mean(1, keepdim=True)
        maps = (patches * weights).sum(-1).reshape(len(x), 1, *grid).detach()
        assert float(maps.abs().min()) > 0
        return nn.functional.interpolate(maps, x.shape[2:], mode="bilinear")

    def test_of_tokens(self) -> None:
        model, x = vit().double(), images().double()
        expected = self.of_tokens(model, x, 1, (2, 2))
        torch.testing.assert_close(GradCAM(relu=False)(model, x, TARGET), expected, rtol=1e-10, atol=1e-18)
        assert torch.equal(GradCAM("blocks.1.norm1")(model, x, TARGET), GradCAM()(model, x, TARGET))

    def test_images_that_are_not_square(self) -> None:
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        size = {"img_size": (16, 32), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        model = VisionTransformer(**size, num_classes=CLASSES, reg_tokens=2).eval().double()
        x = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(0)).double()
        expected = self.of_tokens(model, x, 3, (2, 4))
        torch.testing.assert_close(GradCAM(relu=False)(model, x, TARGET[:1]), expected, rtol=1e-10, atol=1e-18)

    @pytest.mark.parametrize("known", ["stem", "grid", "patch", "nothing"])
    def test_where_a_model_says_how_tokens_lie(self, known: str) -> None:
        from timm.models.mlp_mixer import MlpMixer

        torch.manual_seed(0)
        model = MlpMixer(CLASSES, img_size=16, patch_size=4, num_blocks=2, embed_dim=12).eval().double()
        nn.init.normal_(model.head.weight)  # as initialised it is zero
        x = images().double()
        expected = self.of_tokens(model, x, 0, (4, 4))
        if known != "stem":
            if known == "patch":
                model.patch_size = 4
            if known != "grid":
                model.stem.grid_size = None
            model.stem.patch_size = None
        if known == "nothing":
            with pytest.raises(UnsupportedModelError, match=r"MlpMixer does not say its patch size.*16 tokens"):
                GradCAM()(model, x, TARGET)
        else:
            torch.testing.assert_close(GradCAM(relu=False)(model, x, TARGET), expected, rtol=1e-10, atol=1e-18)

    def test_images_of_another_size_than_the_model_was_made_for(self) -> None:
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        model = VisionTransformer(**size, num_classes=CLASSES, dynamic_img_size=True).eval().double()
        x = images(size=24).double()
        expected = self.of_tokens(model, x, 1, (3, 3))
        torch.testing.assert_close(GradCAM(relu=False)(model, x, TARGET), expected, rtol=1e-10, atol=1e-18)

    def test_tokens_that_were_merged(self) -> None:
        model = vit()
        model.patch_embed.patch_size, model.patch_embed.grid_size = (2, 2), (8, 8)
        with pytest.raises(UnsupportedModelError, match="5 tokens for 8 x 8 patches: VisionTransformer merges"):
            GradCAM()(model, images(), TARGET)

    def test_channels_last(self) -> None:
        from timm.models.swin_transformer import SwinTransformer

        torch.manual_seed(0)
        model = SwinTransformer(
            img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=CLASSES
        ).eval()
        x = images(size=32)
        kept: list[Tensor] = []
        handle = model.norm.register_forward_hook(lambda _, __, out: kept.append(out))
        logit = model(x).gather(1, TARGET[:, None]).sum()
        handle.remove()
        (slope,) = torch.autograd.grad(logit, kept[0])  # [N, h, w, C]
        expected = (kept[0] * slope.mean((1, 2), keepdim=True)).sum(-1).unsqueeze(1).detach()
        expected = nn.functional.interpolate(expected, (32, 32), mode="bilinear")
        torch.testing.assert_close(GradCAM(relu=False)(model, x, TARGET), expected, rtol=1e-4, atol=1e-7)

    def test_no_layer_to_choose(self) -> None:
        from timm.models.vision_transformer import ResPostBlock, VisionTransformer

        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES, block_fn=ResPostBlock
        ).eval()
        with pytest.raises(UnsupportedModelError, match=r"ends in tokens.*layer="):
            GradCAM()(model, images(), TARGET)
        assert GradCAM("blocks.0")(model, images(), TARGET).shape == (3, 1, SIZE, SIZE)
        with pytest.raises(UnsupportedModelError, match="no module 'layer5'"):
            GradCAM("layer5")(resnet(), images(), TARGET)
        with pytest.raises(UnsupportedModelError, match=r"module 'fc' returns \[3, 10\]"):
            GradCAM("fc")(resnet(), images(), TARGET)
        with pytest.raises(UnsupportedModelError, match="more than one position for images of 1 x 1"):
            GradCAM()(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval(), images(size=1), TARGET % 4)

    def test_models_are_not_kept(self) -> None:
        method, model = GradCAM(), resnet()
        method(model, images(), TARGET)
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None


class TestDraws:
    @pytest.mark.parametrize("name", ["random", "smoothgrad"])
    def test_a_function_of_seed_and_values(self, name: str) -> None:
        model, x = vgg(), images()
        maps = function(name, model, seed=3)(model, x, TARGET)
        torch.manual_seed(99)  # of no consequence
        assert torch.equal(function(name, model, seed=3)(model, x, TARGET), maps)
        assert not torch.isclose(function(name, model, seed=4)(model, x, TARGET), maps).all()
        moved = x.clone()
        moved[0, 0, 0, 0] = moved[0, 0, 0, 0].nextafter(torch.tensor(9.0))
        again = function(name, model, seed=3)(model, moved, TARGET)
        assert torch.equal(again[1:], maps[1:])
        assert not torch.equal(again[0], maps[0])

    def test_random_is_standard_normal(self) -> None:
        maps = Random()(vgg(), images(8, size=64), torch.zeros(8, dtype=torch.long)).flatten(1)
        assert maps.shape == (8, 3 * 64 * 64)
        assert float(maps.mean(1).abs().max()) < 0.05  # 5 / sqrt(12288)
        assert float((maps.std(1) - 1).abs().max()) < 0.05
        assert float(torch.corrcoef(maps).fill_diagonal_(0).abs().max()) < 0.05

    def test_random_does_not_hang_on_layout_or_default_dtype(self) -> None:
        model, x = vgg(), images()
        maps = Random()(model, x, TARGET)
        assert torch.equal(Random()(model, x.to(memory_format=torch.channels_last), TARGET), maps)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(Random()(model, x, TARGET), maps)
        finally:
            torch.set_default_dtype(torch.float32)


class TestRegistry:
    def test_engines(self) -> None:
        model = vit()
        maps = []
        for name in ("abslrp", "abslrp-release", "attnlrp"):
            engine = make_method(name, model, precision="float32", seed=1)
            assert isinstance(engine, Engine)
            assert (engine.rule, engine.precision) == (rules.resolve(name), "float32")
            maps.append(engine.attribute(images(), TARGET).maps)
        assert not torch.equal(maps[0], maps[1])
        assert not torch.equal(maps[0], maps[2])

    def test_settings_of_rules_and_of_the_engine(self) -> None:
        engine = make_method("lrp-epsilon", vit(), epsilon=0.5, precision="float64")
        assert isinstance(engine, Engine)
        assert (engine.name, engine.precision) == ("lrp-epsilon:epsilon=0.5", "float64")
        assert {"epsilon", "precision"} <= set(METHODS["lrp-epsilon"].settings)

    def test_rows(self) -> None:
        model = vit()
        for name, entry in METHODS.items():
            if name in NAMED:
                continue
            method = make_method(name, model)
            assert entry.draws == (name in ("random", "smoothgrad"))
            assert (entry.extra == "captum") == (name in ("ig", "smoothgrad", "gradcam", "occlusion"))
            assert entry.description
            assert isinstance(method.__name__, str)  # type: ignore[union-attr]
            for setting, value in entry.settings.items():
                assert getattr(method, setting) == value
        assert METHODS["ig"].settings == {"steps": 50, "baseline": 0.0, "batch_size": 16}
        assert "precision" in METHODS["abslrp"].settings
        assert not {"rule", "model", "seed"} & set(METHODS["abslrp"].settings)

    def test_settings_reach_the_method(self) -> None:
        model = resnet()
        assert make_method("ig", model, steps=7) == IntegratedGradients(steps=7)
        assert make_method("smoothgrad", model, seed=5, samples=3) == SmoothGrad(samples=3, seed=5)
        assert make_method("gradcam", model, layer="layer2") == GradCAM("layer2")

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("grad-cam", {}, r"unknown method 'grad-cam' \(did you mean 'gradcam'\?\); known: abslrp, abslrp-release"),
            ("ig", {"samples": 3}, "ig has no setting 'samples'; it has steps, baseline, batch_size"),
            ("ixg", {"steps": 3}, "ixg has no setting 'steps'; it has none"),
            ("abslrp", {"rule": "abslrp-release"}, "abslrp has no setting 'rule'"),
            ("ig", {"steps": 0}, "steps must be a positive integer, got 0"),
            ("ig", {"steps": 2.0}, "steps must be a positive integer, got 2.0"),
            ("ig", {"baseline": float("nan")}, "baseline must be a finite number, got nan"),
            ("ig", {"batch_size": 0}, "batch_size must be a positive integer"),
            ("smoothgrad", {"samples": True}, "samples must be a positive integer, got True"),
            ("smoothgrad", {"noise": 0.0}, "noise must be above 0"),
            ("smoothgrad", {"seed": "a"}, "seed must be an integer, got 'a'"),
            ("random", {"seed": 0.5}, "seed must be an integer, got 0.5"),
            ("occlusion", {"window": 4, "stride": 5}, "stride 5 is larger than window 4"),
            ("occlusion", {"window": -1}, "window must be a positive integer"),
            ("gradcam", {"layer": 3}, "layer must be the name of a module, got int"),
        ],
    )
    def test_refused(self, name: str, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            make_method(name, resnet(), **settings)

    def test_a_model_that_is_none(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            make_method("ig", "resnet")  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["ig", "smoothgrad", "gradcam", "occlusion"])
    def test_without_captum(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "captum.attr", None)
        with pytest.raises(RampFastError, match=r"pip install 'ramp_fast\[captum\]'"):
            make_method(name, resnet())


@pytest.mark.parametrize("name", FUNCTIONS)
class TestBadInput:
    def refused(self, name: str, x: Any, target: Any, message: str, error: type[Exception] = InputError) -> None:
        model = vit()
        method = function(name, model)
        model.forward = None  # type: ignore[assignment]  # nothing is computed first
        with pytest.raises(error, match=f"{method.__name__}: {message}"):  # type: ignore[attr-defined]
            method(model, x, target)

    def test_images(self, name: str) -> None:
        for x, found in (
            (images()[0], r"\[3, 16, 16\], torch.float32"),
            (images().to(torch.uint8), "torch.uint8"),
            ([1], r"\[1\]"),
        ):
            self.refused(name, x, TARGET, rf"images must be a floating point Tensor \[N, C, H, W\], got .*{found}")
        self.refused(name, images()[:0], TARGET[:0], "no images")

    def test_target(self, name: str) -> None:
        for target in (TARGET[:2], TARGET.float(), TARGET > 3, TARGET[:, None], 3, None):
            self.refused(name, images(), target, r"target must be integers \[3\], one per image; got ")
        for target in (TARGET - 2, TARGET + 3):
            self.refused(name, images(), target, rf"target must be 0 to {CLASSES - 1}, got ")

    def test_training(self, name: str) -> None:
        model = vit()
        method = function(name, model)
        with pytest.raises(UnsupportedModelError, match=r"training mode: call model.eval\(\)"):
            method(model.train(), images(), TARGET)


def test_windows_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="window 17, stride 8 for images of 16 x 16"):
        Occlusion(17)(vgg(), images(), TARGET)
    with pytest.raises(InputError, match="window 2, stride 3"):
        Occlusion(stride=3)(vgg(), images(), TARGET)
