"""``ramp-fast verify`` looks at a store of maps: checksums, missing shards, samples computed once more."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ramp_fast.cli.common import FAILED, OK, complain, count, say_line
from ramp_fast.cli.run import add_decoding_options, job_for

if TYPE_CHECKING:
    from ramp_fast.results.map_writer import MapWriter
    from ramp_fast.results.maps import Plan

__all__ = ["add_command"]

TOLERANCE = 0.02
"""Relative distance of a map computed once more, by which other processors and devices may differ."""


def add_command(commands: Any) -> None:
    """``ramp-fast verify``."""
    verify = commands.add_parser(
        "verify",
        help="check a store of maps",
        description="Check a store that `ramp-fast run` has written: checksums of all files, missing shards, and some "
        "images attributed once more. Nothing in the store is changed.",
    )
    verify.add_argument("store", metavar="STORE", help="its folder")
    verify.add_argument(
        "--samples", type=count(0), default=8, metavar="N", help="images attributed once more (default: 8)"
    )
    verify.add_argument("--source", metavar="SOURCE", help="where the images lie now (default: where they lay)")
    verify.add_argument("--checkpoint", metavar="FILE", help="where the weights lie now (default: where they lay)")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="R",
        help=f"relative distance at which a map counts as another one (default: {TOLERANCE})",
    )
    add_decoding_options(verify.add_argument_group("running"))
    verify.set_defaults(run=_verify, kept="nothing was changed")


def _verify(arguments: argparse.Namespace) -> int:
    from ramp_fast.results.map_writer import MapWriter, check_file
    from ramp_fast.results.maps import MAPS, open_maps

    open_maps(arguments.store)  # which says so where it is none
    with MapWriter(arguments.store) as store:
        plan = store.plan
        assert plan is not None
        problems = 0
        lines = store.stored.journal()
        for shard, line in sorted(lines.items()):
            for spec in plan.arrays.values():
                path = store.folder / MAPS / spec.file(shard)
                wrong = check_file(path, spec, plan, shard, line.files.get(spec.name, ""))
                if wrong is not None:
                    problems += 1
                    complain(f"{path}: {wrong}; remove it, and the same `ramp-fast run` computes shard {shard} again")
        missing = [shard for shard in range(plan.shards) if shard not in lines]
        if missing:
            complain(f"{arguments.store}: {len(missing)} of {plan.shards} shards are not finished: run goes on")
        done = [number for number, is_done in enumerate(store.stored.done) if is_done]
        chosen = [done[i * len(done) // arguments.samples] for i in range(min(arguments.samples, len(done)))]
        worst, others = 0.0, 0
        if chosen and not problems:
            worst, others = _compare(arguments, store, plan, chosen)
    parts = [f"{len(lines)} of {plan.shards} shards", f"{len(done)} of {plan.count} images have a map"]
    if problems:
        parts.append(f"{problems} files are damaged or missing")
    elif chosen:
        same = "to the last bit" if worst == 0 else f"to {worst:.1e}"
        parts.append(f"{others} of {len(chosen)} maps are others" if others else f"{len(chosen)} maps again, {same}")
    say_line(f"{arguments.store}: {'; '.join(parts)}", sys.stdout)
    return FAILED if problems or missing or others else OK


def _compare(arguments: argparse.Namespace, store: MapWriter, plan: Plan, chosen: Sequence[int]) -> tuple[float, int]:
    """Attribute images once more: the largest relative distance of a map, and how many are others."""
    import numpy as np

    from ramp_fast.pipeline.planning import check_source, source_of
    from ramp_fast.results.maps import decoded, read_images

    request = plan.request
    source = source_of(request, arguments.source or request["paths"]["source"])
    images = read_images(store.folder)
    check_source(plan, images, source, arguments.store)
    labels = [-1 if image.label is None else image.label for image in images]
    worst, others = 0.0, 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        loaded = _load(request, arguments)
        with job_for(request, store, loaded, source, labels, arguments) as job:
            for number, arrays, failure in job.recompute(chosen):
                shown = source.shown(number)
                if failure is not None:
                    others += 1
                    complain(f"{shown}: {failure}")
                    continue
                if int(arrays["source_crc32"]) != int(store.stored.array("source_crc32", number, number + 1)[0]):
                    others += 1
                    complain(f"{shown}: the image has other bytes than what was attributed")
                    continue
                before = store.stored[number]
                now = decoded(arrays["maps"], arrays["scale"])
                distance = float(np.linalg.norm(now - before.map) / (np.linalg.norm(before.map) or 1.0))
                worst = max(worst, distance)
                if distance > arguments.tolerance or not np.array_equal(arrays["target"], before.target):
                    others += 1
                    complain(f"{shown}: the map computed now differs by {distance:.2e} of its norm")
    return worst, others


def _load(request: Mapping[str, Any], arguments: argparse.Namespace) -> Any:
    from ramp_fast.models import load_model
    from ramp_fast.results.store import StoreError, fingerprint
    from ramp_fast.specs import literal

    paths = request["paths"]
    checkpoint = arguments.checkpoint or paths["checkpoint"]
    loaded = load_model(
        request["model"],
        checkpoint,
        num_classes=request["num_classes"],
        class_names=paths["class_names"],
        model_args={key: literal(value) for key, value in request["model_args"].items()},
        mean=request["mean"],
        std=request["std"],
        crop_pct=request["crop_pct"],
    )
    if checkpoint is not None and fingerprint(checkpoint)["sha256"] != request["checkpoint"]:
        raise StoreError(f"{checkpoint}: not the weights that the maps were computed with")
    return loaded
