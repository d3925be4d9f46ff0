"""What does a map cost with ramp_fast, and with other libraries? One group per model: time, and peak memory beside it.

    pytest bench/peers -q -s --benchmark-json peers.json

``--results NAME`` also writes the figures to ``bench/results``.

Every method attributes the same batch to the same classes in PyTorch's settings as they are. Rounds alternate with the
model's own forward pass; ``extra_info`` has the ratio of the medians, seconds and megabytes per image, the latter above
the loaded model in a process of its own. The methods explain different things: this compares costs, not maps.

``RAMP_FAST_PEERS_BATCH`` sets the number of images (8). ``RAMP_FAST_PUBLISHED`` names a checkout of the published
package, which takes 9 GB for eight images of ViT-B/16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ramp_fast import Engine

from .methods import METHODS, MODELS, captum_lrp
from .torchvision_equivalents import resnet50_equivalent, vgg16_equivalent

# Names of results, where they are not those of the methods.
NAMES = {"ramp_fast": "mixed", "ramp_fast, one class": "mixed, one class", "ramp_fast, float32": "float32"}

BATCH = int(os.environ.get("RAMP_FAST_PEERS_BATCH", "8"))


def build(name: str, batch: int = BATCH) -> tuple[nn.Module, Tensor]:
    """A model with random weights, the same ones every time, and images for it."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    return model, torch.randn(batch, *model.default_cfg["input_size"])


def peak_memory(model: str, method: str) -> float:
    """Megabytes above the loaded model."""
    command = [sys.executable, "-m", "peers.memory", model, method, "--batch", str(BATCH)]
    bench = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=bench, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["above_model"]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in MODELS for method in METHODS if name in METHODS[method].models],
)
def test_cost(benchmark: Any, against_forward: Any, keep: Any, name: str, method: str) -> None:
    benchmark.group = f"{name}: one map"
    row = METHODS[method]
    if reason := row.missing():
        pytest.skip(reason)
    memory = peak_memory(name, method) / BATCH
    model, images = build(name)
    attribute = row.prepare(build(name)[0])
    target = torch.arange(BATCH)
    for _ in range(4 if method.startswith("ramp_fast") else 0):  # until the trials of groups of images are over
        attribute(images, target)
    options = {"warmup": row.rounds > 1, "name": name, "method": NAMES.get(method, method)}
    result = against_forward(lambda: attribute(images, target), model, images, row.rounds, **options)
    assert result.shape == (images.shape if method != "forward" else (BATCH, model.num_classes))
    assert result.isfinite().all()
    seconds = benchmark.stats.stats.median / BATCH
    benchmark.extra_info.update(seconds_per_image=seconds, megabytes_per_image=memory)
    keep(f"{name}/{BATCH}/{options['method']}/peak memory", memory, "MB/image")
    print(f"{seconds:.3f} s and {memory:.0f} MB an image")


@pytest.mark.parametrize(
    ("name", "method", "rule"),
    [
        ("vit_base_patch16_224", "LXT AttnLRP", "attnlrp"),
        ("vgg16", "zennit EpsilonPlusFlat", "epsilon-plus-flat"),
        ("resnet50", "zennit EpsilonPlusFlat", "epsilon-plus-flat"),
    ],
)
def test_same_maps(name: str, method: str, rule: str) -> None:
    """In float64; the eps of BatchNorms is next to 0, since zennit leaves it in the BatchNorm that it has merged."""
    row = METHODS[method]
    if reason := row.missing():
        pytest.skip(reason)
    models = [build(name, batch=1)[0].double() for _ in range(2)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-30
    images = build(name, batch=1)[1].double()
    target = torch.tensor([3])
    expected = row.prepare(models[0])(images, target)
    own = vgg16_equivalent(models[1]) if name == "vgg16" else models[1]  # linear layers are convolutions in timm's
    engine = Engine(own, rule, "float64", input_shape=tuple(images.shape[1:]))
    if rule == "attnlrp":
        found = engine.attribute(images, target, "none", "none").maps
    else:  # zennit starts with relevance 1
        found = engine.attribute(images, lambda z: nn.functional.one_hot(target, z.shape[1]) / z, "none", "none").maps
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_captum_lrp_on_vit() -> None:
    """Why captum's LRP is missing among the methods for a ViT; fails once it should be added."""
    if reason := METHODS["captum LRP"].missing():
        pytest.skip(reason)
    model, images = build(MODELS[0], batch=1)
    with pytest.raises(TypeError, match="has no rule defined") as refusal:
        captum_lrp(model)(images, torch.zeros(1, dtype=torch.long))
    pytest.skip(f"captum's LRP does not run on {MODELS[0]}: {refusal.value}")


@pytest.mark.parametrize(("name", "twin"), [("resnet50", resnet50_equivalent), ("vgg16", vgg16_equivalent)])
def test_equivalent(name: str, twin: Any) -> None:
    model, images = build(name, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(twin(model)(images), model(images))
