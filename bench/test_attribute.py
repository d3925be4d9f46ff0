"""How much one attribution costs, against the model's own forward pass in default torch settings.

    pytest bench/test_attribute.py -q

The limits are for two cores with AVX-512 at full width and bfloat16 (Zen 5); bench/LOG.md says what other processors
reach and why. ``--results NAME`` writes the figures to ``bench/results``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ramp_fast import Engine

BATCH, ROUNDS = 8, 5

# (model, precision): the forward passes that an attribution may take at most.
LIMITS = {
    ("vit_base_patch16_224", "mixed"): 1.4,
    ("vit_base_patch16_224", "float32"): 2.2,
    ("vit_small_patch16_224", "mixed"): 1.6,
    ("deit3_base_patch16_224", "mixed"): 1.6,
    ("resnet50", "mixed"): 2.0,
    ("vgg16", "mixed"): 1.6,
}


@pytest.mark.parametrize(("name", "precision"), LIMITS)
@pytest.mark.benchmark(group="attribute / forward")
def test_cost_in_forward_passes(benchmark: Any, against_forward: Any, name: str, precision: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(BATCH, *model.default_cfg["input_size"])
    engine = Engine(model, precision=precision)
    for _ in range(4):  # with the warm-up round: until the trials of groups of images are over
        engine.attribute(images)
    result = against_forward(lambda: engine.attribute(images), model, images, ROUNDS, name=name, method=precision)
    assert result.maps.shape == images.shape
    assert result.maps.isfinite().all()
    assert benchmark.extra_info["ratio"] <= LIMITS[name, precision]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16", "vit_tiny_patch16_224", "vit_base_patch16_224"])
@pytest.mark.benchmark(group="logits / forward")
def test_logits_in_forward_passes(benchmark: Any, against_forward: Any, name: str) -> None:
    """What metrics of an engine take for a batch of masked copies, against the model's own forward pass."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(BATCH, *model.default_cfg["input_size"])
    engine = Engine(model)
    for _ in range(2):  # as above
        engine.logits(images)
    found = against_forward(lambda: engine.logits(images), model, images, ROUNDS, name=name, method="logits")
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)


def test_peak_memory(keep: Any) -> None:
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), "vit_base_patch16_224", "--batch", str(BATCH)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout)
    print("\n", figures)
    keep(f"{figures['model']}/{BATCH}/mixed/peak memory", figures["above_model"], "MB")
    assert figures["above_model"] <= 1400
