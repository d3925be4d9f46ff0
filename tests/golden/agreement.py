"""How maps are compared with those of this folder, and how closely they have to agree."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RULES = {"abslrp": "", "abslrp-release": "release_"}  # and the prefixes of their entries

# Norm of the difference over the norm of what is expected, largest of the batch.
TOLERANCE = {
    # stored in float32 (half a unit in the last place: 3e-8), and the stabilizer of 1e-9, absent from the files
    ("float64", "map"): 1e-6,
    # the difference of two nearly equal maps: ten times that
    ("float64", "relevance"): 1e-5,
    # 24-bit rounding through six blocks, magnified by the smallest logit of the uniform seed (about 0.01)
    ("float32", "relevance"): 1e-2,
    # 8-bit rounding (4e-3) of coefficients in every product, averaged over their many terms
    ("mixed", "relevance"): 3e-2,
    ("float64", "logits"): 1e-6,
}


@cache
def expected(case: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).with_name(f"abslrp_{case}.npz"), allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]).double() for name in file.files}


def error(actual: Tensor, reference: Tensor) -> float:
    difference = (actual.double() - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return float(difference.max())
