"""How far every rule is from what defines it: rules on whole networks against modified autograd in float64.

    python bench/rule_errors.py [--results NAME]

The networks are small ones of every kind, with random weights; the definitions are those of
``tests/rules/modified_autograd.py``, and pytest is needed. In "float64" an error is the largest difference over the
largest value of the map, in "mixed" the norm of the difference over the norm of the map, of the worse of two images.
``--results NAME`` writes ``bench/results/NAME-COMMIT-errors.json``. Seeds are random in "float64", but under ``ramp``
of convolutional networks a class against the others; in "mixed" maps are of one class, since sums of maps of opposite
signs that cancel magnify rounding.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import results_io
import torch
from torch import Tensor, nn

from ramp_fast import Engine

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / folder) for folder in ("", "rules")]

import modified_autograd as oracle  # noqa: E402
from test_signed import NETWORKS, ORACLES, network  # noqa: E402

RULES: dict[str, Callable[[], oracle.Modified]] = {
    **ORACLES,
    "ramp": oracle.ramp_of_tokens,
}
# Of these `ramp` has another definition, for a class and not for any seed.
CONVOLUTIONAL = ("resnet", "vgg", "efficientnet")
TARGET = 3


def errors(name: str, rule: str) -> tuple[float, float]:
    """In float64, and of "mixed"."""
    model, x = network(name)
    seed = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    folded: nn.Module = model
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        folded = oracle.folded(copy.deepcopy(model))
    engine = Engine(model, rule, "float64")
    if rule == "ramp" and name in CONVOLUTIONAL:
        expected = oracle.ramp_of_convolutions(folded, x, torch.full((2,), TARGET), "others")
        found = engine.attribute(x, TARGET, "others", "none").maps
    else:
        expected = oracle.relevance(folded, x, seed, RULES[rule]())
        found = engine.attribute(x, seed, "none", "none").maps
    exact = engine.attribute(x, TARGET, "none", "none").maps
    mixed = Engine(model.float(), rule, "mixed").attribute(x.float(), TARGET, "none", "none").maps

    def norm(maps: Tensor) -> Tensor:
        return maps.flatten(1).norm(dim=1)

    worst = (found - expected).abs().max() / expected.abs().max()
    return float(worst), float((norm(mixed - exact) / norm(exact)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", metavar="NAME", help="name of this machine, for bench/results")
    arguments = parser.parse_args()
    measurements = []
    for name in NETWORKS:
        for rule in RULES:
            both = dict(zip(("float64", "mixed"), errors(name, rule), strict=True))
            print(f"{name}, {rule}: {both['float64']:.1e}, mixed {both['mixed']:.1e}", flush=True)
            for precision, error in both.items():
                measured = results_io.measurement(f"error/{name}/{rule}/{precision}", error, "relative error")
                measurements.append(measured)
    if arguments.results:
        print(results_io.write_here(arguments.results, measurements, "bench/rule_errors.py", "errors"))


if __name__ == "__main__":
    main()
