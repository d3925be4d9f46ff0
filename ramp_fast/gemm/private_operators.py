"""Private operators of PyTorch, all that this package calls: each is looked for once, and has a public fallback.

Packed oneDNN products and convolutions have no public names, nor has FlashAttention apart from the choice that
``scaled_dot_product_attention`` makes. A PyTorch version that lacks one of them, or gives it other arguments, is served
by the public function: ``packs_*`` and ``flash_attends`` say no then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Operator and how many arguments it has where this file knows how to call it.
_CALLED = {
    "mkldnn::_reorder_linear_weight": (1, 2),
    "mkldnn::_linear_pointwise": (6,),
    "mkldnn::_reorder_convolution_weight": (6,),
    "mkldnn::_convolution_pointwise": (10,),
    "mkldnn::_convolution_pointwise.binary": (13,),
    "mkldnn::_reorder_convolution_transpose_weight": (7,),
    "mkldnn::_convolution_transpose_pointwise": (11,),
    "aten::_scaled_dot_product_flash_attention": (7,),
}


def _found() -> frozenset[str]:
    """Those of the operators that this PyTorch has, in the form in which they are called."""
    names = set()
    for name, counts in _CALLED.items():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        try:
            operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        except AttributeError:
            continue
        if len(operator._schema.arguments) in counts:
            names.add(name)
    return frozenset(names)


_FOUND = _found()
_LINEAR = frozenset({"mkldnn::_reorder_linear_weight", "mkldnn::_linear_pointwise"})
_CONVOLUTION = frozenset({"mkldnn::_reorder_convolution_weight", "mkldnn::_convolution_pointwise"})
_TRANSPOSED = frozenset({"mkldnn::_reorder_convolution_transpose_weight", "mkldnn::_convolution_transpose_pointwise"})


def _has_bf16() -> bool:
    supported: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def _packs(weight: Tensor, operators: frozenset[str]) -> bool:
    return (
        operators <= _FOUND
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bf16()))
        and weight.numel() > 0
    )


def packs_linear(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by a packed matrix like this one."""
    return _packs(weight, _LINEAR)


def pack_linear(weight: Tensor) -> Tensor:
    """``weight`` ``[out, in]`` in the layout of :func:`linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def packs_convolution(weight: Tensor) -> bool:
    """Whether oneDNN convolves with packed weights like these."""
    return weight.dim() == 4 and _packs(weight, _CONVOLUTION)


def convolves() -> bool:
    """Whether :func:`convolution` takes float32, and adds another tensor to what it computes."""
    adds = "mkldnn::_convolution_pointwise.binary" in _FOUND
    return adds and _CONVOLUTION <= _FOUND and bool(torch.backends.mkldnn.is_available())


def pack_convolution(
    weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, size: tuple[int, ...]
) -> Tensor:
    """``weight`` ``[out, in / groups, kh, kw]`` in the layout of :func:`convolution` for inputs of ``size``."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(size))
    return packed


def convolution(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    addend: Tensor | None,
) -> Tensor:
    """``conv(x, weight) + bias + addend``, then ReLU; everything lies channels last."""
    where = padding, stride, dilation, groups
    pointwise = torch.ops.mkldnn._convolution_pointwise
    y: Tensor
    if addend is None:
        y = pointwise(x, packed, bias, *where, "relu" if relu else "none", [], "")
    elif "mkldnn::_convolution_pointwise.binary" in _FOUND:
        y = pointwise.binary(x, addend, packed, bias, *where, "add", 1.0, "relu" if relu else None, [], None)
    else:
        y = pointwise(x, packed, bias, *where, "none", [], "") + addend
        y = y.relu_() if relu else y
    return y


def packs_transposed(weight: Tensor) -> bool:
    """Whether oneDNN convolves backwards with packed weights like these."""
    return weight.dim() == 4 and _packs(weight, _TRANSPOSED)


def pack_transposed(
    weight: Tensor,
    padding: list[int],
    output_padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    size: tuple[int, ...],
) -> Tensor:
    """``weight`` in the layout of :func:`transposed` for inputs of ``size``."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, padding, output_padding, stride, dilation, groups, list(size)
    )
    return packed


def transposed(
    x: Tensor,
    packed: Tensor,
    padding: list[int],
    output_padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The transposed convolution of ``x``, without a bias."""
    y: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
        x, packed, None, padding, output_padding, stride, dilation, groups, "none", [], ""
    )
    return y


def flash_attends(*operands: Tensor) -> bool:
    """Whether FlashAttention takes q, k and v, which sums in one order for any batch.

    Left to choose on a GPU, PyTorch takes cuDNN's attention for bfloat16, whose order depends on the batch (H200,
    PyTorch 2.11: maps moved by 5e-3 of their largest number).
    """
    device = operands[0].device
    if device.type != "cuda" or "aten::_scaled_dot_product_flash_attention" not in _FOUND:
        return False
    if not torch.cuda.is_available() or not torch.backends.cuda.is_flash_attention_available():
        return False
    fit = all(t.dtype == torch.bfloat16 and t.dim() == 4 and t.shape[-1] in range(8, 257, 8) for t in operands)
    return fit and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """``softmax(scale Q K^T) V``."""
    y: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, scale=scale)[0]
    return y
