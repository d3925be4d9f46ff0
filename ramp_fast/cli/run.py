"""``ramp-fast run`` attributes a whole data set into a store of maps, and goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ramp_fast.cli.common import (
    FAILED,
    OK,
    add_attribution_options,
    add_model_options,
    add_running_options,
    add_source_options,
    chosen_device,
    complain,
    count,
    load,
    part_of,
    rule_settings,
    say,
    say_line,
    shows_bar,
    source_options,
    state_settings,
)
from ramp_fast.errors import InputError

if TYPE_CHECKING:
    import torch

    from ramp_fast.data import Source
    from ramp_fast.models import LoadedModel
    from ramp_fast.pipeline.run import Job, Tally
    from ramp_fast.pipeline.targets import Engine
    from ramp_fast.results.map_writer import MapWriter
    from ramp_fast.results.maps import ImageLine, Plan

__all__ = ["add_command", "add_decoding_options", "job_for", "make_engine"]

NAMED_FAILURES = 20
"""How many failures the summary names; ``failures.csv`` has all."""

CHECKED_COPIES = 1000
"""Of images whose files have another time of modification than the plan says, so many are read to see whether they are
the same."""

LOG_EVERY = 10.0
"""Seconds between two lines of ``--log-json``."""


def make_engine(model: torch.nn.Module, request: Mapping[str, Any], input_shape: tuple[int, int, int]) -> Engine:
    """The engine of a run."""
    from ramp_fast import Engine

    return Engine(
        model,
        rule=request["rule"],
        precision=request["precision"],
        strict=request["strict"],
        input_shape=input_shape,
    )


def add_command(commands: Any) -> None:
    """``ramp-fast run``."""
    run = commands.add_parser(
        "run",
        help="attribute a whole data set",
        description="Attribute a whole data set into a store of maps: zarr, a journal, and what failed.",
        epilog="The same command goes on where it was stopped, however it was stopped.",
    )
    run.add_argument("source", metavar="SOURCE", help="a folder, .tar, .zip or .parquet, or a folder of these")
    run.add_argument("--out", required=True, metavar="STORE", help="folder of the store, made when missing")
    add_model_options(run)

    what = run.add_argument_group("attribution")
    what.add_argument(
        "--targets",
        default="predicted",
        metavar="LIST",
        help="classes to explain: predicted (default), label, top:K, numbers, or several of these with commas",
    )
    add_attribution_options(what)

    stored = run.add_argument_group("store")
    stored.add_argument(
        "--dtype", default="float16", choices=["float16", "float32", "int8"], help="of maps (default: float16)"
    )
    stored.add_argument("--channels", action="store_true", help="keep channels (default: their sum)")
    stored.add_argument("--shard-size", type=count(1), default=512, metavar="N", help="images of a file (default: 512)")

    add_source_options(run.add_argument_group("source"))

    how = run.add_argument_group("running")
    how.add_argument("--fast-decode", action="store_true", help="decode JPEGs at reduced size: maps differ a little")
    add_decoding_options(how)
    how.add_argument(
        "--shards",
        type=part_of,
        metavar="I/N",
        help="do the I-th of N parts (from 1), beside other runs on the same store: on other devices or machines",
    )
    how.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on the machines of a Ray cluster, which see the same files (default: a cluster of this machine)",
    )
    how.add_argument("--retry-failed", action="store_true", help="do shards with failed images again")
    how.add_argument("--log-json", action="store_true", help="progress as lines of JSON on standard output")
    run.set_defaults(run=_run, kept="finished shards are kept, the same command goes on from there")


def add_decoding_options(how: argparse._ArgumentGroup) -> None:
    """Batches, devices, processes."""
    how.add_argument(
        "--batch-size", type=count(1, 4096), metavar="N", help="images at a time (default: 16 on CPUs, else 64)"
    )
    add_running_options(how, "processes that decode images, 0: none but this one (default: by the cores)")


def _run(arguments: argparse.Namespace) -> int:
    from ramp_fast.pipeline.planning import check_request, check_source, source_of
    from ramp_fast.results.map_writer import MapWriter
    from ramp_fast.results.maps import read_images

    if arguments.ray is not None and arguments.shards is not None:
        raise InputError("--shards and --ray are two ways to share a run: pass one of them")
    request = _request(arguments)
    with MapWriter(arguments.out, arguments.shards) as store, warnings.catch_warnings():
        # Pillow warns of large images and odd metadata; what matters of it is a problem of the data here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if store.plan is not None:
            check_request(store.plan, request, arguments.out)
        source = source_of(request, arguments.source)
        plan, loaded = _planned(store, arguments, request, source)
        images = read_images(arguments.out)
        other = check_source(plan, images, source, arguments.out)
        _check_contents(store, source, other, arguments.out)
        todo = _unfinished(store, arguments.retry_failed)
        if not todo:
            store.write_failures()
            return _finish(arguments, store, images, source, None)
        _warn_of_room(plan, len(todo), arguments.out)
        if arguments.ray is None:
            if loaded is None:
                loaded = load(arguments)
                _check_loaded(plan, arguments, loaded)
            tally = _attribute(arguments, store, loaded, source, images, todo)
            return _finish(arguments, store, images, source, tally)
    # Its workers write the store: this process has let go of it.
    tally = _on_ray(arguments, plan, todo)
    with MapWriter(arguments.out) as store:
        store.write_failures()
        tally.failures = sum(len(store.failed(shard)) for shard in todo)
        return _finish(arguments, store, images, source, tally)


def _on_ray(arguments: argparse.Namespace, plan: Plan, todo: Sequence[int]) -> Tally:
    from tqdm import tqdm

    from ramp_fast.cli.on_ray import run_on_ray
    from ramp_fast.pipeline.run import Tally

    sizes = [len(plan.range(shard)) for shard in todo]
    tally = Tally()
    shown = shows_bar(arguments)
    with tqdm(total=sum(sizes), unit="image", file=sys.stderr, dynamic_ncols=True, disable=not shown) as bar:
        log = _Log(sum(sizes), bar, arguments.log_json)

        def progress(finished: int) -> None:
            tally.images = min(finished * plan.shard_size, sum(sizes))
            log(tally)

        run_on_ray(arguments, todo, _part_on_ray, progress)
    tally.images = sum(sizes)
    tally.ended = time.perf_counter()
    return tally


def _part_on_ray(arguments: argparse.Namespace, part: tuple[int, int], shards: Iterator[int]) -> None:
    """What a worker on a cluster does."""
    from ramp_fast.pipeline.planning import check_source, source_of
    from ramp_fast.results.map_writer import MapWriter
    from ramp_fast.results.maps import read_images

    request = _request(arguments)
    with MapWriter(arguments.out, part) as store, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        plan = store.plan
        assert plan is not None
        images = read_images(arguments.out)
        source = source_of(request, arguments.source)
        check_source(plan, images, source, arguments.out)
        loaded = load(arguments)
        _check_loaded(plan, arguments, loaded)
        labels = [-1 if image.label is None else image.label for image in images]
        started = _now()
        with job_for(plan.request, store, loaded, source, labels, arguments) as job:
            job.run(shards)
        store.append_run(_about_run(job, started))


def _planned(
    store: MapWriter, arguments: argparse.Namespace, request: dict[str, Any], source: Source
) -> tuple[Plan, LoadedModel | None]:
    """The plan, made if there is none, and the model if it has been loaded for that."""
    from ramp_fast.pipeline.planning import check_request

    if store.plan is not None:
        return store.plan, None
    loaded = load(arguments)
    with store.alone():
        plan = store.look()  # another part may have made it meanwhile
        if plan is None:
            return _make_plan(store, arguments, request, loaded, source), loaded
    check_request(plan, request, arguments.out)
    _check_loaded(plan, arguments, loaded)
    return plan, loaded


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as far as it decides about values; files by their SHA-256."""
    return {
        "model": arguments.model,
        "checkpoint": _file_digest("--checkpoint", arguments.checkpoint),
        "num_classes": arguments.num_classes,
        "class_names": _file_digest("--class-names", arguments.class_names),
        "mean": arguments.mean,
        "std": arguments.std,
        "crop_pct": arguments.crop_pct,
        **rule_settings(arguments),
        "targets": arguments.targets,
        "dtype": arguments.dtype,
        "channels": arguments.channels,
        "decoding": "scaled" if arguments.fast_decode else "exact",
        "shard_size": arguments.shard_size,
        "layout": arguments.layout,
        "split": arguments.split,
        "class_of": source_options(arguments)["targets"],
        "limit": arguments.limit,
        "labels": _file_digest("--labels", arguments.labels),
        "paths": {
            "source": os.path.abspath(arguments.source),
            "labels": _whole_path(arguments.labels),
            "checkpoint": _whole_path(arguments.checkpoint),
            "class_names": _whole_path(arguments.class_names),
        },
    }


