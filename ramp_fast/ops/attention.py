"""Attention ``softmax(scale Q K^T) V``, all of it in one step: ``attention_pullback``, ``attention_gradient``."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, compute_dtype, mass_equation
from ramp_fast.ops._layout import rows_dense
from ramp_fast.ops._registry import operator


def packed_output(q: Tensor, k: Tensor, c: Tensor) -> Tensor:
    """One buffer for c_q, c_k and c_v: outputs of an operator must not be views of one another."""
    batch, heads, queries, width = q.shape
    return c.new_empty(c.shape[0], batch, (queries + 2 * k.shape[2]) * heads * width)


def output_views(packed: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_q, c_k and c_v in the order of a qkv layer's outputs: [T, B, N, 3, H, D], or c_q apart if N is not M."""
    _, heads, queries, width = q.shape
    keys = k.shape[2]

    def parts(buffer: Tensor, rows: int, count: int) -> tuple[Tensor, ...]:
        shaped = buffer.view(*buffer.shape[:2], rows, count, heads, width)
        return tuple([part.transpose(2, 3) for part in shaped.unbind(3)])

    if queries == keys:
        c_q, c_k, c_v = parts(packed, queries, 3)
    else:
        first = queries * heads * width
        (c_q,) = parts(packed[..., :first], queries, 1)
        c_k, c_v = parts(packed[..., first:], keys, 2)
    return c_q, c_k, c_v


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, scale: float, gated: bool, contrast: bool
) -> tuple[Tensor, Tensor]:
    return packed_output(q, k, c), c.new_empty((4, *c.shape[:2]), dtype=compute_dtype(q, k, v, o, c))


def _attention_pullback_cpu(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, scale: float, gated: bool, contrast: bool
) -> tuple[Tensor, Tensor]:
    packed, masses = _outputs(q, k, v, o, c, scale, gated, contrast)
    q, k, v, o, c = (rows_dense(x) for x in (q, k, v, o, c))
    outputs = output_views(packed, q, k)
    C.attention_pullback(q, k, v, o, c, scale, gated, contrast, *outputs, masses, get_num_threads())
    return packed, masses


@operator(outputs=_outputs, cpu=_attention_pullback_cpu, triton="attention:attention_pullback")
def _attention_pullback(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, scale: float, gated: bool, contrast: bool
) -> tuple[Tensor, Tensor]:
    packed = packed_output(q, k, c)
    outputs = output_views(packed, q, k)
    dtype = compute_dtype(q, k, v, o, c)
    q, k, v, o, c = (x.to(dtype) for x in (q, k, v, o, c))
    zero = torch.zeros((), dtype=dtype, device=c.device)

    def pull(coefficients: Tensor, other: Tensor, x: Tensor) -> Tensor:
        positive = 2 * (coefficients @ other.clamp_min(0))
        negative = zero if gated else 2 * (coefficients @ (-other).clamp_min(0))
        return torch.where(x > 0, positive, torch.where(x < 0, negative, zero))

    query = scale * q
    scores = query @ k.mT
    weights = scores.softmax(-1)
    if gated:
        c = torch.where(o > 0, c, zero)
    c_a = 2 * (c @ v.clamp_min(0).mT)
    c_v = torch.where(v > 0, 2 * (weights.mT @ c), zero)
    c_s = (scores.sign() * weights + scores.abs().softmax(-1)) * c_a
    c_q = scale * pull(c_s, k, query)
    c_k = pull(c_s.mT, query, k)
    pairs = ((weights, c_a), (v, c_v), (q, c_q), (k, c_k))
    masses = torch.stack([mass_equation(x, own, contrast) for x, own in pairs])
    for output, own in zip(outputs, (c_q, c_k, c_v), strict=True):
        output.copy_(own)
    return packed, masses


