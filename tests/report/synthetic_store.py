"""A store of maps without model and images, written by the store's own writer: blobs where the number says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ramp_fast.results.map_writer import MapWriter, images_digest
from ramp_fast.results.maps import ImageLine, Plan

NASTY = (
    "\"quoted\" & 'single'",
    "<script>alert(1)</script>",
    "naïve 猫 ελ",
    "a\\b</script><img src=x onerror=alert(2)>",
)
"""Names of classes and of images that must stay text."""


def write_store(
    folder: Path,
    count: int = 40,
    size: tuple[int, int] = (12, 16),
    classes: int = 6,
    *,
    targets: Sequence[str] = ("predicted",),
    channels: bool = False,
    dtype: str = "float16",
    shard_size: int = 16,
    names: Sequence[str] | None = None,
    labels: bool = True,
    failed: Sequence[int] = (),
    finished: int | None = None,
    settings: dict[str, Any] | None = None,
    request: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    lines: Sequence[ImageLine] | None = None,
    checksums: Sequence[int] | None = None,
) -> Path:
    """A store; ``finished`` shards of it, by default all. Image k is of class ``k % classes`` and every third wrong."""
    draw = np.random.default_rng(0)
    names = [f"folder/image {k}" for k in range(count)] if names is None else names
    if lines is None:
        lines = [ImageLine(name, k % classes if labels else None, 100, k) for k, name in enumerate(names)]
    kinds = [*NASTY, *(f"class {k}" for k in range(len(NASTY), classes))][:classes]
    shape = (*((len(targets),) if len(targets) > 1 else ()), *((3,) if channels else ()), *size)
    about = source or {"layout": "flat", "digest": "", "labelled": labels, "problems": []}
    plan = Plan(
        request or {"rule": "abslrp", "model": "synthetic"},
        settings or {},
        about,
        count,
        shard_size,
        kinds,
        shape,
        dtype,
        list(targets),
        channels,
        images_digest(lines),
    )
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    with MapWriter(folder) as store:
        store.create(plan, lines)
        for shard in range(plan.shards if finished is None else finished):
            images = plan.range(shard)
            numbers = np.arange(images.start, images.stop)
            label = numbers % classes
            predicted = np.where(numbers % 3 == 2, (label + 1) % classes, label)
            logits = draw.normal(size=(len(numbers), classes)).astype(np.float32)
            logits[np.arange(len(numbers)), predicted] = logits.max(1) + 1 + numbers % 5
            centre = draw.uniform(0.2, 0.8, (len(numbers), 2, 1, 1)) * np.array(size)[:, None, None]
            blob = np.exp(-((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2) / (0.02 * size[0] * size[1]))
            other = np.exp(-((y - centre[:, 1]) ** 2 + (x - centre[:, 0]) ** 2) / (0.01 * size[0] * size[1]))
            maps = np.clip(blob - 0.6 * other + draw.normal(0, 0.03, blob.shape), -1, 1)
            for axis in range(1, 1 + len(plan.map_shape) - 2):
                maps = np.repeat(np.expand_dims(maps, axis), plan.map_shape[axis - 1], axis)
            target = np.stack([label if name == "label" else predicted for name in targets], 1)
            arrays = {
                "maps": maps * 127 if dtype == "int8" else maps,
                "scale": np.full((len(numbers), *plan.arrays["scale"].one), 0.5, np.float32),
                "target": target if len(targets) > 1 else target[:, 0],
                "logits": logits,
                "label": label if labels else np.full(len(numbers), -1),
                "source_crc32": np.zeros(len(numbers)) if checksums is None else np.asarray(checksums)[numbers],
            }
            writer = store.writer(shard)
            writer.write(arrays, {k - images.start: f"broken <b>image</b> {k}" for k in failed if k in images})
            writer.finish()
        store.write_failures()
        about_run = {"started": "2030-01-02T03:04:05+00:00", "images": count, "failures": len(failed), "seconds": 2.5}
        store.append_run({**about_run, "images_per_second": count / 2.5, "device": "cpu", "device_name": "CPU"})
    return folder
