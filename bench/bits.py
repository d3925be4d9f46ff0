"""Whether a change moved a bit of any map: digests of maps, written by one version and compared with by another.

    python bench/bits.py --out before.json                 # with the version before installed
    python bench/bits.py --against before.json             # with the one after it: a table, exit 1 on a difference
    RAMP_FAST_CPU_ISA=generic python bench/bits.py ...     # on another instruction set

Networks have seeded random weights. Digests depend on the processor and on the version of PyTorch: compare runs of one
machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from ramp_fast import Engine, ops
from ramp_fast.rules import AbsLRP, RelativeStabilizer

# Name, image size, options.
NETWORKS: list[tuple[str, int, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 3}),
    ("deit3_small_patch16_224", 64, {"img_size": 64, "depth": 2}),
    ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 2}),
    ("swin_tiny_patch4_window7_224", 224, {"depths": (1, 1, 1, 1)}),
    ("resnet18", 64, {}),
    ("resnet50", 64, {}),
    ("vgg11_bn", 64, {"mlp_ratio": 0.0625}),
    ("vgg11", 64, {"mlp_ratio": 0.0625}),
    ("convnext_atto", 64, {}),
    ("efficientnet_lite0", 64, {}),
    ("densenet121", 64, {}),
]
RULES = {
    "abslrp": AbsLRP(),
    "abslrp-release": AbsLRP(shares="equal"),
    "stabilized": AbsLRP(stabilizer=RelativeStabilizer(0.1)),
}
PRECISIONS = ("float64", "float32", "mixed", "fast")


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def digests(model: torch.nn.Module, size: int) -> dict[str, str]:
    """Of every rule and precision: the maps of two targets with contrast and of one without, and the logits."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = {}
    for rule_name, rule in RULES.items():
        for precision in PRECISIONS:
            if precision == "fast" and rule_name != "stabilized":
                continue
            engine = Engine(model, rule, precision)
            others = engine.attribute(images, torch.tensor([[1, 2], [3, 4]]))
            alone = engine.attribute(images, 5, "none", "sum")
            found[f"{rule_name} {precision}"] = " ".join(map(digest, (others.maps, alone.maps, others.logits)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", action="append", default=[], help="networks whose names begin so")
    arguments = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for name, size, options in NETWORKS:
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, **options).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that are as they begin would hide much
                torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
        found[name] = digests(model, size)
        print(name, "done", file=sys.stderr)
    record = {
        "torch": torch.__version__,
        "isa": os.environ.get("RAMP_FAST_CPU_ISA", ""),
        "isas": list(ops.cpu_isas()),
        "digests": found,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1))
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text())
    if before["torch"] != record["torch"] or before["isa"] != record["isa"]:
        print(f"not comparable: {before['torch']} {before['isa']!r} and {record['torch']} {record['isa']!r}")
        return 2
    columns = list(next(iter(found.values())))
    print("| network | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    same = True
    for name, own in found.items():
        equal = [own[c] == before["digests"][name][c] for c in columns]
        same = same and all(equal)
        print(f"| {name} | " + " | ".join("equal" if e else "**differs**" for e in equal) + " |")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
