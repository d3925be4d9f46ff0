"""A store without model and images: what is written is a function of the image's number. Also run as a program."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ramp_fast.results.map_writer import MapWriter, images_digest
from ramp_fast.results.maps import ImageLine, Plan

COUNT, SHARD, CLASSES = 10, 4, 3
FAILED = {6: "broken image: it ends too early"}


def plan_of(count: int = COUNT, dtype: str = "float16", targets: tuple[str, ...] = ("predicted",)) -> Plan:
    shape = (2, 3) if len(targets) == 1 else (len(targets), 2, 3)
    images = images_of(count)
    names = [f"class {k}" for k in range(CLASSES)]
    about = {"layout": "flat", "digest": "", "labelled": True, "problems": []}
    return Plan({"rule": "a"}, {}, about, count, SHARD, names, shape, dtype, targets, False, images_digest(images))


def images_of(count: int = COUNT) -> list[ImageLine]:
    return [ImageLine(f"folder/image {number}", number % CLASSES, 100 + number, number) for number in range(count)]


def batch_of(plan: Plan, images: range) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(images.start)
    arrays = {}
    for name, spec in plan.arrays.items():
        if name != "done":
            arrays[name] = generator.integers(0, CLASSES, (len(images), *spec.one)).astype(spec.dtype)
    return arrays


def write(folder: Path, plan: Plan, part: tuple[int, int] | None = None) -> MapWriter:
    """All that is missing of a store, or of a part of it."""
    with MapWriter(folder, part) as store:
        with store.alone():
            if store.look() is None:
                store.create(plan, images_of(plan.count))
        finished = store.stored.finished()
        number, count = part or (1, 1)
        for shard in range(number - 1, plan.shards, count):
            if shard in finished:
                continue
            write_shard(store, shard)
            store.write_failures()
        store.write_failures()
    return store


def write_shard(store: MapWriter, shard: int) -> None:
    """One shard, in batches of up to three."""
    assert store.plan is not None
    writer = store.writer(shard)
    try:
        images = store.plan.range(shard)
        for start in range(images.start, images.stop, 3):
            part = range(start, min(start + 3, images.stop))
            failed = {number - start: FAILED[number] for number in part if number in FAILED}
            writer.write(batch_of(store.plan, part), failed)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a store, but for locks and what says when runs were."""
    files = (path for path in sorted(folder.rglob("*")) if path.name != "runs.jsonl" and path.parent.name != "locks")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


if __name__ == "__main__":
    write(Path(sys.argv[1]), plan_of())