def attention_pullback(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, scale: float, gated: bool, contrast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pull coefficients of attention's output ``O = A V`` back to Q, K and V; scores are never in memory.

    With ``S = scale Q K^T``, ``A = softmax(S)`` and ``g = [o > 0] c`` if gated, else ``g = c``::

        c_A = 2 g V+^T                                       c_V = 2 [v > 0] A^T g
        c_S = (sign(S) A + softmax(|S|)) c_A
        c_Q = 2 scale [q > 0] c_S K+                         c_K = 2 [k > 0] c_S^T (scale Q)+

    Not gated, ``c_Q`` also has ``2 scale c_S K-`` where q < 0, and ``c_K`` likewise.

    Parameters
    ----------
    q : Tensor [B, H, N, D]
    k, v : Tensor [B, H, M, D]
    o : Tensor [B, H, N, D]
        Attention's output; only its sign is used, and only if gated.
    c : Tensor [T, B, H, N, D]
    scale : float
        Positive.
    gated : bool
        Whether only positive outputs, queries and keys carry relevance.
    contrast : bool

    Returns
    -------
    c_q, c_k, c_v : Tensor [T, B, H, N or M, D]
        In the dtype of c. Views of one buffer [T, B, N, 3, H, D] if N is M.
    masses : Tensor [4, T, B]
        As :func:`ramp_fast.ops.mass` of (A, c_A), (v, c_V), (q, c_Q) and (k, c_K), before these are rounded to their
        dtype; float32, or float64 if an operand is.

    Notes
    -----
    The CPU kernel rounds operands of products (g, V+, A, c_S, K+, Q+; not those of S) to bfloat16 where c is bfloat16
    and the processor multiplies bfloat16 (the instruction sets "avx512bf16" and "amx").
    """
    packed, masses = _attention_pullback(q, k, v, o, c, scale, gated, contrast)
    return *output_views(packed, q, k), masses


def _gradient_output(q: Tensor, k: Tensor, v: Tensor, c: Tensor, *shares: float) -> Tensor:
    return packed_output(q, k, c)


def _attention_gradient_cpu(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, scale: float, value_share: float, score_share: float
) -> Tensor:
    packed = packed_output(q, k, c)
    q, k, v, c = (rows_dense(x) for x in (q, k, v, c))
    outputs = output_views(packed, q, k)
    C.attention_gradient(q, k, v, c, scale, value_share, score_share, *outputs, get_num_threads())
    return packed


@operator(outputs=_gradient_output, cpu=_attention_gradient_cpu, triton="attention:attention_gradient")
def _attention_gradient(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, scale: float, value_share: float, score_share: float
) -> Tensor:
    packed = packed_output(q, k, c)
    outputs = output_views(packed, q, k)
    dtype = compute_dtype(q, k, v, c)
    q, k, v, c = (x.to(dtype) for x in (q, k, v, c))
    weights = (scale * q @ k.mT).softmax(-1)
    outputs[2].copy_(value_share * (weights.mT @ c))
    if score_share == 0:
        for output in outputs[:2]:
            output.zero_()
        return packed
    c_a = c @ v.mT
    c_s = score_share * scale * (weights * (c_a - (weights * c_a).sum(-1, keepdim=True)))
    outputs[0].copy_(c_s @ k)
    outputs[1].copy_(c_s.mT @ q)
    return packed


def attention_gradient(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, scale: float, value_share: float, score_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient of attention's output back to Q, K and V, each times its share; scores are never in memory.

    With ``A = softmax(scale Q K^T)``::

        c_A = c V^T                                          c_V = value_share A^T c
        c_S = A (c_A - sum over keys of A c_A)
        c_Q = score_share scale c_S K                        c_K = score_share scale c_S^T Q

    Parameters
    ----------
    q : Tensor [B, H, N, D]
    k, v : Tensor [B, H, M, D]
    c : Tensor [T, B, H, N, D]
    scale : float
        Positive.
    value_share, score_share : float
        Where the second is 0, ``c_Q`` and ``c_K`` are 0, whatever the operands.

    Returns
    -------
    c_q, c_k, c_v : Tensor [T, B, H, N or M, D]
        In the dtype of c. Views of one buffer [T, B, N, 3, H, D] if N is M.

    Notes
    -----
    The sum over keys is of the very numbers that ``c_S`` is made of, not of c and the output, so that rows of ``c_S``
    sum to zero. As in :func:`attention_pullback` the CPU kernel may round operands of products (c, V, A, c_S, K, Q; not
    those of S) to bfloat16.
    """
    return output_views(_attention_gradient(q, k, v, c, scale, value_share, score_share), q, k)
