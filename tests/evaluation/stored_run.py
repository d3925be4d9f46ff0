"""A store of maps of a network of one parameter, and evaluations of it; also as a program that can be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ramp_fast.cli.common import state_settings
from ramp_fast.data import ClassNames, Preprocessing, open_source
from ramp_fast.data.decoders import Decoders
from ramp_fast.data.pixels import Framing
from ramp_fast.evaluation import Evaluation, evaluate_maps
from ramp_fast.explainer import Attribution
from ramp_fast.methods import input_x_gradient
from ramp_fast.metrics import Complexity, Metric
from ramp_fast.metrics.base import MetricInputs
from ramp_fast.models import LoadedModel
from ramp_fast.pipeline.planning import make_plan
from ramp_fast.pipeline.run import Job
from ramp_fast.pipeline.targets import Targets
from ramp_fast.results.map_writer import MapWriter

SIZE, CLASSES, SHARD = 16, 3, 4
CONFIG: dict[str, Any] = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


class Bright(nn.Module):
    """Class k where channel k is brightest, above all on the left."""

    def __init__(self, scale: float = 3.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.linspace(2, 0, x.shape[-1])).mean((2, 3))


class Gradients:
    """Input x gradient, as an engine."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(images)

    def attribute(self, images: Tensor, target: Any = None, contrast: str = "", normalize: str = "") -> Attribution:
        logits = self.logits(images)
        chosen = logits.argmax(1) if target is None else target
        columns = [input_x_gradient(self.model, images, k) for k in chosen.reshape(len(images), -1).T]
        return Attribution(torch.stack(columns, 1).reshape(*chosen.shape, *images.shape[1:]), chosen, logits)


class Slow(Complexity):
    """Leaves time to be killed in."""

    def measure(self, sample: MetricInputs, **options: Any) -> dict[str, Tensor]:
        time.sleep(0.05)
        return super().measure(sample, **options)


def photographs(folder: Path, count: int = 10) -> Path:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png", compress_level=0)
    return folder


def loaded() -> LoadedModel:
    return LoadedModel(Bright().eval(), "bright", "none", Preprocessing(CONFIG), ClassNames(CLASSES))


def write_store(
    folder: Path, out: Path, targets: str = "predicted", channels: bool = False, shards: int | None = None
) -> Path:
    """What is missing of a store of the photographs' maps, or of its first shards."""
    model, source = loaded(), open_source(folder)
    asked = {"layout": "auto", "split": None, "limit": None, "class_of": None, "rule": "ixg", "decoding": "exact"}
    request = {**asked, "paths": {"source": str(folder), "labels": None}}
    wanted = Targets.parse(targets, CLASSES)
    how = {"dtype": "float16", "channels": channels, "shard_size": SHARD}
    with MapWriter(out) as store, Decoders(Framing.of(CONFIG), 3, 0) as decoders:
        if store.plan is None:
            store.create(*make_plan(request, state_settings(model), model, source, None, wanted, **how))
        settings = {"mean": CONFIG["mean"], "std": CONFIG["std"], "device": torch.device("cpu"), "targets": wanted}
        job = Job(Gradients(model.model), store, source.locate, [-1] * len(source), decoders, **settings)
        assert store.plan is not None
        finished = store.stored.finished()
        job.run([s for s in range(store.plan.shards)[:shards] if s not in finished])
    return out


def evaluation(store: Path, out: Path, metrics: Any = None, **options: Any) -> Evaluation | None:
    """Of a store, by metrics that look at maps alone, draw at random, and have curves."""
    model = options.pop("model", None) or Bright().eval()
    names = ["complexity", "sensitivity_n:sizes=(4,8),samples=3", "deletion:steps=4"]
    return evaluate_maps(store, model, metrics or names, out, **{"batch_size": 3, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file, but for locks."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "locks")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def slow(model: nn.Module) -> dict[str, Metric | str]:
    return {"slow": Slow(model), "deletion": "deletion:steps=4"}


if __name__ == "__main__":
    network = Bright().eval()
    found = evaluation(Path(sys.argv[1]), Path(sys.argv[2]), slow(network), model=network, batch_size=1)
    assert found is not None
    found.save(Path(sys.argv[2]) / "evaluation.json")
