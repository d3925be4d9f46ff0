"""How long does it take to make an engine, and how much of that is torch.export?

    python bench/construction.py --results NAME    # with writing bench/results/NAME-COMMIT-construction.json

Seconds of ``Engine(model)``, medians, and the part of them within ``torch.export.export``. The first engine of a
process, which also imports what torch.export needs, is not counted. Random weights.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any
from unittest import mock

import results_io
import timm
import torch

from ramp_fast import Engine

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", metavar="NAME", help="a short name of this machine")
    args = parser.parse_args()
    Engine(timm.create_model("resnet18").eval())
    found = []
    print("| model | engine, s | torch.export, s |", flush=True)
    for name in args.models:
        whole, exporting = measure(timm.create_model(name).eval(), args.rounds)
        own = statistics.median(whole), statistics.median(exporting)
        print(f"| {name} | {own[0]:.2f} | {own[1]:.2f} |", flush=True)
        label = f"construction/{name}"
        reference = {"ratio": own[1] / own[0], "ratio_of": label, "reference": own[0]}
        spreads = [max(times) / min(times) for times in (whole, exporting)]
        found.append(results_io.measurement(label, own[0], "s", rounds=args.rounds, spread=spreads[0]))
        found.append(
            results_io.measurement(
                f"{label}/export",
                own[1],
                "s",
                rounds=args.rounds,
                spread=spreads[1],
                **reference,
                reference_spread=spreads[0],
            )
        )
    if args.results:
        print(f"written to {results_io.write_here(args.results, found, 'bench/construction.py', 'construction')}")


if __name__ == "__main__":
    main()
