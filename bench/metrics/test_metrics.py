"""What do metrics cost here, with Quantus and with the published package? One group per question.

    pytest bench/metrics -q -s --benchmark-json metrics.json

Every group computes the same numbers in two ways, which is asserted. ``RAMP_FAST_PUBLISHED`` names a checkout of the
published package (it needs pydantic and matplotlib); Quantus comes with the extra ``dev``.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import GAE, Deletion

IMAGES = 16
FEATURES = 3 * 224 * 224
STEP = 1568  # Quantus wants a divisor of the pixels: 96 steps
STEPS = FEATURES // STEP


class Still(nn.Module):
    """Answers at once: what is left is the masking."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[0.2, 0.5, 0.3]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(x.shape[0], -1)


def setting(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Images, predicted classes and maps: all scores differ, so that every way masks the same entries."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, 224, 224)
    with torch.no_grad():
        target = model(images).argmax(1)
    maps = torch.stack([torch.randperm(FEATURES).view(3, 224, 224).float() for _ in range(IMAGES)])
    return model.eval(), images, target, maps


def ours(model: nn.Module | Engine, images: Tensor, target: Tensor, maps: Tensor) -> np.ndarray:
    metric = Deletion(model, steps=STEPS, granularity="entry", baseline="black")
    return metric.update(images, target, None, maps=maps)["curve"][:, 1:].numpy()


def with_an_engine(model: nn.Module, images: Tensor, target: Tensor, maps: Tensor) -> np.ndarray:
    """The engine's making counts."""
    return ours(Engine(model, input_shape=(3, 224, 224)), images, target, maps)


def quantus_pixel_flipping(model: nn.Module, images: Tensor, target: Tensor, maps: Tensor) -> np.ndarray:
    quantus = pytest.importorskip("quantus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = quantus.PixelFlipping(
            features_in_step=STEP, perturb_baseline="black", normalise=False, disable_warnings=True
        )
        curves = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=target.numpy(),
            a_batch=maps.numpy(),
            softmax=True,
            batch_size=IMAGES,
        )
    return np.asarray(curves)


WAYS = {"ramp_fast": ours, "ramp_fast, engine": with_an_engine, "Quantus": quantus_pixel_flipping}
_curves: dict[tuple[str, str], np.ndarray] = {}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (kind, way)
        for kind in ("masking alone", "resnet18")
        for way in WAYS
        if kind == "resnet18" or "engine" not in way
    ],
)
def test_deletion(benchmark: Any, kind: str, way: str) -> None:
    benchmark.group = f"deletion, {IMAGES} images, {STEPS} steps, {kind}"
    torch.manual_seed(0)  # both ways get the same weights
    arguments = setting(Still() if kind == "masking alone" else timm.create_model("resnet18").eval())
    rounds = 5 if kind == "masking alone" else 1
    found = benchmark.pedantic(WAYS[way], args=arguments, rounds=rounds, warmup_rounds=int(rounds > 1))
    _curves[kind, way] = found
    if (kind, "ramp_fast") in _curves:
        np.testing.assert_allclose(found, _curves[kind, "ramp_fast"], rtol=1e-4)


def _published(model: nn.Module) -> Any:
    """The published GAE and absLRP, from the checkout that ``RAMP_FAST_PUBLISHED`` names."""
    path = os.environ.get("RAMP_FAST_PUBLISHED")
    if path is None:
        pytest.skip("RAMP_FAST_PUBLISHED names no checkout")
    sys.path.append(path)
    try:
        from abslrp_gae.abslrp.relevancy_methods import AbsLRPRelevancyMethod
        from abslrp_gae.abslrp.rules.models import VisionTransformerAbsLRPRule
        from abslrp_gae.gae.gae import GlobalEvaluationMetric
    finally:
        sys.path.remove(path)
    VisionTransformerAbsLRPRule().apply(model)
    return GlobalEvaluationMetric(device="cpu"), AbsLRPRelevancyMethod(model, torch.device("cpu"))


@pytest.mark.parametrize("way", ["ramp_fast", "ramp_fast, input x gradient", "published package"])
def test_gae(benchmark: Any, way: str) -> None:
    """Of contrastive absLRP; once without the maps, to tell what of it is the metric."""
    benchmark.group = f"GAE, {IMAGES} images, vit_tiny_patch16_224"
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    images = torch.randn(IMAGES, 3, 224, 224)
    with torch.no_grad():
        labels = model(images).argmax(1)
    if way == "published package":
        metric, method = _published(model)
        data = torch.utils.data.TensorDataset(images, labels)

        def call() -> Tensor:
            return metric.run({"abslrp": method}, model, data, IMAGES)["abslrp"]["gae"]
    else:
        method = Engine(model, rule="abslrp-release") if way == "ramp_fast" else input_x_gradient

        def call() -> Tensor:
            return GAE(model, "published").update(images, labels, method)["gae"]

    found = benchmark.pedantic(call, rounds=1 if way == "published package" else 3, warmup_rounds=0)
    assert found.shape == (IMAGES // 4,)
    assert torch.isfinite(found).all()
