"""``ramp-fast evaluate`` measures attribution methods over a folder of photographs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramp_fast.cli.common import (
    FAILED,
    OK,
    add_model_options,
    add_running_options,
    add_source_options,
    chosen_device,
    complain,
    count,
    load,
    part_of,
    say,
    say_line,
    shows_bar,
    source_options,
)
from ramp_fast.errors import InputError, RampFastError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ramp_fast.data import Dataset
    from ramp_fast.evaluation import Evaluation, Evaluator
    from ramp_fast.explainer import Model

METHODS = ("abslrp", "ixg", "random")
METRICS = ("gae", "deletion", "insertion")
STORED_METRICS = ("deletion", "insertion")
"""Of stored maps, of which GAE would need others."""

FILES = ("evaluation.json", "table.csv", "values.csv")
PLOTS = ("bars.png", "curves.png")

SAVE_EVERY = 60.0
"""Seconds between two writings of what has been evaluated so far."""


def add_command(commands: Any) -> None:
    """``ramp-fast evaluate``."""
    run = commands.add_parser(
        "evaluate",
        help="measure attribution methods",
        description="Measure attribution methods over photographs: a table, values of every image, and plots.",
        epilog="Settings follow a name: --metric deletion:steps=50,granularity=patch:8 --method ig:steps=32. "
        "--list shows all names.",
    )
    run.add_argument(
        "--data",
        metavar="SOURCE",
        help="photographs: a folder, .tar, .zip or .parquet (default: those of the demonstration)",
    )
    run.add_argument(
        "--maps",
        metavar="STORE",
        help="evaluate the maps that `ramp-fast run` has stored, of its model and images",
    )
    run.add_argument("--out", metavar="DIR", help="folder for the results, made when missing")
    run.add_argument("--list", action="store_true", help="show the metrics and methods there are, and stop")
    add_model_options(run, default=None)

    what = run.add_argument_group("evaluation")
    what.add_argument(
        "--metric", action="append", metavar="NAME", help=f"may be repeated (default: {', '.join(METRICS)})"
    )
    what.add_argument(
        "--method", action="append", metavar="NAME", help=f"may be repeated (default: {', '.join(METHODS)})"
    )
    what.add_argument(
        "--explain",
        choices=["label", "predicted"],
        help="explain the class that the data say (default), where they do, or the predicted one",
    )
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default: 0)")

    data = run.add_argument_group("data")
    add_source_options(data)

    how = run.add_argument_group("running")
    how.add_argument("--batch-size", type=count(1), default=16, metavar="N", help="default: 16")
    add_running_options(how)
    how.add_argument(
        "--shards",
        type=part_of,
        metavar="I/N",
        help="with --maps: do the I-th of N parts (from 1), beside others; without it values are put together",
    )
    how.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True, help="write plots (default)")
    run.set_defaults(run=_evaluate, kept="what was evaluated before is in evaluation.json")


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.list:
        say(_listing(), sys.stdout)
        return OK
    if arguments.out is None:
        raise InputError("--out DIR is missing: where results go")
    if arguments.plots and importlib.util.find_spec("matplotlib") is None:
        raise RampFastError("plots need matplotlib: pip install 'ramp_fast[evaluate]', or pass --no-plots")
    from ramp_fast.demo import demo_photographs
    from ramp_fast.evaluation import Evaluator
    from ramp_fast.results.store import check_free, check_writable

    started = time.perf_counter()
    check_writable(arguments.out)
    for name in FILES + (PLOTS if arguments.plots else ()):
        check_free(Path(arguments.out) / name)  # hours later would be late
    if arguments.maps is not None:
        return _evaluate_maps(arguments, started)
    if arguments.shards is not None:
        raise InputError("--shards is for the maps of a store: --maps STORE")
    device = chosen_device(arguments.device)
    loaded = load(arguments)
    from ramp_fast.data import open_data

    with warnings.catch_warnings():
        # Pillow warns of large images and odd metadata; what matters of it is a problem of the data here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        data = open_data(
            demo_photographs()[0].parent if arguments.data is None else arguments.data,
            preprocessing=loaded.preprocessing,
            class_names=loaded.class_names,
            **source_options(arguments),
        )
        run = Evaluator(
            _with_engine(loaded.model.to(device), device, loaded.preprocessing.input_size),
            arguments.metric or METRICS,
            arguments.method or METHODS,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            explain=arguments.explain or "label",
        )
        try:
            _run(run, data, arguments)
        finally:
            result = run.result()
            if result.images:
                _write(result, arguments)
        if not result.images:
            _remove_earlier(arguments, FILES + PLOTS)
    for problem in data.problems:
        complain(f"{problem.path}: {problem.message}")
    say(str(result), sys.stdout)
    say_line(_summary(result, len(data.problems), arguments.out, time.perf_counter() - started), sys.stdout)
    return FAILED if result.failures or data.problems or not result.images else OK


def _evaluate_maps(arguments: argparse.Namespace, started: float) -> int:
    from ramp_fast.cli.evaluate_maps import evaluate_store, unfinished

    arguments.kept = "finished shards are kept, the same command goes on from there"
    result = evaluate_store(arguments, arguments.metric or STORED_METRICS, _with_engine)
    missing = unfinished(arguments.maps)
    seconds = time.perf_counter() - started
    if result is None:
        part = "{}/{}".format(*arguments.shards)
        say_line(
            f"{arguments.out}: part {part} is finished; without --shards all parts are put together ({seconds:.1f} s)",
            sys.stdout,
        )
        return FAILED if missing else OK
    if result.images:
        _write(result, arguments)
        say(str(result), sys.stdout)
    say_line(_summary(result, 0, arguments.out, seconds), sys.stdout)
    return FAILED if missing or not result.images else OK


def _with_engine(model: torch.nn.Module, device: torch.device, shape: tuple[int, int, int]) -> Model:
    """What is evaluated: on CPUs an engine, whose forward pass is faster, where it takes the model and the images."""
    from ramp_fast import Engine

    if device.type == "cpu":
        with contextlib.suppress(UnsupportedModelError, InputError):
            return Engine(model, input_shape=shape)
    return model


def _run(run: Evaluator, data: Dataset, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ramp_fast.data import batches

    saved = time.monotonic()
    shown = shows_bar(arguments)
    with (
        tqdm(total=len(data), unit="image", file=sys.stderr, dynamic_ncols=True, disable=not shown) as bar,
        warnings.catch_warnings(),
    ):
        warnings.showwarning = lambda message, *rest, **more: say_line(
            f"ramp-fast: {message}", sys.stderr, bar if shown else None
        )
        warnings.simplefilter("always", RuntimeWarning)
        for batch in batches(data, arguments.batch_size, arguments.workers):
            run.update(batch)
            bar.update(batch.images.shape[0])
            if time.monotonic() - saved > SAVE_EVERY:
                _remove_earlier(arguments)
                run.result().save(Path(arguments.out) / "evaluation.json")
                saved = time.monotonic()


def _write(result: Evaluation, arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    document, table, values = (_free(out / name) for name in FILES)
    _remove_earlier(arguments)
    result.save(document)
    if not result.rows():
        return
    result.to_csv(table)
    result.to_csv(values, per_image=True)
    if arguments.plots:
        bars, curves = (_free(out / name) for name in PLOTS)
        _draw(result.plot(), bars)
        if any(about["axis"] for about in result.metrics.values()):
            _draw(result.plot("curves"), curves)


def _remove_earlier(arguments: argparse.Namespace, names: Sequence[str] = (*FILES[1:], *PLOTS)) -> None:
    """Remove what an earlier run has left: its tables and plots do not belong to the new evaluation.json."""
    from ramp_fast.results.marks import is_own

    for path in (Path(arguments.out) / name for name in names):
        with contextlib.suppress(OSError):  # there is none, or it is no file
            if is_own(path):
                path.unlink()


def _free(path: Path) -> Path:
    """The path, once more: a file of the user's may have got this name during the evaluation."""
    from ramp_fast.results.store import check_free

    check_free(path)
    return path


