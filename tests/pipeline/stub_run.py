"""Runs with an engine of a few lines, quick to start; also as a program, slowed down so that it can be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ramp_fast.data import open_source
from ramp_fast.data.decoders import Decoders
from ramp_fast.data.pixels import Framing
from ramp_fast.explainer import Attribution
from ramp_fast.pipeline.planning import image_lines
from ramp_fast.pipeline.run import Job, Tally
from ramp_fast.pipeline.targets import Targets
from ramp_fast.results.map_writer import MapWriter, images_digest
from ramp_fast.results.maps import Plan

SIZE, CLASSES = 16, 5
CONFIG: dict[str, Any] = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


class StubEngine:
    """Input x gradient of a linear model, image by image so that no batch shows."""

    def __init__(self) -> None:
        self.weight = torch.randn(CLASSES, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(0))

    def logits(self, images: Tensor) -> Tensor:
        return torch.stack([(self.weight * image.flatten()).sum(1) for image in images])

    def attribute(
        self, images: Tensor, target: Any = None, contrast: str = "others", normalize: str = "max"
    ) -> Attribution:
        logits = self.logits(images)
        chosen = logits.argmax(1) if target is None else target
        maps = images.reshape(-1, *(1,) * (chosen.dim() - 1), 3, SIZE, SIZE) * self.weight[chosen].reshape(
            *chosen.shape, 3, SIZE, SIZE
        )
        return Attribution(maps.clone(), chosen, logits)


class SlowEngine(StubEngine):
    """Leaves time to be killed in."""

    def attribute(self, images: Tensor, *args: Any, **options: Any) -> Attribution:
        time.sleep(0.1)
        return super().attribute(images, *args, **options)


def photographs(folder: Path, count: int, size: tuple[int, int] = (30, 24), scale: int = 4) -> Path:
    """Smooth pictures, so that resizing keeps them alike."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number in range(count):
        small = rng.integers(0, 256, (size[1] // scale, size[0] // scale, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def run(
    folder: Path,
    out: Path,
    *,
    engine: Any = None,
    batch_size: int = 4,
    workers: int = 0,
    targets: str = "predicted",
    channels: bool = False,
    config: dict[str, Any] = CONFIG,
) -> Tally:
    """What is missing of a store of the photographs, in shards of four."""
    source = open_source(folder)
    wanted = Targets.parse(targets)
    several = (len(wanted.names),) if len(wanted.names) > 1 else ()
    images = image_lines(source, None)
    plan = Plan(
        {},
        {},
        {"layout": source.layout, "digest": source.digest(), "labelled": False, "problems": []},
        len(source),
        4,
        [f"class {k}" for k in range(CLASSES)],
        (*several, *((3,) if channels else ()), SIZE, SIZE),
        "float16",
        wanted.names,
        channels,
        images_digest(images),
    )
    with MapWriter(out) as store, Decoders(Framing.of(config), batch_size, workers) as decoders:
        if store.plan is None:
            store.create(plan, images)
        settings = {"mean": config["mean"], "std": config["std"], "device": torch.device("cpu"), "targets": wanted}
        job = Job(engine or StubEngine(), store, source.locate, [-1] * len(source), decoders, **settings)
        finished = store.stored.finished()
        return job.run([shard for shard in range(plan.shards) if shard not in finished])


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), engine=SlowEngine(), batch_size=1, workers=1)
