"""Attention rollout against its equation, from weights that the unfused attention shows."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import images, resnet, vit  # beside this folder

from ramp_fast import UnsupportedModelError
from ramp_fast.methods import attention_rollout, make_method

TARGET = torch.tensor([0, 1, 2])


def transformer(**options: Any) -> VisionTransformer:
    torch.manual_seed(5)
    model = VisionTransformer(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 10, **options}
    )
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=2.0 if "q_norm" in name or "k_norm" in name else 0.3)  # attention far from uniform
    return model.eval().double()


def by_definition(model: VisionTransformer, x: Tensor, rows: slice, before: int) -> Tensor:
    model = copy.deepcopy(model)
    weights: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, out: weights.append(out))
    model(x)
    flow = torch.eye(weights[0].shape[-1]).double()
    for attention in weights:
        mixed = 0.5 * attention.mean(1) + 0.5 * torch.eye(attention.shape[-1]).double()
        flow = mixed / mixed.sum(-1, keepdim=True) @ flow
    maps = flow[:, rows].mean(1)[:, before:].reshape(len(x), 1, 4, 4)
    return nn.functional.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("options", "rows", "before"),
    [
        ({}, slice(0, 1), 1),
        ({"reg_tokens": 3}, slice(0, 1), 4),
        ({"qk_norm": True}, slice(0, 1), 1),
        ({"global_pool": "avg", "reg_tokens": 2}, slice(3, None), 3),
        ({"global_pool": "avg", "class_token": False}, slice(0, None), 0),
    ],
    ids=["class token", "registers", "norm of queries and keys", "mean of patches", "no class token"],
)
def test_definition(options: dict[str, Any], rows: slice, before: int, fused: bool) -> None:
    model, x = transformer(**options), images().double()
    for block in model.blocks:
        block.attn.fused_attn = fused
    expected = by_definition(model, x, rows, before).detach()
    found = attention_rollout(model, x, TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert float(found.std((1, 2, 3)).min()) > 1e-3  # a map of something
    assert all(block.attn.fused_attn == fused for block in model.blocks)


def test_two_heads_of_a_distilled_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        **{"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10},
    )
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model = model.eval().double()
    x = images().double()
    expected = by_definition(model, x, slice(0, 2), 2).detach()
    torch.testing.assert_close(attention_rollout(model, x, TARGET), expected, rtol=1e-9, atol=1e-15)


def test_the_same_for_every_class() -> None:
    model, x = vit(), images()
    assert torch.equal(attention_rollout(model, x, TARGET), attention_rollout(model, x, TARGET + 5))


def test_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="needs a timm VisionTransformer, got ResNet"):
        make_method("rollout", resnet())
    with pytest.raises(UnsupportedModelError, match="needs a timm VisionTransformer, got ResNet"):
        attention_rollout(resnet(), images(), TARGET)
    with pytest.raises(UnsupportedModelError, match=r"block 0 .*\(ParallelScalingBlock\) has no module attn"):
        make_method("rollout", transformer(block_fn=ParallelScalingBlock))
    with pytest.raises(UnsupportedModelError, match="pools by 'map'"):
        make_method("rollout", transformer(global_pool="map"))
    other = transformer()

    class Own(type(other.blocks[1].attn)):  # type: ignore[misc]
        """Attention that may compute its weights otherwise."""

    other.blocks[1].attn.__class__ = Own
    with pytest.raises(UnsupportedModelError, match=r"block 1 .* has Own instead of timm's Attention"):
        make_method("rollout", other)


def test_a_forward_pass_that_skips_blocks() -> None:
    model = transformer()
    model.forward = lambda x: model.head(model.blocks[0](model._pos_embed(model.patch_embed(x)))[:, 0])
    with pytest.raises(UnsupportedModelError, match="1 of 3 blocks ran"):
        attention_rollout(model, images().double(), TARGET)
    assert not model.blocks[0].attn.q_norm._forward_hooks
