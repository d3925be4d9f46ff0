"""Attention ``softmax(scale Q K^T + bias) V``, all in one step: ``attention_pullback``, ``attention_gradient``."""

from __future__ import annotations

from typing import Any

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


def biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Scores [B, H, N, M] with a bias [G, H, N, M], of which sample b has bias b % G."""
    return scores if bias is None else (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)


def weights_of(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of scores; a bias may mask rows of them as a whole, whose weights are 0."""
    weights = scores.softmax(-1)
    return weights if bias is None else weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    bias: Tensor | None,
    junction: bool,
) -> tuple[Tensor, Tensor]:
    masses = c.new_empty((6 if junction else 4, *c.shape[:2]), dtype=compute_dtype(q, k, v, o, c, bias))
    return packed_output(q, k, c), masses


def _attention_pullback_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    bias: Tensor | None,
    junction: bool,
) -> tuple[Tensor, Tensor]:
    packed, masses = _outputs(q, k, v, o, c, scale, gated, contrast, bias, junction)
    q, k, v, o, c = (rows_dense(x) for x in (q, k, v, o, c))
    bias = None if bias is None else rows_dense(bias)
    outputs = output_views(packed, q, k)
    C.attention_pullback(q, k, v, o, c, scale, gated, contrast, bias, junction, *outputs, masses, get_num_threads())
    return packed, masses


@operator(outputs=_outputs, cpu=_attention_pullback_cpu, triton="attention:attention_pullback")
def _attention_pullback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    bias: Tensor | None = None,
    junction: bool = False,
) -> tuple[Tensor, Tensor]:
    packed = packed_output(q, k, c)
    outputs = output_views(packed, q, k)
    dtype = compute_dtype(q, k, v, o, c, bias)
    q, k, v, o, c = (x.to(dtype) for x in (q, k, v, o, c))
    zero = torch.zeros((), dtype=dtype, device=c.device)

    def pull(coefficients: Tensor, other: Tensor, x: Tensor) -> Tensor:
        positive = 2 * (coefficients @ other.clamp_min(0))
        negative = zero if gated else 2 * (coefficients @ (-other).clamp_min(0))
        return torch.where(x > 0, positive, torch.where(x < 0, negative, zero))

    query = scale * q
    product = query @ k.mT
    scores = biased(product, bias)
    weights = weights_of(scores, bias)
    if gated:
        c = torch.where(o > 0, c, zero)
    c_a = 2 * (c @ v.clamp_min(0).mT)
    c_v = torch.where(v > 0, 2 * (weights.mT @ c), zero)
    # What is masked takes nothing, a row of such as little.
    masked = scores == -torch.inf
    absolute = scores.abs().masked_fill(masked, -torch.inf)
    c_s = ((scores.sign() * weights + weights_of(absolute, bias)).masked_fill(masked, 0)) * c_a
    terms = []
    if junction:
        term = biased(torch.zeros_like(product), bias)
        terms = [(x, torch.where(x > 0, 2 * c_s, zero)) for x in (product, term.masked_fill(masked, 0))]
        c_s = terms[0][1]
    c_q = scale * pull(c_s, k, query)
    c_k = pull(c_s.mT, query, k)
    pairs = ((weights, c_a), (v, c_v), (q, c_q), (k, c_k), *terms)
    masses = torch.stack([mass_equation(x, own, contrast) for x, own in pairs])
    for output, own in zip(outputs, (c_q, c_k, c_v), strict=True):
        output.copy_(own)
    return packed, masses


def attention_pullback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    bias: Tensor | None = None,
    junction: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pull coefficients of attention's output ``O = A V`` back to Q, K and V; scores are never in memory.

    With ``S = scale Q K^T + bias``, ``A = softmax(S)`` and ``g = [o > 0] c`` if gated, else ``g = c``::

        c_A = 2 g V+^T                                       c_V = 2 [v > 0] A^T g
        c_S = (sign(S) A + softmax(|S|)) c_A
        c_Q = 2 scale [q > 0] c_S K+                         c_K = 2 [k > 0] c_S^T (scale Q)+

    Not gated, ``c_Q`` also has ``2 scale c_S K-`` where q < 0, and ``c_K`` likewise. Where the bias takes a share as a
    term of S (``junction``), Q and K have ``2 [scale Q K^T > 0] c_S`` in place of ``c_S``, and the bias ``2 [bias > 0]
    c_S``.

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
    bias : Tensor [G, H, N, M], optional
        Of sample b it is ``bias[b % G]``; axes it does not differ along may be expanded ones. What is masked is -inf:
        it is left out of both softmaxes and takes nothing, nor does a row of nothing else.
    junction : bool
        Only with a bias.

    Returns
    -------
    c_q, c_k, c_v : Tensor [T, B, H, N or M, D]
        In the dtype of c. Views of one buffer [T, B, N, 3, H, D] if N is M.
    masses : Tensor [4, T, B], or [6, T, B] with a junction
        As :func:`ramp_fast.ops.mass` of (A, c_A), (v, c_V), (q, c_Q) and (k, c_K), before these are rounded to their
        dtype, then of both terms of S; float32, or float64 if an operand is.

    Notes
    -----
    The CPU kernel rounds operands of products (g, V+, A, c_S, K+, Q+; not those of S) to bfloat16 where c is bfloat16
    and the processor multiplies bfloat16 (the instruction sets "avx512bf16" and "amx").
    """
    packed, masses = _attention_pullback(q, k, v, o, c, scale, gated, contrast, bias, junction)
    return *output_views(packed, q, k), masses


def _gradient_output(q: Tensor, k: Tensor, v: Tensor, c: Tensor, *_: Any) -> Tensor:
    return packed_output(q, k, c)


def _attention_gradient_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    scale: float,
    value_share: float,
    score_share: float,
    bias: Tensor | None,
) -> Tensor:
    packed = packed_output(q, k, c)
    q, k, v, c = (rows_dense(x) for x in (q, k, v, c))
    bias = None if bias is None else rows_dense(bias)
    outputs = output_views(packed, q, k)
    C.attention_gradient(q, k, v, c, scale, value_share, score_share, bias, *outputs, get_num_threads())
    return packed


@operator(outputs=_gradient_output, cpu=_attention_gradient_cpu, triton="attention:attention_gradient")
def _attention_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    scale: float,
    value_share: float,
    score_share: float,
    bias: Tensor | None = None,
) -> Tensor:
    packed = packed_output(q, k, c)
    outputs = output_views(packed, q, k)
    dtype = compute_dtype(q, k, v, c, bias)
    q, k, v, c = (x.to(dtype) for x in (q, k, v, c))
    weights = weights_of(biased(scale * q @ k.mT, bias), bias)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    scale: float,
    value_share: float,
    score_share: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient of attention's output back to Q, K and V, each times its share; scores are never in memory.

    With ``A = softmax(scale Q K^T + bias)``::

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
    bias : Tensor [G, H, N, M], optional
        As for :func:`attention_pullback`.

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
    return output_views(_attention_gradient(q, k, v, c, scale, value_share, score_share, bias), q, k)
