"""Operands of every operator at the sizes of a ViT, for benchmarks on any device; what they move and multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramp_fast import ops

RHS = 2  # with contrast


@dataclass(frozen=True)
class Sizes:
    """Those of ViT-B/16 and, for masking, of images and steps."""

    batch: int = 8
    tokens: int = 197
    width: int = 768
    hidden: int = 3072
    heads: int = 12
    image: int = 224
    masked: int = 16  # images
    steps: int = 100

    @property
    def ks(self) -> list[int]:
        scalars = 3 * self.image**2
        return [(s + 1) * scalars // self.steps for s in range(self.steps)]


def operands(
    s: Sizes, device: torch.device | str = "cpu", attention_dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """For each operator a function that draws its arguments, the same ones every time.

    Attention's coefficients decide whether it multiplies in float32 or, as in attributions, in bfloat16.
    """

    def normal(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def sample(seed: int = 0) -> Tensor:
        return normal(s.batch, s.tokens, s.width, seed=seed)

    def coefficient(seed: int = 2) -> Tensor:
        return normal(RHS, s.batch, s.tokens, s.width, seed=seed)

    def qkv_coefficient() -> Tensor:
        return normal(RHS, s.batch, s.tokens, 3, s.width, seed=12).bfloat16()

    def scale() -> Tensor:
        return normal(RHS, s.batch, seed=4).abs()

    def hidden() -> Tensor:
        return normal(s.batch, s.tokens, s.hidden, seed=5)

    def c_hidden() -> Tensor:
        return normal(RHS, s.batch, s.tokens, s.hidden, seed=6).bfloat16()

    def panels() -> Tensor:
        return ops.pack_panels(normal(s.hidden, s.width, seed=7).bfloat16())

    def affine() -> tuple[Any, ...]:
        side = s.image // 4
        x = normal(s.batch, 64, side, side).contiguous(memory_format=torch.channels_last)
        return x, normal(64, seed=1), normal(64, seed=2), True, 6.0, torch.bfloat16

    def block(seed: int = 0) -> Tensor:
        side = s.image // 8
        return normal(s.batch, side, side, 512, seed=seed)

    def block_coefficient(seed: int = 0) -> Tensor:
        return normal(RHS, *block().shape, seed=seed).bfloat16()

    def max_pool() -> tuple[Any, ...]:
        side = s.image // 2
        return normal(RHS, s.batch, side // 2, side // 2, 64), normal(s.batch, side, side, 64), 2, 2, True

    def attention() -> tuple[Any, ...]:
        head = s.width // s.heads
        qkv = normal(s.batch, s.tokens, 3, s.heads, head, seed=8).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(*qkv)
        c = normal(RHS, s.batch, s.tokens, s.heads, head, seed=9).to(attention_dtype).transpose(2, 3)
        return *qkv, out, c, head**-0.5, True, True

    def attention_gradient() -> tuple[Any, ...]:
        q, k, v, _, c, scale, *_ = attention()
        return q, k, v, c[:1], scale, 0.5, 0.25

    def images() -> Tensor:
        return normal(s.masked, 3, s.image, s.image, seed=10)

    def scores() -> Tensor:
        return normal(s.masked, 3 * s.image**2, seed=11)

    def masks() -> Tensor:
        return ops.mask_steps(scores(), s.ks, True).view(s.masked, 3, s.image, s.image)

    def softmax() -> tuple[Any, ...]:
        shape = s.batch, s.heads, s.tokens, s.tokens
        return normal(*shape), normal(RHS, *shape, seed=1).bfloat16()

    return {
        "mass": lambda: (sample(), coefficient(), True),
        "rescale": lambda: (coefficient(), scale(), True),
        "rescale_parts": lambda: (qkv_coefficient(), normal(RHS, s.batch, 3, seed=4).abs(), True),
        "merge": lambda: (coefficient(), scale(), coefficient(3), scale(), True),
        "junction": lambda: (coefficient(), sample(), sample(1), True, torch.bfloat16),
        "merge_junction": lambda: (
            *(coefficient(), scale(), coefficient(3), scale()),
            *(sample(), sample(1), True, torch.bfloat16),
        ),
        "norm_pullback": lambda: (coefficient(), sample(), normal(s.width), 1e-6),
        "norm_gradient": lambda: (coefficient()[:1].bfloat16(), sample(), normal(s.width), 1e-6),
        "linear_norm_pullback": lambda: (
            *(c_hidden(), panels(), sample()),
            *(normal(s.width), normal(s.width, seed=1), 1e-6, True),
        ),
        "linear_pullback": lambda: (c_hidden(), panels(), sample(), torch.bfloat16),
        "scale_by": lambda: (c_hidden(), hidden()),
        "ratio": lambda: (c_hidden(), hidden(), hidden().bfloat16(), 1e-6),
        "gate": lambda: (c_hidden(), hidden()),
        "activation_factor": lambda: (hidden(), "gelu", torch.bfloat16),
        "activation_share": lambda: (hidden(), "gelu", torch.bfloat16),
        "affine_factor": affine,
        "max_pool_pullback": max_pool,
        "affine_pullback": lambda: (block_coefficient(), block().relu(), normal(512), normal(512, seed=1), True),
        "residual_pullback": lambda: (
            *(block_coefficient(), scale(), block_coefficient(3), scale(), block().relu(), block(1).relu()),
            *(normal(512), normal(512, seed=1), True, torch.bfloat16),
        ),
        "mask_steps": lambda: (scores(), s.ks, True),
        "masked_copies": lambda: (images(), masks(), images()[:1] * 0, 0, min(4, s.steps), False),
        "softmax_pullback": softmax,
        "attention_pullback": attention,
        "attention_gradient": attention_gradient,
    }


def tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [v for v in (values if isinstance(values, tuple | list) else (values,)) if isinstance(v, Tensor)]


def count_bytes(args: Any, result: Any) -> int:
    """Every operand and result once."""
    return sum(t.numel() * t.element_size() for t in [*tensors(args), *tensors(result)])


def count_flops(name: str, args: tuple[Any, ...]) -> int:
    """Multiplications and additions of matrix products; products that the sign of an input selects from count once."""
    if name in ("linear_pullback", "linear_norm_pullback"):
        c, _, x = args[:3]
        return 2 * c.numel() * x.shape[-1]
    if name == "attention_pullback":
        query, key, c = args[0], args[1], args[4]
        pairs = query.numel() * key.shape[-2]
        return 2 * pairs * (1 + 4 * c.shape[0])  # scores once, then c_A, c_V, c_Q and c_K of every side
    if name == "attention_gradient":
        query, key, c = args[0], args[1], args[3]
        return 2 * query.numel() * key.shape[-2] * (1 + 4 * c.shape[0])
    return 0
