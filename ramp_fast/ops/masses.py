"""Arithmetic on masses ``[T, B]``: a few numbers each, so that what counts is how few kernels it takes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ramp_fast.ops._common import C, divide
from ramp_fast.ops._registry import register


def share_equation(target: Tensor, masses: Sequence[Tensor]) -> Tensor:
    whole = functools.reduce(operator.add, masses)
    return torch.stack([target * divide(mass, whole) for mass in masses])


def _share_fake(target: Tensor, masses: Sequence[Tensor]) -> Tensor:
    return target.new_empty((len(masses), *target.shape))


def _share_cpu(target: Tensor, masses: Sequence[Tensor]) -> Tensor:
    out = _share_fake(target, masses)
    C.share(target.contiguous(), [mass.contiguous() for mass in masses], out)
    return out


_share = register(
    "share(Tensor target, Tensor[] masses) -> Tensor",
    reference=share_equation,
    fake=_share_fake,
    cpu=_share_cpu,
    triton="masses:share",
)


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
    return _share(target, list(masses))  # type: ignore[no-any-return]


def scale_to_equation(target: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    return divide(target, actual), target * (actual > 0)


def _scale_to_fake(target: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(target), torch.empty_like(target)


def _scale_to_cpu(target: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    target = target.contiguous()
    scale, mass = torch.empty_like(target), torch.empty_like(target)
    C.scale_to(target, actual.contiguous(), scale, mass)
    return scale, mass


_scale_to = register(
    "scale_to(Tensor target, Tensor actual) -> (Tensor, Tensor)",
    reference=scale_to_equation,
    fake=_scale_to_fake,
    cpu=_scale_to_cpu,
    triton="masses:scale_to",
)


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
    return _scale_to(target, actual)  # type: ignore[no-any-return]