def _draw(figure: Figure, path: Path) -> None:
    """Write a figure as other pictures of this package, so that it is not taken for a photograph."""
    from PIL import Image

    from ramp_fast.results.store import save_picture

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    with Image.open(buffer, formats=["PNG"]) as picture:
        save_picture(path, picture)


def _listing() -> str:
    from ramp_fast.methods import METHODS as methods
    from ramp_fast.metrics import METRICS as metrics
    from ramp_fast.metrics import known_settings

    lines = ["metrics"]
    for name, metric in sorted(metrics.items()):
        better = "higher" if metric.higher_is_better else "lower"
        settings = ", ".join(sorted(set(known_settings(metric)) - {"seed", "batch_size"}))
        lines.append(f"  {name} ({better} is better{'; ' if settings else ''}{settings})")
    lines += ["", "methods"]
    for name, method in methods.items():
        settings = ", ".join(method.settings)
        lines.append(f"  {name}: {method.description}{f' ({settings})' if settings else ''}")
    return "\n".join(lines)


def _summary(result: Evaluation, problems: int, out: str, seconds: float) -> str:
    parts = [f"{result.images} images"]
    parts += [f"{count} left out of {metric} (no whole group)" for metric, count in result.left_out.items()]
    if problems:
        parts.append(f"{problems} unreadable")
    if result.failures:
        parts.append(f"{len(result.failures)} pairs of method and metric failed: {', '.join(result.failures)}")
    return f"{out}: {'; '.join(parts)} ({seconds:.1f} s)"
