"""absLRP of attention: the softmax, and softmax and both products with their junctions in one step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramp_fast import gemm, ops
from ramp_fast import graph as g
from ramp_fast.capture.passes import attention_of_windows
from ramp_fast.gemm import Precision
from ramp_fast.gemm.private_operators import flash_attends, flash_attention
from ramp_fast.graph import Node
from ramp_fast.params import MASK_BELOW
from ramp_fast.rules.base import Flow, Fusion, Operation, ReadsInput, Values, gate, linear_gate, stacked_view
from ramp_fast.rules.junctions import only_masks, pull_product, split_sum
from ramp_fast.rules.masses import Massed, Masses, share


class Softmax(ReadsInput):
    """``c_S = (sign(S) A + softmax(|S|)) c``, denominators detached."""

    pullback_kernel = "softmax_pullback"

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        scores = values[source]
        dim = self.node.params.dim % scores.dim()
        c = ops.softmax_pullback(masked(scores).movedim(dim, -1), part.c.movedim(dim + 1, -1))
        yield Flow(source, Massed(c.movedim(-1, dim + 1), part.target))


def masked(scores: Tensor) -> Tensor:
    """Scores with everything a mask has pushed far down at minus infinity."""
    return scores.masked_fill(scores < MASK_BELOW, float("-inf"))


@dataclass
class _Pulled:
    """Coefficients of attention's operands and the masses at its junctions (of A V, of Q K^T, of a bias)."""

    c_q: Tensor
    c_k: Tensor
    c_v: Tensor
    m_a: Tensor
    m_v: Tensor
    m_q: Tensor
    m_k: Tensor
    m_bias: list[Tensor] | None = None


