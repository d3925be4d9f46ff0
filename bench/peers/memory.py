"""Peak memory of one method on one model, above the loaded model; run in ``bench/``, in a process of its own.

    python -m peers.memory vgg16 'captum LRP' --batch 8

Prints what ``peak_memory.py`` prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from peak_memory import measure
from torch import Tensor, nn

from .methods import METHODS, MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    method = METHODS[args.method]
    if reason := method.missing():  # imports the library, whose code does not count
        parser.error(reason)

    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        attribute = method.prepare(model)
        return lambda images: attribute(images, torch.arange(len(images)))

    print(json.dumps(measure(args.model, args.batch, prepare)))


if __name__ == "__main__":
    main()
