"""Families of models: tiny ones by default, full-sized ones under ``slow``, trained ones under ``models``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import (
    beit,
    convnext,
    deit,
    efficientnet,
    eva,
    mlp_mixer,
    resnet,
    swin_transformer,
    vision_transformer,
)
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.rules import AbsLRP, RelativeStabilizer

CLASSES = 10

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": CLASSES}


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=CLASSES)


def torchvision_resnet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def distilled() -> nn.Module:
    model = deit.VisionTransformerDistilled(**VIT)
    model.distilled_training = False
    return model


TINY: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (lambda: vision_transformer.VisionTransformer(**VIT), 32),
    "vit, average pooling": (lambda: vision_transformer.VisionTransformer(**VIT, global_pool="avg"), 32),
    "vit, qk-norm": (lambda: vision_transformer.VisionTransformer(**VIT, qk_norm=True), 32),
    "deit3": (lambda: vision_transformer.VisionTransformer(**VIT, no_embed_class=True, init_values=0.1), 32),
    "dinov2, registers": (
        lambda: vision_transformer.VisionTransformer(**VIT, reg_tokens=4, no_embed_class=True, init_values=0.1),
        32,
    ),
    "siglip": (lambda: vision_transformer.VisionTransformer(**VIT, class_token=False, global_pool="map"), 32),
    "distilled deit": (distilled, 32),
    "beit": (
        lambda: beit.Beit(**VIT, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, global_pool="avg"),
        32,
    ),
    "eva02": (
        lambda: eva.Eva(
            **VIT,
            mlp_ratio=8 / 3,
            swiglu_mlp=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(4, 4),
            qkv_fused=False,
            norm_layer=nn.LayerNorm,
        ),
        32,
    ),
    "swin": (
        lambda: swin_transformer.SwinTransformer(
            img_size=64, embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=CLASSES
        ),
        64,
    ),
    "convnext": (
        lambda: convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=CLASSES, ls_init_value=0.1),
        64,
    ),
    "efficientnet": (
        lambda: efficientnet.EfficientNet(
            efficientnet.decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e3_c12_se0.25"]]),
            num_classes=CLASSES,
            num_features=24,
            stem_size=8,
            act_layer=nn.SiLU,
        ),
        32,
    ),
    "mixer": (
        lambda: mlp_mixer.MlpMixer(img_size=32, patch_size=8, embed_dim=24, num_blocks=2, num_classes=CLASSES),
        32,
    ),
    "se resnet": (
        lambda: resnet.ResNet(
            resnet.Bottleneck,
            (1, 1, 1, 1),
            num_classes=CLASSES,
            channels=(8, 8, 12, 16),
            block_args={"attn_layer": "se"},
        ),
        64,
    ),
    "torchvision resnet": (torchvision_resnet, 64),
    "torchvision vit": (torchvision_vit, 32),
}

FULL = (
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "beit_base_patch16_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "efficientnet_b0",
    "mixer_s16_224",
    "seresnet50",
    "torchvision:resnet18",
    "torchvision:vit_b_16",
)


@torch.no_grad()
def awake(model: nn.Module) -> nn.Module:
    """Give values to what is initialised to zero or one, so that nothing is invisible by construction."""
    torch.manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif not tensor.any() or float(tensor.std(unbiased=False)) < 1e-5:
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    if name.startswith("torchvision:"):
        torchvision = pytest.importorskip("torchvision")
        return awake(getattr(torchvision.models, name.split(":")[1])()), (3, 224, 224)
    model = timm.create_model(name)
    if getattr(model, "num_classes", 0) == 0:
        model = timm.create_model(name, num_classes=CLASSES)
    return awake(model), tuple(model.default_cfg["input_size"])


def check(model: nn.Module, images: Tensor) -> None:
    """Finite, not zero, the model's own logits, independent of the batch."""
    a = (engine := Engine(model, input_shape=tuple(images.shape[1:]))).attribute(images)
    assert bool(a.maps.isfinite().all())
    assert bool((a.maps.abs().flatten(1).amax(1) == 1).all())
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(a.logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    one = engine.attribute(images[1:])
    assert torch.equal(one.maps[0], a.maps[1])


def tiny(name: str) -> tuple[nn.Module, Tensor]:
    make, size = TINY[name]
    torch.manual_seed(0)
    return awake(make()), torch.randn(2, 3, size, size)


# With untrained weights some logit may be as near to zero as it likes; this bounds the division by it.
BOUNDED = AbsLRP(stabilizer=RelativeStabilizer(0.1))


def errors(model: nn.Module, images: Tensor, precision: str, target: Tensor, rule: AbsLRP) -> Tensor:
    """Of every image: norm of the difference from the float64 map over its norm."""
    exact, maps = (
        Engine(model, rule=rule, precision=p).attribute(images, target).maps.double() for p in ("float64", precision)
    )
    return (maps - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", TINY)
def test_tiny(name: str) -> None:
    check(*tiny(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_tiny_precision(name: str) -> None:
    # bf16 coefficients, 4e-3 each, in narrow layers where few of them average out
    assert float(errors(*tiny(name), "mixed", torch.tensor([1, 2]), BOUNDED).max()) < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name: str) -> None:
    model, shape = build(name)
    check(model, torch.randn(2, *shape))


# Trained networks. RAMP_FAST_MODELS names a folder with load.py (vit_small_tin200(), resnet50()) and its weights.


def photographs(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    transforms = pytest.importorskip("torchvision").transforms
    image = pytest.importorskip("PIL.Image")
    prepare = transforms.Compose(
        [
            transforms.Resize(size * 8 // 7, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))[:4]
    return torch.stack([prepare(image.open(f).convert("RGB")) for f in files])


def trained(name: str) -> tuple[nn.Module, Tensor]:
    folder = os.environ.get("RAMP_FAST_MODELS")
    if not folder:
        pytest.skip("RAMP_FAST_MODELS names no folder")
    scope: dict[str, Any] = {"__file__": str(Path(folder) / "load.py"), "__name__": "load"}
    exec(compile((Path(folder) / "load.py").read_text(), "load.py", "exec"), scope)
    if name == "vit":
        return scope["vit_small_tin200"](), photographs(112, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return scope["resnet50"](), photographs(224, scope["RESNET50_MEAN"], scope["RESNET50_STD"])


# Largest error of the photographs.
TRAINED = {
    "float32": 1e-2,  # 24-bit rounding in 12 or 50 layers
    "mixed": 3e-2,  # 8-bit rounding of the coefficients in every product
}


@pytest.mark.models
@pytest.mark.parametrize("rule", [AbsLRP(), BOUNDED], ids=["published", "bounded"])
@pytest.mark.parametrize("name", ["vit", "resnet50"])
def test_trained(name: str, rule: AbsLRP) -> None:
    model, images = trained(name)
    with torch.no_grad():
        target = model(images).argmax(1)
    for precision, tolerance in TRAINED.items():
        found = errors(model, images, precision, target, rule)
        assert float(found.max()) < tolerance, f"{precision}: {found.tolist()}"
