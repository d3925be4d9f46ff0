"""Attention rollout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ramp_fast.errors import UnsupportedModelError
from ramp_fast.methods.base import checked, token_grid, upsampled


def attention_rollout(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928) of a timm Vision Transformer.

    Attention of block l, averaged over heads, and its residual connection give ``(A_l + I) / 2``; the product over
    blocks says how much of each patch is in the tokens that are classified: the class token, or the mean of those that
    are pooled. It is the same for every class.

    Parameters
    ----------
    model : timm.models.VisionTransformer
        In eval mode. Queries and keys are read by hooks, which are gone when the function returns; nothing else of the
        model is touched, whichever implementation of attention it uses.
    images : Tensor [N, C, H, W]
        Preprocessed, on the model's device.
    target : integer Tensor [N]
        Not used.

    Returns
    -------
    Tensor [N, 1, H, W]
        Not negative. Bilinear from the patch grid, on which a map and the share of prefix tokens sum to 1.

    Raises
    ------
    InputError
        An argument is not as described.
    UnsupportedModelError
        The model is in training mode, or is not a Vision Transformer with plain self-attention in every block.
    """
    images, _ = checked("attention_rollout", model, images, target)
    blocks = attention_of(model)
    flow = _Flow()
    handles = []
    try:
        for block in blocks:
            handles.append(block.q_norm.register_forward_hook(flow.keep_query))
            handles.append(block.k_norm.register_forward_hook(partial(flow.multiply, block.scale)))
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if flow.product is None or flow.blocks != len(blocks):
        raise UnsupportedModelError(
            f"attention_rollout: {flow.blocks} of {len(blocks)} blocks ran: {type(model).__name__} has a forward pass "
            "of its own that rollout does not follow"
        )
    before, rows, columns = token_grid(model, flow.product.shape[-1], images.shape[2:])
    maps = _classified(model, flow.product, before)[:, before:]
    return upsampled(maps.reshape(-1, 1, rows, columns), images.shape[2:]).to(images.dtype)


class _Flow:
    """The product over the blocks that have run, ``[N, T, T]``: one such matrix at a time is held."""

    def __init__(self) -> None:
        self.product: Tensor | None = None
        self.blocks = 0
        self._query: Tensor | None = None

    # What q_norm and k_norm return (identities in most models) are the operands of attention's product.
    def keep_query(self, module: nn.Module, inputs: tuple[Tensor, ...], query: Tensor) -> None:
        self._query = query

    def multiply(self, scale: float, module: nn.Module, inputs: tuple[Tensor, ...], key: Tensor) -> None:
        if self._query is None:
            return
        attention = (self._query * scale @ key.transpose(-2, -1)).softmax(-1).mean(1)  # [N, T, T]
        mixed = (attention + torch.eye(attention.shape[-1], device="cpu").to(attention)) / 2
        self.product = mixed if self.product is None else mixed @ self.product
        self._query = None
        self.blocks += 1


def _classified(model: nn.Module, flow: Tensor, before: int) -> Tensor:
    """Rows ``[N, T]`` of the tokens that the classifier sees, their mean where it sees several."""
    if model.global_pool == "avg":
        return flow[:, 0 if getattr(model, "pool_include_prefix", False) else before :].mean(1)
    return flow[:, : 2 if hasattr(model, "head_dist") else 1].mean(1)  # DeiT's distilled models average two heads


def attention_of(model: nn.Module) -> list[Any]:
    """The self-attention modules of a Vision Transformer, block by block.

    Raises
    ------
    UnsupportedModelError
        The model is another one, or rollout is not defined for how it attends or pools.
    """
    # Here, as importing timm takes seconds. Attention has been in this module in all versions, not always exported.
    from timm.models.vision_transformer import Attention, VisionTransformer  # type: ignore[attr-defined]

    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"attention_rollout needs a timm VisionTransformer, got {name}: models without self-attention over patches "
            "have no rollout; other transformers are not supported"
        )
    found = []
    for number, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if type(attention) is not Attention:  # a subclass may compute its weights otherwise
            raise UnsupportedModelError(
                f"attention_rollout: block {number} of {name} ({type(block).__name__}) has "
                f"{'no module attn' if attention is None else type(attention).__name__} instead of timm's Attention"
            )
        found.append(attention)
    if model.global_pool not in ("token", "avg"):
        raise UnsupportedModelError(
            f"attention_rollout is defined for models that classify a class token or the mean of tokens; {name} pools "
            f"by {model.global_pool!r}"
        )
    return found
