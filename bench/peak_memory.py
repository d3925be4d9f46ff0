"""Peak memory of one attribution above the loaded model, capture and packed weights included.

    python bench/peak_memory.py vit_base_patch16_224 --batch 8

Prints one line of JSON with megabytes (10^6 bytes) of resident memory. It runs in a process of its own because
the peak of a process never goes down.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from ramp_fast import Engine


def status(entry: str) -> float:
    """An entry of this process's status, in MB.

    Not from ``getrusage``: its peak starts with that of the process that started this one.
    """
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(entry))
    return int(line.split()[1]) * 1024 / 1e6


def resident() -> float:
    """Resident memory now, in MB."""
    return status("VmRSS")


def peak() -> float:
    """Largest resident memory so far, in MB."""
    return status("VmHWM")


def measure(name: str, batch: int, prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> dict[str, object]:
    """Memory of the model, of what ``prepare`` makes of it, and of one call of that; the last two above the model."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(batch, *model.default_cfg["input_size"])
    loaded = resident()
    attribute = prepare(model)
    built = peak() - loaded
    assert attribute(images).isfinite().all()
    return {"model": name, "loaded": loaded, "built": built, "above_model": peak() - loaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="mixed")
    args = parser.parse_args()

    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        engine = Engine(model, precision=args.precision)
        return lambda images: engine.attribute(images).maps

    print(json.dumps(measure(args.model, args.batch, prepare)))


if __name__ == "__main__":
    main()
