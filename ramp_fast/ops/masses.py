"""Arithmetic on masses ``[T, B]``: so few numbers that the time goes into calls, not into arithmetic."""

from __future__ import annotations

import functools
import operator as arithmetic
from collections.abc import Sequence

import torch
from torch import Tensor

from ramp_fast.ops._common import divide
from ramp_fast.ops._registry import operator


@operator(outputs=lambda target, masses: target.new_empty((len(masses), *target.shape)), triton="masses:share")
def share(target: Tensor, masses: Sequence[Tensor]) -> Tensor:
    """Divide a mass among operands by the masses that they have.

    Parameters
    ----------
    target : Tensor [T, B]
    masses : sequence of n Tensor [T, B]
        Not negative, in the dtype of ``target``.

    Returns
    -------
    Tensor [n, T, B]
        ``target masses[i] / sum(masses)``; 0 where the sum is.
    """
    whole = functools.reduce(arithmetic.add, masses)
    return torch.stack([target * divide(mass, whole) for mass in masses])


@operator(outputs=lambda target, actual: (torch.empty_like(target), torch.empty_like(target)), triton="masses:scale_to")
def scale_to(target: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that gives coefficients of mass ``actual`` the mass ``target``, and the mass that they then have.

    Parameters
    ----------
    target, actual : Tensor [...]
        Of one shape and dtype; not negative.

    Returns
    -------
    scale : Tensor [...]
        ``target / actual``; 0 where ``actual`` is.
    mass : Tensor [...]
        ``target``; 0 where ``actual`` is.
    """
    return divide(target, actual), target * (actual > 0)
