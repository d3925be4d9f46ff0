"""Peak memory of one attribution above the loaded model, capture and packed weights included.

    python bench/peak_memory.py vit_base_patch16_224 --batch 8

Prints one line of JSON with megabytes (10^6 bytes) of resident memory. It runs in a process of its own because
the peak of a process never goes down.
"""

from __future__ import annotations

import argparse
import json

import timm
import torch


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="mixed")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    images = torch.randn(args.batch, *model.default_cfg["input_size"])
    from ramp_fast import Engine

    loaded = resident()
    engine = Engine(model, precision=args.precision)
    built = peak() - loaded
    maps = engine.attribute(images).maps
    assert maps.isfinite().all()
    print(json.dumps({"model": args.model, "loaded": loaded, "built": built, "above_model": peak() - loaded}))


if __name__ == "__main__":
    main()