class Forward(Operation):
    """The forward pass of ``softmax(scale Q K^T + bias) V``, and its scores once more."""

    def prepare(self, constants: dict[Node, Any]) -> None:
        mask = constants.get(self.node.params.mask)
        self.only_masks: bool | None = None
        self.hides = True
        self.bias: Tensor | None = None
        if mask is not None and self.fused:
            self.bias = self._bias(mask)
        if mask is not None and mask.dtype != torch.bool:
            self.only_masks = only_masks(mask)
            # Where nothing is masked no score is infinite, and no row is without a weight.
            self.hides = bool((mask < MASK_BELOW).any())
        device = torch.device("cpu") if mask is None else mask.device
        if self.node.params.mask is not None and not self.in_one_step(device):
            self.pullback_kernel = "products"

    @property
    def fused(self) -> bool:
        """Whether one operator can do it all: samples first in every operand, and in a mask none or all windows."""
        p = self.node.params
        q, k, v = self.node.operands
        plain = not p.causal and not p.grouped and p.scale > 0
        if p.mask is not None and len(p.mask.example) == len(self.node.example):
            plain = plain and p.mask.example[0] in (1, self.node.batch.inner)
        # A constant query may be broadcast over the batch: the operator does not do that.
        fits = k.example == v.example and q.example[:-2] == k.example[:-2] and q.example[-1] == k.example[-1]
        return plain and fits and all(n.batch.leading for n in (self.node, *self.node.operands))

    def _bias(self, mask: Tensor) -> Tensor:
        """A mask as the operators take it, [G, H, N, M]: added to scores, minus infinity where it masks."""
        if mask.dtype == torch.bool:
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
        else:
            bias = masked(mask.to(torch.promote_types(mask.dtype, torch.float32)))
        _, *between, queries, _ = self.node.operands[0].example
        groups = len(bias) if bias.dim() == len(between) + 3 else 1
        bias = bias.expand(groups, *between, queries, self.node.operands[1].example[-2])
        return bias.reshape(groups, math.prod(between), *bias.shape[-2:])

    def _by_window(self, mask: Tensor) -> bool:
        """Whether it is a mask of every window of a sample."""
        return mask.dim() == len(self.node.example) == 4 and len(mask) == self.node.batch.inner > 1

    def in_one_step(self, device: torch.device) -> bool:
        """Whether one operator does it all there: one with a bias has kernels for CPUs only."""
        biased = self.node.params.mask is not None
        return self.fused and (not biased or (self.bias is not None and ops.cpu_kernels(device)))

    def forward(self, values: Values) -> tuple[Any, Any]:
        p = self.node.params
        q, k, v = (values[n] for n in self.node.operands)
        mask = values[p.mask] if p.mask is not None else None

        if mask is not None and self._by_window(mask):
            return attention_of_windows(q, k, v, mask, 0.0, False, scale=p.scale), None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if mask is None and not p.grouped and flash_attends(q, k, v):
                return flash_attention(q, k, v, p.causal, p.scale)
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, 0.0, p.causal, scale=p.scale, enable_gqa=p.grouped
            )

        if mask is None and q.shape[0] == k.shape[0]:
            return gemm.by_sample(attend, q.shape[-2], (q, k, v), 0), None
        return attend(q, k, v), None

    def scores(self, query: Tensor, k: Tensor, values: Values) -> tuple[Tensor, Tensor | None]:
        """``Q K^T`` with masked entries at minus infinity, and the additive bias apart from the mask."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ k.to(wide).mT
        p = self.node.params
        if p.causal:
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            return scores.masked_fill(~keep, float("-inf")), None
        if p.mask is None:
            return scores, None
        mask = values[p.mask]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, float("-inf")), None
        # A mask adds nothing to what it leaves: no junction.
        plain = only_masks(mask) if self.only_masks is None else self.only_masks
        by_window = self._by_window(mask)
        if self.hides:
            hidden = mask < MASK_BELOW
            mask = mask.masked_fill(hidden, 0.0)
            apart = scores.unflatten(0, (-1, len(mask))) if by_window else scores
            scores = apart.masked_fill(hidden, float("-inf")).view(scores.shape)
        if plain:
            return scores, None
        return scores, (mask.repeat(len(scores) // len(mask), 1, 1, 1) if by_window else mask).to(wide)


class Attention(Forward):
    """absLRP of attention: softmax and both products with their junctions, in one step."""

    def __init__(self, node: Node, precision: Precision, fusion: Fusion, rule: Any = None) -> None:
        super().__init__(node, precision, fusion, rule)
        self.pullback_kernel = "attention_pullback" if self.fused else "products"

    def needs(self) -> list[Node]:
        own = [self.node] if self.rule.gates_attention else []
        return list(self.node.operands) + own

    def pullback(self, parts: list[Massed], values: Values, kept: Any, conservation: Masses) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        shares = self.rule.shares
        fused = self.in_one_step(part.c.device)
        pulled = (self._in_one_step if fused else self._by_products)(part.c, values, conservation)
        t_a, t_v = share(part.target, [pulled.m_a, pulled.m_v], shares)
        if pulled.m_bias is not None:
            t_a = share(t_a, pulled.m_bias, shares)[0]
        t_q, t_k = share(t_a, [pulled.m_q, pulled.m_k], shares)
        targets, actual = [t_q, t_k, t_v], [pulled.m_q, pulled.m_k, pulled.m_v]
        flows = self._scaled([pulled.c_q, pulled.c_k, pulled.c_v], targets, actual, conservation, fused)
        for node, contribution in zip(self.node.operands, flows, strict=True):
            if not node.constant:
                yield Flow(node, contribution)

    def _scaled(
        self, own: list[Tensor], targets: list[Tensor], masses: list[Tensor], conservation: Masses, fused: bool
    ) -> list[Massed]:
        """Contributions of Q, K and V; scaled in one pass where they lie in one buffer, as a qkv layer's outputs do."""
        whole = None
        if fused and self.rule.shares == "kept":
            whole = stacked_view([c.movedim(-3, -2) for c in own], own[0].dim() - 2)  # [T, B, ..., N, 3, H, D]
        if whole is None or not whole.is_contiguous():
            return [Massed(*each) for each in zip(own, targets, masses, strict=True)]
        scale, alive = ops.scale_to(torch.stack(targets), torch.stack(masses))
        scale = scale.movedim(0, -1)
        flat = whole.flatten(-2).view(whole.shape[0], conservation.batch, -1, 3, whole.shape[-2] * whole.shape[-1])
        parts = ops.rescale_parts(flat, scale, conservation.contrast).view(whole.shape).unbind(-3)
        return [Massed(c.movedim(-2, -3), mass, mass) for c, mass in zip(parts, alive, strict=True)]

    def _in_one_step(self, c: Tensor, values: Values, conservation: Masses) -> _Pulled:
        q, k, v = (values[n] for n in self.node.operands)
        gated = self.rule.gates_attention
        out = values[self.node] if gated else q  # only read where gated
        c = c.to(self.precision.pullback)
        # Heads are all axes between the first and the last two: none, one, or heads and windows.
        between = tuple(q.shape[1:-2])
        heads = math.prod(between)
        q, k, v, out = (t.reshape(t.shape[0], heads, *t.shape[-2:]) for t in (q, k, v, out))
        c = c.reshape(*c.shape[:2], heads, *c.shape[-2:])
        *flat, masses = ops.attention_pullback(
            *(q, k, v, out, c, self.node.params.scale, gated, conservation.contrast),
            *(self.bias, self.only_masks is False),
        )
        c_q, c_k, c_v = (t.reshape(*t.shape[:2], *between, *t.shape[-2:]) for t in flat)
        # The windows of one sample lie side by side along the batch.
        if masses.shape[-1] != conservation.batch:
            masses = masses.unflatten(-1, (conservation.batch, -1)).sum(-1)
        m_a, m_v, m_q, m_k, *m_bias = masses
        return _Pulled(c_q, c_k, c_v, m_a, m_v, m_q, m_k, m_bias or None)

    def _by_products(self, c: Tensor, values: Values, conservation: Masses) -> _Pulled:
        p, gated = self.node.params, self.rule.gates_attention
        dtype = self.precision.pullback
        nodes, axis = self.node.operands, self.node.batch
        q, k, v = (values[n] for n in nodes)
        heads = k.shape[1]
        if p.grouped:
            repeat = q.shape[1] // heads
            k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
        c = c.to(dtype)
        if gated:
            c = gate(c, values[self.node])
        query = q * p.scale
        plain, bias = self.scores(query, k, values)
        scores = plain if bias is None else plain + bias
        weights = scores.softmax(-1)
        if self.hides:
            weights = torch.nan_to_num(weights)

        c_a = c @ (2 * gemm.positive_part(v)).to(dtype).mT
        c_v = self._fold(linear_gate(weights.to(dtype).mT @ c, v), heads)
        c_s = ops.softmax_pullback(scores, c_a)
        m_bias = None
        if bias is not None:
            c_s, m_bias = self._take_bias(c_s, plain, bias, axis, conservation)
        c_q = pull_product(c_s, k, query, dtype, gated, lambda u, w: u @ w) * p.scale
        c_k = self._fold(pull_product(c_s.mT, query, k, dtype, gated, lambda u, w: u @ w), heads)
        own = ((q, c_q, nodes[0]), (values[nodes[1]], c_k, nodes[1]), (values[nodes[2]], c_v, nodes[2]))
        m_q, m_k, m_v = (conservation.mass(x, u, n.batch) for x, u, n in own)
        return _Pulled(c_q, c_k, c_v, conservation.mass(weights, c_a, axis), m_v, m_q, m_k, m_bias)

    @staticmethod
    def _fold(c: Tensor, heads: int) -> Tensor:
        """Sum the coefficients of a key or value head over the query heads that share it."""
        return c if c.shape[2] == heads else c.unflatten(2, (heads, -1)).sum(3)

    def _take_bias(
        self, c: Tensor, plain: Tensor, bias: Tensor, axis: g.BatchAxis, conservation: Masses
    ) -> tuple[Tensor, list[Tensor]]:
        """The junction ``S = Q K^T + bias``: coefficients of the product, and the masses of both."""
        finite = plain.masked_fill(plain.isinf(), 0.0) if self.hides else plain
        own, _, *masses = split_sum(c, finite, bias.expand_as(plain), axis, conservation)
        return own, masses
