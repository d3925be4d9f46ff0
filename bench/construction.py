"""How long does it take to make an engine, how much of that is torch.export, and how long with a cache of graphs?

    python bench/construction.py --results NAME    # with writing bench/results/NAME-COMMIT-construction.json

Seconds of ``Engine(model)``, medians, and the part of them within ``torch.export.export``; then with
``RAMP_FAST_CACHE``, where the model's graph is in the folder. The first engine of a process, which also imports what
torch.export needs, is not counted. Random weights.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import results_io
import timm
import torch

from ramp_fast import Engine
from ramp_fast.capture.graph_cache import CACHE_VARIABLE

MODELS = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "densenet121", "maxvit_tiny_tf_224", "resnet50")


def measure(model: torch.nn.Module, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of every engine, and of torch.export in it."""
    whole, exporting = [], []
    export = torch.export.export
    for _ in range(rounds):
        spent = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return export(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        gc.collect()
        with mock.patch.object(torch.export, "export", timed):
            start = time.perf_counter()
            engine = Engine(model)
            whole.append(time.perf_counter() - start)
        exporting.append(spent)
        del engine  # with its packed weights, which another engine would share
    return whole, exporting


def from_cache(model: torch.nn.Module, rounds: int) -> list[float]:
    """Seconds of every engine, of a model whose graph is in the cache."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {CACHE_VARIABLE: folder}):
        Engine(model)
        whole, exporting = measure(model, rounds)
    if any(exporting):
        raise RuntimeError("the model was exported although its graph should be in the cache")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", metavar="NAME", help="a short name of this machine")
    args = parser.parse_args()
    Engine(timm.create_model("resnet18").eval())
    found = []
    print("| model | engine, s | torch.export, s | from the cache, s |", flush=True)
    for name in args.models:
        model = timm.create_model(name).eval()
        times = dict(
            zip(
                ("engine", "export", "cache"),
                (*measure(model, args.rounds), from_cache(model, args.rounds)),
                strict=True,
            )
        )
        own = {part: statistics.median(seconds) for part, seconds in times.items()}
        print(f"| {name} | {own['engine']:.2f} | {own['export']:.2f} | {own['cache']:.2f} |", flush=True)
        label = f"construction/{name}"
        spreads = {part: max(seconds) / min(seconds) for part, seconds in times.items()}
        found.append(results_io.measurement(label, own["engine"], "s", rounds=args.rounds, spread=spreads["engine"]))
        for part in ("export", "cache"):
            found.append(
                results_io.measurement(
                    f"{label}/{part}",
                    own[part],
                    "s",
                    rounds=args.rounds,
                    spread=spreads[part],
                    ratio=own[part] / own["engine"],
                    ratio_of=label,
                    reference=own["engine"],
                    reference_spread=spreads["engine"],
                )
            )
    if args.results:
        print(f"written to {results_io.write_here(args.results, found, 'bench/construction.py', 'construction')}")


if __name__ == "__main__":
    main()
