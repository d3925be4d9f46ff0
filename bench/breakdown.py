"""Where does the time of an attribution go? Every step of the plan, against the floor of its products.

    python bench/breakdown.py vit_base_patch16_224 --plot docs/images/breakdown.svg
    python bench/breakdown.py efficientnet_b0 --rule ramp

(``--plot`` needs matplotlib; ``--results NAME`` writes ``bench/results/NAME-COMMIT-breakdown.json``.)

The floor of a step is its multiplications and additions (of weighted layers and attention, from their shapes) over the
best rate that a large product of the same dtype reaches in the same run. Products that the sign of an input selects
from count once, denominators of signed rules not at all. What no step accounts for is Python between the steps, the
seed and the final bookkeeping.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import results_io
import timm
import torch
from torch import nn

from ramp_fast import Engine
from ramp_fast import graph as g
from ramp_fast.gemm import Matrix, precision_for
from ramp_fast.graph import Node
from ramp_fast.rules import AbsLRP
from ramp_fast.rules.rearrange import Split


def rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product in the engine's own routine, the best of ten."""
    rows, depth, width = 1576, 768, 3072
    matrix, x = Matrix(torch.randn(width, depth).to(dtype)), torch.randn(rows, depth).to(dtype)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        matrix(x)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * depth * width / best


def flops(node: Node, maps: int) -> float:
    """Multiplications and additions of one image: of the forward pass (0), or of the pull-back of maps."""
    if node.kind not in (g.LINEAR, g.CONV, g.ATTENTION):
        return 0.0
    out = math.prod(node.example) / node.example[0]
    if node.kind != g.ATTENTION:
        weight = node.params.weight.example
        depth = weight[1 if not getattr(node.params, "transposed", False) else 0] * math.prod(weight[2:])
        return 2 * out * depth * (maps or 1)
    keys = node.operands[1].example[-2]
    # forward: scores and output; pull-back: scores once, then c_A, c_V, c_Q and c_K of every map
    return 2 * out * keys * (1 + 4 * maps if maps else 2)


def measure(
    model: nn.Module, images: torch.Tensor, precision: str, rounds: int, rule: str
) -> tuple[dict[Any, float], float, float, int]:
    """Milliseconds an image of every step (median), of the whole, of the model's own forward pass; maps pulled back."""
    engine = Engine(model, rule, precision)
    maps = 2 if isinstance(engine.rule, AbsLRP) else 1  # of a target, with contrast
    for _ in range(5):  # the trials of groups are in here
        engine.attribute(images)
    spent: dict[Any, float] = defaultdict(float)

    def timed(key: tuple[Node, bool], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            if isinstance(result, Iterator):
                result = list(result)  # a pull-back yields
            spent[key] += time.perf_counter() - start
            return result

        return call

    operations = [(s.node, s.operation) for s in engine.plan.steps if s.operation is not None]
    for node, operation in operations:
        operation.forward = timed((node, False), operation.forward)  # type: ignore[method-assign]
        operation.pullback = timed((node, True), operation.pullback)  # type: ignore[method-assign]
        if isinstance(operation, Split):
            operation.join = timed((node, True), operation.join)  # type: ignore[method-assign]
    steps: dict[Any, list[float]] = defaultdict(list)
    whole, own = [], []
    for _ in range(rounds):
        spent.clear()
        start = time.perf_counter()
        engine.attribute(images)
        whole.append(time.perf_counter() - start)
        for key, seconds in spent.items():
            steps[key].append(seconds)
        with torch.no_grad():
            start = time.perf_counter()
            model(images)
            own.append(time.perf_counter() - start)
    scale = 1e3 / len(images)
    medians = {key: scale * statistics.median(v) for key, v in steps.items()}
    return medians, scale * statistics.median(whole), scale * statistics.median(own), maps


def table(steps: dict[Any, float], whole: float, rates: dict[bool, float], maps: int) -> list[tuple[str, float, float]]:
    """Rows of (what, milliseconds, floor), the slowest first."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (node, backward), ms in steps.items():
        name = f"{node.kind}, {'pull-back' if backward else 'forward'}"
        rows[name][0] += ms
        rows[name][1] += 1e3 * flops(node, maps if backward else 0) / rates[backward]
    listed = sorted(((name, ms, floor) for name, (ms, floor) in rows.items()), key=lambda r: -r[1])
    shown, small = [r for r in listed if r[1] >= 0.005 * whole], [r for r in listed if r[1] < 0.005 * whole]
    shown.append(("other steps", sum(r[1] for r in small), sum(r[2] for r in small)))
    shown.append(("between the steps", whole - sum(r[1] for r in listed), 0.0))
    return shown


def plot(rows: list[tuple[str, float, float]], title: str, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.36 * len(rows) + 1.2))
    names = [name for name, _, _ in rows]
    axes.barh(names, [ms for _, ms, _ in rows], color="#9db8d2", label="measured")
    axes.barh(names, [floor for _, _, floor in rows], height=0.4, color="#1f4e79", label="floor of its products")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds an image")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def write_results(
    machine: str,
    network: str,
    precision: str,
    rows: list[tuple[str, float, float]],
    whole: float,
    own: float,
    rounds: int,
) -> None:
    prefix = f"breakdown/{network}/{precision}"
    found = [
        results_io.measurement(f"{prefix}/{name}", ms, "ms/image", rounds=rounds, **({"floor": floor} if floor else {}))
        for name, ms, floor in rows
    ]
    of = {"ratio": whole / own, "ratio_of": f"{network}/forward", "reference": own}
    floor = sum(floor for _, _, floor in rows)
    found.append(results_io.measurement(f"{prefix}/whole", whole, "ms/image", rounds=rounds, **of, floor=floor))
    written = results_io.write_here(machine, found, "bench/breakdown.py", "breakdown")
    print(f"written to {written}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="mixed")
    parser.add_argument("--rule", default="abslrp")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--results", metavar="NAME", help="a short name of this machine")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    images = torch.randn(args.batch, *model.default_cfg["input_size"])
    precision = precision_for(args.precision, torch.device("cpu"))
    rates = {False: rate(precision.forward), True: rate(precision.pullback)}
    steps, whole, own, maps = measure(model, images, args.precision, args.rounds, args.rule)
    rows = table(steps, whole, rates, maps)
    what = args.precision if args.rule == "abslrp" else f"{args.precision}, {args.rule}"
    title = f"{args.model}, {what}, batch {args.batch}: {whole:.0f} ms an image, {whole / own:.2f} forward passes"
    print(title)
    print(f"floor at {rates[False] / 1e9:.0f} (forward) and {rates[True] / 1e9:.0f} GFLOP/s (pull-back)\n")
    print("| step | ms | floor | share |\n|---|---|---|---|")
    for name, ms, floor in rows:
        print(f"| {name} | {ms:.1f} | {f'{floor:.1f}' if floor else ''} | {100 * ms / whole:.1f} % |")
    print(f"| whole | {whole:.1f} | {sum(r[2] for r in rows):.1f} | |")
    if args.results:
        network = f"{args.model}/{args.batch}"
        write_results(args.results, network, what, rows, whole, own, args.rounds)
    if args.plot:
        plot(rows, title, args.plot)


if __name__ == "__main__":
    main()
