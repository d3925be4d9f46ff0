"""What does one call take besides its kernels?

    python bench/overhead.py --results NAME    # with writing bench/results/NAME-COMMIT-overhead.json

A ResNet-18 of eight channels, and a ViT of twelve blocks and sixteen features, on one image of 32 x 32 pixels, where
kernels have next to nothing to do, in one thread: milliseconds of a whole call, medians, and what is left of them
without the time within kernels and PyTorch's operators, as the profiler of Python says it of as many calls. Their
layers are as many as those of the full networks, and so are the calls.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import results_io
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from ramp_fast import Engine

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10, channels=(8, 8, 8, 8)),
    "vit_base": lambda: timm.create_model(
        "vit_base_patch16_224", img_size=32, embed_dim=16, num_heads=2, num_classes=10
    ),
}
# Functions of C++ that compute; views and empty tensors are not among them.
KERNELS = ("torch._ops.", "ramp_fast._C.", "torch.convolution", "torch._C._nn.")


def measure(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Milliseconds of a call, and of them outside kernels."""
    for _ in range(20):
        call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(calls):
        call()
    profile.disable()
    spent = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]  # of everything that was called
    within = sum(own for (_, _, name), (_, _, own, _, _) in spent if any(kernel in name for kernel in KERNELS))
    whole = 1e3 * statistics.median(seconds)
    return whole, whole - 1e3 * within / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["abslrp", "attnlrp"], metavar="RULE")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--results", metavar="NAME", help="a short name of this machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(1, 3, 32, 32)
    found = []
    print("| model | call | ms | outside kernels, ms |", flush=True)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        engines = {rule: Engine(model, rule, input_shape=(3, 32, 32)) for rule in args.rules}
        calls: dict[str, Callable[[], Any]] = {"logits": lambda engines=engines: engines[args.rules[0]].logits(images)}
        calls |= {rule: lambda engine=engine: engine.attribute(images) for rule, engine in engines.items()}
        for what, call in calls.items():
            whole, outside = measure(call, args.calls)
            print(f"| {name} | {what} | {whole:.2f} | {outside:.2f} |", flush=True)
            label = f"overhead/{name}/1/{what}"
            found.append(results_io.measurement(label, whole, "ms", rounds=args.calls))
            found.append(results_io.measurement(f"{label}/outside kernels", outside, "ms", rounds=args.calls))
    if args.results:
        print(f"written to {results_io.write_here(args.results, found, 'bench/overhead.py', 'overhead')}")


if __name__ == "__main__":
    main()
