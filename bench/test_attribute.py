"""How much one attribution costs, against the model's own forward pass in default torch settings.

    pytest bench/test_attribute.py -q

Rounds alternate forward pass and attribution, so that both see the same machine; medians are compared. The limits
are those of bench/NOTES.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ramp_fast import Engine

BATCH, ROUNDS = 8, 5

# (model, precision): most times the forward pass, as ordered in the project's issues.
LIMITS = {
    ("vit_base_patch16_224", "mixed"): 2.2,
    ("resnet50", "mixed"): 4.0,
    ("vgg16", "mixed"): 4.0,
}


@pytest.mark.parametrize(("name", "precision"), LIMITS)
@pytest.mark.benchmark(group="attribute / forward")
def test_cost_in_forward_passes(benchmark: Any, name: str, precision: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(BATCH, *model.default_cfg["input_size"])
    engine = Engine(model, precision=precision)
    forward: list[float] = []

    def time_forward() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        start = time.perf_counter()
        with torch.no_grad():
            model(images)
        forward.append(time.perf_counter() - start)
        return (images,), {}

    result = benchmark.pedantic(engine.attribute, setup=time_forward, rounds=ROUNDS, warmup_rounds=1)
    assert result.maps.shape == images.shape
    assert result.maps.isfinite().all()
    base = statistics.median(forward[1:])
    ratio = benchmark.stats.stats.median / base
    benchmark.extra_info.update(forward_seconds=base, ratio=ratio)
    print(
        f"\n{name} {precision}: forward {base:.3f} s, attribute {benchmark.stats.stats.median:.3f} s, {ratio:.2f} times"
    )
    assert ratio <= LIMITS[name, precision]


def test_peak_memory() -> None:
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), "vit_base_patch16_224", "--batch", str(BATCH)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout)
    print("\n", figures)
    assert figures["above_model"] <= 2500
