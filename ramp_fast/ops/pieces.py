"""Pieces of the channels of images, as concatenations have them: ``piece_masses`` and ``merge_pieces``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, compute_dtype, mass_equation, rescale_equation
from ramp_fast.ops._layout import rows_dense
from ramp_fast.ops._registry import operator


def _masses(c: Tensor, x: Tensor, widths: list[int], contrast: bool) -> Tensor:
    return c.new_empty((len(widths), *c.shape[:2]), dtype=compute_dtype(c, x))


@operator(outputs=_masses)
def piece_masses(c: Tensor, x: Tensor, widths: list[int], contrast: bool) -> Tensor:
    """Masses of pieces of the channels, as by :func:`mass`.

    Parameters
    ----------
    c : Tensor [T, B, rows, C]
    x : Tensor [B, rows, C]
    widths : list of n int
        Channels of the pieces one after the other, C in all.
    contrast : bool

    Returns
    -------
    Tensor [n, T, B]
        float32, or float64 if an operand is.
    """
    dtype = compute_dtype(c, x)
    pieces = zip(c.to(dtype).split(widths, -1), x.to(dtype).split(widths, -1), strict=True)
    return torch.stack([mass_equation(own, piece, contrast) for piece, own in pieces])


def _merged(pieces: Sequence[Tensor], scales: Tensor, contrast: bool) -> Tensor:
    first = pieces[0]
    return first.new_empty(first.shape)


def _merge_cpu(pieces: Sequence[Tensor], scales: Tensor, contrast: bool) -> Tensor:
    out = _merged(pieces, scales, contrast)
    C.merge_pieces([rows_dense(piece) for piece in pieces], scales.contiguous(), contrast, out, get_num_threads())
    return out


@operator(outputs=_merged, cpu=_merge_cpu)
def merge_pieces(pieces: Sequence[Tensor], scales: Tensor, contrast: bool) -> Tensor:
    """Add scaled coefficients where several readers meet: the sum of ``rescale(piece, scale)``.

    Parameters
    ----------
    pieces : sequence of n Tensor [T, B, rows, C]
        At least one; of one dtype. Slices of the channels of larger tensors are read where they are.
    scales : Tensor [n, T, B]
    contrast : bool

    Returns
    -------
    Tensor [T, B, rows, C]
        Summed in float32, or float64 if an operand is, one after the other, and rounded to the dtype of the pieces.
    """
    dtype = compute_dtype(*pieces, scales)
    first, *others = (
        rescale_equation(piece.to(dtype), scale.to(dtype), contrast)
        for piece, scale in zip(pieces, scales, strict=True)
    )
    return sum(others, first).to(pieces[0].dtype).contiguous()
