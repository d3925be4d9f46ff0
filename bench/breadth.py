"""Is an attribution cheap on every family? Sixteen common models, and six chosen before anything was measured.

    python bench/breadth.py --results NAME                    # all, with writing bench/results/NAME-COMMIT-breadth.json
    python bench/breadth.py --models vgg16 resnet50 --rules abslrp --rounds 7 --batches 1 2

Of every model in one process, in turns, medians: its own forward pass; that with the backward pass from the logit of
the predicted class to the image (a gradient map: parameters need no gradient, so this is less than training takes); the
engine's logits; and a map of each rule, under absLRP of the class against all others. The bounds are those of
:data:`LIMITS`. Random weights, PyTorch's default settings.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import results_io
import timm
import torch
from torch import nn

from ramp_fast import Engine
from ramp_fast.errors import RampFastError

COMMON = (
    "vit_base_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "mixer_s16_224", "resnet50", "resnext50_32x4d", "seresnet50", "regnety_008", "densenet121",
    "convnext_tiny", "efficientnet_b0", "mobilenetv3_large_100", "vgg16", "maxvit_tiny_tf_224",
)  # fmt: skip
# Chosen before they were measured: BatchNorm before convolutions, inverted residuals with ReLU6, aggregated trees,
# pooling as a mixer, attention of channels, convolutions and attention in turns.
FURTHER = ("resnetv2_50", "mobilenetv2_100", "dla34", "poolformer_s12", "xcit_tiny_12_p16_224", "coatnet_0_rw_224")
RULES = ("abslrp", "attnlrp", "ramp")
# absLRP over forward and backward: a model at most, and their geometric mean. The engine's logits: one forward pass.
LIMITS = {"worst": 1.0, "mean": 0.85, "depthwise": 1.2}
DEPTHWISE = ("efficientnet_b0", "mobilenetv3_large_100")
WARM_UP = 4  # with them the trials of groups of images are over, of eight at a time


def forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        model(images)


def forward_and_backward(model: nn.Module, images: torch.Tensor) -> None:
    leaf = images.detach().requires_grad_()
    logits = model(leaf)
    torch.autograd.grad(logits.amax(1).sum(), leaf)


def measure(name: str, rules: list[str], batch: int, rounds: int, precision: str) -> dict[str, list[float]]:
    """Milliseconds an image of every round, by what was called; a rule that refuses the model is left out."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().requires_grad_(False)
    images = torch.randn(batch, *model.default_cfg["input_size"])
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(model, images),
        "forward+backward": lambda: forward_and_backward(model, images),
    }
    for rule in rules:
        try:
            engine = Engine(model, rule, precision)
        except RampFastError as error:
            print(f"{name} under {rule}: {error}")
            continue
        calls.setdefault("logits", lambda engine=engine: engine.logits(images))  # type: ignore[misc]
        calls[rule] = lambda engine=engine: engine.attribute(images)  # type: ignore[misc]
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {what: [] for what in calls}
    gc.collect()
    for _ in range(rounds):
        for what, call in calls.items():
            start = time.perf_counter()
            call()
            times[what].append(1e3 * (time.perf_counter() - start) / batch)
    return times


def measurements(name: str, times: dict[str, list[float]], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Logits against the forward pass, maps against forward and backward."""
    found = []
    for what, of in times.items():
        against = {"forward+backward": "forward", "logits": "forward"}.get(what, "forward+backward")
        value, base = statistics.median(of), statistics.median(times[against])
        relative = {} if what == "forward" else {
            "ratio": value / base,
            "ratio_of": f"breadth/{name}/{batch}/{against}",
            "reference": base,
            "reference_spread": max(times[against]) / min(times[against]),
        }  # fmt: skip
        label = f"breadth/{name}/{batch}/{what}"
        spread = max(of) / min(of)
        found.append(results_io.measurement(label, value, "ms/image", rounds=rounds, spread=spread, **relative))
    return found


def mean(ratios: list[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def table(models: list[str], rules: list[str], batch: int, rounds: int, precision: str) -> list[dict[str, Any]]:
    """Measure models and print a row of each."""
    found: list[dict[str, Any]] = []
    ratios: dict[str, list[float]] = {rule: [] for rule in rules}
    head = ["model", "forward, ms", "forward+backward", "logits", *(f"{r}, forward | {r}, f+b" for r in rules)]
    print(f"| {' | '.join(head)} |", flush=True)
    for name in models:
        times = measure(name, rules, batch, rounds, precision)
        found += measurements(name, times, batch, rounds)
        own = {what: statistics.median(of) for what, of in times.items()}
        cells = [name, f"{own['forward']:.1f}"]
        for what in ("forward+backward", "logits"):
            cells.append(f"{own[what] / own['forward']:.2f}" if what in own else "–")
        for rule in rules:
            if rule in own:
                ratios[rule].append(own[rule] / own["forward+backward"])
                cells += [f"{own[rule] / own['forward']:.2f}", f"{ratios[rule][-1]:.2f}"]
            else:
                cells += ["–", "–"]
        print(f"| {' | '.join(cells)} |", flush=True)
    for rule, of in ratios.items():
        if of:
            print(f"{rule} over forward and backward: geometric mean {mean(of):.2f}, worst {max(of):.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*COMMON, *FURTHER], metavar="MODEL")
    parser.add_argument("--rules", nargs="+", default=list(RULES), metavar="RULE")
    parser.add_argument("--batches", nargs="+", type=int, default=[8], metavar="IMAGES")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="mixed")
    parser.add_argument("--results", metavar="NAME", help="a short name of this machine")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for batch in args.batches:
        print(f"batches of {batch}")
        found += table(args.models, args.rules, batch, args.rounds, args.precision)
    if args.results:
        print(f"written to {results_io.write_here(args.results, found, 'bench/breadth.py', 'breadth')}")


if __name__ == "__main__":
    main()