def _whole_path(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _file_digest(option: str, path: str | None) -> str | None:
    from ramp_fast._files import reason
    from ramp_fast.results.store import fingerprint

    if path is None:
        return None
    if path == "":  # which pathlib takes for the current folder
        raise InputError(f"{option} has an empty name")
    try:
        return str(fingerprint(path)["sha256"])
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be read: {reason(error)}") from error


def _make_plan(
    store: MapWriter, arguments: argparse.Namespace, request: dict[str, Any], loaded: LoadedModel, source: Source
) -> Plan:
    from ramp_fast.data.pixels import Framing
    from ramp_fast.data.voc import check_targets
    from ramp_fast.pipeline.planning import make_plan
    from ramp_fast.pipeline.targets import Targets

    Framing.of(loaded.preprocessing.config)  # which refuses what it does not know
    if request["class_of"] is not None:
        check_targets(request["class_of"], loaded.class_names)
    if arguments.contrast == "others" and len(loaded.class_names) == 1:
        raise InputError("the model has one class, and no others to contrast it with: pass --contrast none")
    targets = Targets.parse(arguments.targets, len(loaded.class_names))
    plan, images = make_plan(
        request,
        state_settings(loaded),
        loaded,
        source,
        _labels(arguments, source, loaded, needed=targets.needs_labels()),
        targets,
        dtype=arguments.dtype,
        channels=arguments.channels,
        shard_size=arguments.shard_size,
    )
    store.create(plan, images)
    return plan


def _labels(arguments: argparse.Namespace, source: Source, loaded: LoadedModel, needed: bool) -> Sequence[int] | None:
    """The classes that the source says; None, with a word about it, where folders are named by no class."""
    try:
        return source.labels(loaded.class_names)
    except InputError as error:
        if needed or arguments.layout != "auto" or arguments.labels is not None:
            raise
        complain(f"labels are left out: {error}")
        return None


def _check_loaded(plan: Plan, arguments: argparse.Namespace, loaded: LoadedModel) -> None:
    from ramp_fast.pipeline.planning import check_settings

    check_settings(plan, state_settings(loaded), arguments.out)


def _check_contents(store: MapWriter, source: Source, images: Sequence[int], out: str) -> None:
    """Refuse images that have been attributed and have other bytes now, though they are of the same size."""
    from ramp_fast.data import ImageError
    from ramp_fast.results.store import StoreError

    if not images:
        return
    stored = store.stored
    done = stored.done
    suspects = [number for number in images if done[number]]
    if len(suspects) > CHECKED_COPIES:  # all files are copies: a sample tells
        suspects = [suspects[i * len(suspects) // CHECKED_COPIES] for i in range(CHECKED_COPIES)]
    checksums = stored.array("source_crc32")
    for number in suspects:
        try:
            found = zlib.crc32(source.read(number))
        except (ImageError, OSError):
            found = -1
        if found != int(checksums[number]):
            raise StoreError(
                f"{out}: the source has changed since the plan: {source.shown(number)} has other bytes than what was "
                "attributed; choose another --out"
            )


def _unfinished(store: MapWriter, retry: bool) -> list[int]:
    assert store.plan is not None
    finished = store.stored.finished()
    own = store.own_shards(store.plan.shards)
    return [shard for shard in own if shard not in finished or (retry and store.failed(shard))]


def _warn_of_room(plan: Plan, shards: int, out: str) -> None:
    needed = shards * sum(spec.file_bytes(plan.shard_size, plan.shard_size) for spec in plan.arrays.values())
    needed = min(needed, sum(spec.item_bytes for spec in plan.arrays.values()) * plan.count)
    free = shutil.disk_usage(out).free
    if needed > free:
        complain(f"{out}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free")


@contextmanager
def job_for(
    request: Mapping[str, Any],
    store: MapWriter,
    loaded: LoadedModel,
    source: Source,
    labels: Sequence[int],
    arguments: argparse.Namespace,
    on_failure: Callable[[int, str], None] | None = None,
) -> Iterator[Job]:
    """The run of a request: with its engine, and processes that decode."""
    from ramp_fast.data.decoders import Decoders
    from ramp_fast.data.pixels import Framing
    from ramp_fast.pipeline.run import Job
    from ramp_fast.pipeline.targets import Targets

    device = chosen_device(arguments.device)
    on_cpu = device.type == "cpu"
    batch_size = arguments.batch_size or (16 if on_cpu else 64)
    batch_size = min(batch_size, request["shard_size"])
    workers = _usual_decoders(on_cpu) if arguments.workers is None else arguments.workers
    framing = Framing.of(loaded.preprocessing.config, request["decoding"] == "scaled")
    with Decoders(framing, batch_size, workers) as decoders:
        # They start while the model is captured.
        engine = make_engine(loaded.model.to(device), request, loaded.preprocessing.input_size)
        yield Job(
            engine,
            store,
            source.locate,
            labels,
            decoders,
            mean=loaded.preprocessing.config["mean"],
            std=loaded.preprocessing.config["std"],
            device=device,
            targets=Targets.parse(request["targets"]),
            contrast=request["contrast"],
            normalize=request["normalize"],
            on_failure=on_failure,
        )


def _usual_decoders(on_cpu: bool) -> int:
    """Where the engine computes on the same cores they decode while it waits for images, all cores together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores if on_cpu else cores - 1, 16))


def _attribute(
    arguments: argparse.Namespace,
    store: MapWriter,
    loaded: LoadedModel,
    source: Source,
    images: Sequence[ImageLine],
    todo: Sequence[int],
) -> Tally:
    from tqdm import tqdm

    assert store.plan is not None
    plan = store.plan
    total = sum(len(plan.range(shard)) for shard in todo)
    started = _now()
    shown = shows_bar(arguments)
    labels = [-1 if image.label is None else image.label for image in images]
    job: Job | None = None
    with tqdm(
        total=total if store.part else plan.count,
        initial=0 if store.part else plan.count - total,
        unit="image",
        file=sys.stderr,
        dynamic_ncols=True,
        disable=not shown,
    ) as bar:
        line = bar if shown else None

        def failed(number: int, why: str) -> None:
            say_line(f"ramp-fast: {source.shown(number)}: {why}", sys.stderr, line)

        log = _Log(total, bar, arguments.log_json)
        try:
            with job_for(plan.request, store, loaded, source, labels, arguments, failed) as job:
                tally = job.run(todo, log)
        finally:
            if job is not None and job.tally.images:
                store.append_run(_about_run(job, started))
    return tally


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Log:
    """Shows progress: a bar on a terminal, lines of JSON where they are asked for."""

    def __init__(self, total: int, bar: Any, as_json: bool) -> None:
        self.total, self.bar, self.as_json = total, bar, as_json
        self._shown = 0
        self._next = 0.0

    def __call__(self, tally: Tally) -> None:
        self.bar.update(tally.images - self._shown)
        self._shown = tally.images
        now = time.monotonic()
        if now < self._next and tally.images < self.total:
            return
        self._next = now + (LOG_EVERY if self.as_json else 1.0)
        shares = tally.shares()
        text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        self.bar.set_postfix_str(f"{text}, {tally.failures} failed", refresh=False)
        if self.as_json:
            rate = tally.images / tally.seconds
            said = {
                "images": tally.images,
                "total": self.total,
                "failures": tally.failures,
                "images_per_second": round(rate, 2),
                "seconds": round(tally.seconds, 1),
                "seconds_left": round((self.total - tally.images) / rate, 1),
                **{name: round(share, 4) for name, share in shares.items()},
            }
            say(json.dumps(said), sys.stdout)


def _about_run(job: Job, started: str) -> dict[str, Any]:
    import torch

    from ramp_fast import __version__

    tally = job.tally
    return {
        "started": started,
        "images": tally.images,
        "failures": tally.failures,
        "seconds": round(tally.seconds, 3),
        "images_per_second": round(tally.images / tally.seconds, 3),
        **{name: round(share, 4) for name, share in tally.shares().items()},
        "decoding_seconds": round(tally.decoding, 3),
        "device": str(job.device),
        "device_name": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "batch_size": job.decoders.batch_size,
        "ramp_fast": __version__,
        "torch": str(torch.__version__),
    }


def _finished_images(store: MapWriter) -> int:
    """Those of this run's shards, with what failed."""
    assert store.plan is not None
    return sum(len(store.plan.range(shard)) for shard in store.own_shards(store.plan.shards))


def _finish(
    arguments: argparse.Namespace,
    store: MapWriter,
    images: Sequence[ImageLine],
    source: Source,
    tally: Tally | None,
) -> int:
    """Say what has come of it; the exit code."""
    failures = store.stored.failures()
    for problem in source.problems:
        complain(f"{problem.path}: {problem.message}")
    if tally is None:
        which = "" if store.part is None else " of part {}/{}".format(*store.part)
        parts = [f"nothing to do: {_finished_images(store)} images{which} are finished"]
    else:
        parts = [f"{tally.images - tally.failures} attributed", f"{int(store.stored.done.sum())} in the store"]
    if failures:
        named = list(failures)[:NAMED_FAILURES]
        more = f" and {len(failures) - len(named)} more" if len(failures) > len(named) else ""
        parts.append(f"{len(failures)} failed: {', '.join(named)}{more} (failures.csv says why)")
    if source.problems:
        parts.append(f"{len(source.problems)} files of the source cannot be used")
    took = "" if tally is None else f" ({tally.seconds:.1f} s, {tally.images / tally.seconds:.1f} images/s)"
    say_line(f"{arguments.out}: {'; '.join(parts)}{took}", sys.stderr if arguments.log_json else sys.stdout)
    return FAILED if failures or source.problems else OK
