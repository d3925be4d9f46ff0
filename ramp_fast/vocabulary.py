"""The vocabulary: which ATen operations are understood, and what they are in the rules' terms.

Each handler gets the new node and its arguments bound to the schema's names; it sets the node's kind,
operands and params, and returns another node where the operation does nothing at inference.
``docs/rules.md`` documents the pull-back of every kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ramp_fast import graph as g
from ramp_fast.graph import Node

Bound = dict[str, Any]
Handler = Callable[[Node, Bound], "Node | None"]

VOCABULARY: dict[str, Handler] = {}


class Unsupported(Exception):
    """The operation, or this use of it, is outside the vocabulary."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            VOCABULARY[name] = handler
        return handler

    return register


def bind(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
    """Arguments by their schema names, defaults filled in."""
    if not isinstance(target, torch._ops.OpOverload):
        raise Unsupported(getattr(target, "__name__", str(target)))
    bound: Bound = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def _set(node: Node, kind: str, operands: list[Node], **params: Any) -> None:
    node.kind, node.operands, node.params = kind, operands, params


def _constant_only(value: Any, what: str) -> None:
    if isinstance(value, Node) and not value.constant:
        raise Unsupported(f"{what} that depends on the images")


# Operations with weights


@handles("linear.default")
def _linear(node: Node, b: Bound) -> None:
    _constant_only(b["weight"], "linear.default with a weight")
    _set(node, g.LINEAR, [b["input"]], weight=b["weight"], bias=b["bias"])


@handles("addmm.default")
def _addmm(node: Node, b: Bound) -> None:
    _constant_only(b["mat2"], "addmm.default with a matrix")
    _constant_only(b["self"], "addmm.default with a bias")
    if b["beta"] != 1 or b["alpha"] != 1:
        raise Unsupported("addmm.default with alpha or beta")
    _set(node, g.LINEAR, [b["mat1"]], weight=b["mat2"], bias=b["self"], transposed=True)


@handles("conv1d.default", "conv2d.default", "conv3d.default", "conv2d.padding", "conv1d.padding")
def _conv(node: Node, b: Bound) -> None:
    _constant_only(b["weight"], f"{node.target} with a weight")
    dims = len(b["weight"].shape) - 2

    def each(value: Any) -> list[int]:
        values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
        return values * dims if len(values) == 1 else values

    padding = b["padding"]
    dilation = each(b["dilation"])
    if padding == "valid":
        padding = [0] * dims
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, b["weight"].shape[2:], strict=True)]
        if any(r % 2 for r in reach):
            raise Unsupported(f"{node.target} with asymmetric 'same' padding")
        padding = [r // 2 for r in reach]
    _set(
        node,
        g.CONV,
        [b["input"]],
        weight=b["weight"],
        bias=b["bias"],
        stride=each(b["stride"]),
        padding=each(padding),
        dilation=dilation,
        groups=b["groups"],
    )


@handles("batch_norm.default")
def _batch_norm(node: Node, b: Bound) -> None:
    if b["training"]:
        raise Unsupported("batch_norm.default in training mode")
    _set(
        node,
        g.BATCH_NORM,
        [b["input"]],
        weight=b["weight"],
        bias=b["bias"],
        mean=b["running_mean"],
        var=b["running_var"],
        eps=b["eps"],
    )


@handles("_native_batch_norm_legit_no_training.default")
def _native_batch_norm(node: Node, b: Bound) -> None:
    _batch_norm(node, {**b, "training": False})
    _call(
        node,
        torch.ops.aten.batch_norm.default,
        *(b[k] for k in ("input", "weight", "bias", "running_mean", "running_var")),
        False,
        b["momentum"],
        b["eps"],
        False,
    )


def _call(node: Node, target: Any, *args: Any) -> None:
    node.target, node.args, node.kwargs = target, args, {}


@handles("layer_norm.default")
def _layer_norm(node: Node, b: Bound) -> None:
    dims = len(b["normalized_shape"])
    _set(node, g.LAYER_NORM, [b["input"]], weight=b["weight"], bias=b["bias"], eps=b["eps"], dims=dims)


@handles("rms_norm.default")
def _rms_norm(node: Node, b: Bound) -> None:
    dims = len(b["normalized_shape"])
    _set(node, g.RMS_NORM, [b["input"]], weight=b["weight"], eps=b["eps"], dims=dims)


@handles("group_norm.default")
def _group_norm(node: Node, b: Bound) -> None:
    _set(node, g.GROUP_NORM, [b["input"]], weight=b["weight"], bias=b["bias"], eps=b["eps"], groups=b["num_groups"])


# Activations: y = f(x), elementwise; `how` is what the rule needs to know of f.

# f has the sign of its argument or is zero, and its slope is one where it is not zero
_RELU_LIKE = ("relu.default", "relu6.default")
_SMOOTH = (
    "gelu.default",
    "silu.default",
    "mish.default",
    "elu.default",
    "selu.default",
    "celu.default",
    "leaky_relu.default",
    "sigmoid.default",
    "tanh.default",
    "hardswish.default",
    "hardsigmoid.default",
    "hardtanh.default",
    "softplus.default",
    "log_sigmoid.default",
    "clamp.default",
    "clamp_min.default",
    "clamp_max.default",
    "abs.default",
    "square.default",
    "exp.default",
    "sqrt.default",
    "rsqrt.default",
    "pow.Tensor_Scalar",
)


def _activation(how: str) -> Handler:
    def handler(node: Node, b: Bound) -> None:
        source = next(iter(b.values()))
        if any(isinstance(v, Node) for v in list(b.values())[1:]):
            raise Unsupported(f"{node.target} with tensor bounds")
        name = str(node.target).removeprefix("aten.").split(".")[0]
        _set(node, g.ACTIVATION, [source], how=how, function=name)

    return handler


for _name in _RELU_LIKE:
    VOCABULARY[_name] = _activation("relu")
for _name in _SMOOTH:
    VOCABULARY[_name] = _activation("smooth")


@handles("prelu.default")
def _prelu(node: Node, b: Bound) -> None:
    _constant_only(b["weight"], "prelu.default with a slope")
    _set(node, g.ACTIVATION, [b["self"]], how="smooth", function="prelu")


# Sums and products


def _pair(node: Node, a: Any, b: Any) -> tuple[Any, Any]:
    if isinstance(a, Node) and a.kind == g.INT or isinstance(b, Node) and b.kind == g.INT:
        raise Unsupported(f"{node.target} of a tensor and a size")
    return a, b


@handles("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def _add(node: Node, b: Bound) -> None:
    first, second = _pair(node, b["self"], b["other"])
    if b["alpha"] != 1:
        raise Unsupported(f"{node.target} with alpha")
    name = str(node.target)
    signs = (-1, 1) if "rsub" in name else (1, -1) if "sub" in name else (1, 1)
    _set(node, g.ADD, [n for n in (first, second) if isinstance(n, Node)], first=first, second=second, signs=signs)


@handles("mul.Tensor", "mul.Scalar")
def _mul(node: Node, b: Bound) -> None:
    first, second = _pair(node, b["self"], b["other"])
    if isinstance(second, Node) and not second.constant:
        if isinstance(first, Node) and not first.constant:
            _set(node, g.MUL, [first, second])
            return
        first, second = second, first
    _set(node, g.SCALE, [first], factor=second, inverse=False)


@handles("div.Tensor", "div.Scalar")
def _div(node: Node, b: Bound) -> None:
    first, second = _pair(node, b["self"], b["other"])
    if isinstance(second, Node) and not second.constant:
        if not isinstance(first, Node) or first.constant:
            raise Unsupported("div.Tensor of a constant by a tensor that depends on the images")
        # A denominator is a statistic, as in normalisation layers: it is detached.
        _set(node, g.DIV, [first], denominator=second)
        return
    _set(node, g.SCALE, [first], factor=second, inverse=True)


@handles("neg.default")
def _neg(node: Node, b: Bound) -> None:
    _set(node, g.SCALE, [b["self"]], factor=-1.0, inverse=False)


@handles("matmul.default", "bmm.default", "mm.default")
def _matmul(node: Node, b: Bound) -> None:
    first, second = b["self"], b.get("other", b.get("mat2"))
    if second.constant:
        if len(second.shape) != 2:
            raise Unsupported(f"{node.target} with a batch of constant matrices")
        _set(node, g.LINEAR, [first], weight=second, bias=None, transposed=True)
    elif first.constant:
        raise Unsupported(f"{node.target} with a constant left operand")
    else:
        _set(node, g.MATMUL, [first, second])


@handles("softmax.int", "_softmax.default")
def _softmax(node: Node, b: Bound) -> None:
    _set(node, g.SOFTMAX, [b["self"]], dim=b["dim"])


@handles("scaled_dot_product_attention.default")
def _attention(node: Node, b: Bound) -> None:
    _constant_only(b["attn_mask"], "scaled_dot_product_attention.default with a mask")
    if b["dropout_p"]:
        raise Unsupported("scaled_dot_product_attention.default with dropout at inference")
    q, k, v = b["query"], b["key"], b["value"]
    if len(q.shape) != 4 or len(k.shape) != 4:
        raise Unsupported(f"scaled_dot_product_attention.default on {len(q.shape)}-dimensional tensors")
    _set(
        node,
        g.ATTENTION,
        [q, k, v],
        mask=b["attn_mask"],
        causal=bool(b["is_causal"]),
        scale=b["scale"] if b["scale"] is not None else 1 / math.sqrt(int(q.shape[-1])),
        grouped=bool(b["enable_gqa"]),
    )


# Pools


@handles("max_pool2d.default", "max_pool1d.default", "max_pool2d_with_indices.default")
def _max_pool(node: Node, b: Bound) -> None:
    if len(node.operands or [b["self"]]) != 1 or "max_pool2d" not in str(node.target):
        raise Unsupported(str(node.target))
    _set(
        node,
        g.MAX_POOL,
        [b["self"]],
        kernel_size=b["kernel_size"],
        stride=b["stride"] or b["kernel_size"],
        padding=b["padding"],
        dilation=b["dilation"],
        ceil_mode=b["ceil_mode"],
    )


@handles("mean.dim", "sum.dim_IntList")
def _mean(node: Node, b: Bound) -> None:
    rank = len(b["self"].shape)
    dims = sorted(d % rank for d in b["dim"]) if b["dim"] else list(range(rank))
    how = "mean" if "mean" in str(node.target) else "sum"
    _set(node, g.LINEAR_POOL, [b["self"]], how=how, dims=dims, keepdim=b["keepdim"])


@handles("adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default")
def _adaptive_pool(node: Node, b: Bound) -> None:
    size = b["output_size"]
    source = b["self"]
    if all(s == 1 for s in size):
        dims = list(range(len(source.shape) - len(size), len(source.shape)))
        _set(node, g.LINEAR_POOL, [source], how="mean", dims=dims, keepdim=True)
    else:
        _set(node, g.LINEAR_POOL, [source], how="vjp")


@handles(
    "avg_pool2d.default",
    "avg_pool1d.default",
    "upsample_bilinear2d.vec",
    "upsample_bilinear2d.default",
    "adaptive_avg_pool3d.default",
)
def _other_pool(node: Node, b: Bound) -> None:
    _set(node, g.LINEAR_POOL, [b.get("self", b.get("input"))], how="vjp")


# Movers: values change place, not size. `how` names the inverse.


@handles("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
         "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "view_as.default")  # fmt: skip
def _reshape(node: Node, b: Bound) -> Node | None:
    source = b["self"]
    if node.shape == source.shape:
        return source  # type: ignore[no-any-return]
    if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        node.target = torch.ops.aten.reshape.default  # our tensors may have other strides than the model's
    _set(node, g.MOVE, [source], how="reshape")
    return None


@handles("permute.default", "transpose.int", "t.default", "swapaxes.default", "movedim.int", "movedim.intlist")
def _permute(node: Node, b: Bound) -> None:
    source = b["self"]
    rank = len(source.shape)
    # The permutation is read off the operation itself.
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    args = g.map_nodes(lambda n: probe if n is source else n, node.args)
    moved = node.target(*args, **node.kwargs)
    _set(node, g.MOVE, [source], how="permute", dims=[s - 2 for s in moved.shape])


@handles("slice.Tensor")
def _slice(node: Node, b: Bound) -> Node | None:
    source = b["self"]
    if node.shape == source.shape and b["step"] == 1:
        return source  # type: ignore[no-any-return]
    for bound in (b["start"], b["end"], b["step"]):
        if isinstance(bound, Node):
            raise Unsupported("slice.Tensor with bounds that depend on the batch")
    dim = b["dim"] % len(source.shape)
    _set(node, g.MOVE, [source], how="slice", dim=dim, start=b["start"], end=b["end"], step=b["step"])
    return None


@handles("narrow.default")
def _narrow(node: Node, b: Bound) -> None:
    dim = b["dim"] % len(b["self"].shape)
    _set(node, g.MOVE, [b["self"]], how="slice", dim=dim, start=b["start"], end=b["start"] + b["length"], step=1)


@handles("select.int")
def _select(node: Node, b: Bound) -> None:
    source = b["self"]
    dim = b["dim"] % len(source.shape)
    if source.shape[dim] == 1:
        _set(node, g.MOVE, [source], how="reshape")
    else:
        _set(node, g.MOVE, [source], how="select", dim=dim, index=b["index"])


@handles("cat.default", "stack.default")
def _cat(node: Node, b: Bound) -> None:
    parts = list(b["tensors"])
    how = "stack" if "stack" in str(node.target) else "cat"
    _set(node, g.MOVE, parts, how=how, dim=b["dim"] % len(node.shape))


@handles("unbind.int", "split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "tensor_split.sections")
def _parts(node: Node, b: Bound) -> None:
    source = b["self"]
    how = "unbind" if "unbind" in str(node.target) else "split"
    _set(node, g.PARTS, [source], how=how, dim=b["dim"] % len(source.shape))


@handles("expand.default", "expand_as.default")
def _expand(node: Node, b: Bound) -> Node | None:
    source = b["self"]
    if node.shape == source.shape:
        return source  # type: ignore[no-any-return]
    _set(node, g.MOVE, [source], how="expand")
    return None


@handles("constant_pad_nd.default", "pad.default")
def _pad(node: Node, b: Bound) -> Node | None:
    source = b["self"]
    if not any(p if isinstance(p, int) else True for p in b["pad"]):
        return source  # type: ignore[no-any-return]
    value = b["value"]
    if b.get("mode", "constant") != "constant" or value not in (None, 0, 0.0):
        raise Unsupported(f"{node.target} other than by zeros")
    _set(node, g.MOVE, [source], how="vjp")
    return None


@handles("roll.default", "flip.default", "index_select.default", "repeat.default", "repeat_interleave.self_int",
         "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default", "upsample_nearest2d.vec",
         "upsample_nearest2d.default", "im2col.default", "diagonal.default")  # fmt: skip
def _linear_move(node: Node, b: Bound) -> None:
    source = b.get("self", b.get("input"))
    _set(node, g.MOVE, [source], how="vjp")


@handles("index.Tensor")
def _index(node: Node, b: Bound) -> None:
    for index in b["indices"]:
        _constant_only(index, "index.Tensor with an index")
    _set(node, g.MOVE, [b["self"]], how="vjp")


# Nothing happens at inference


@handles("dropout.default", "dropout_.default", "feature_dropout.default", "alpha_dropout.default")
def _dropout(node: Node, b: Bound) -> Node:
    if b["train"] and b["p"]:
        raise Unsupported(f"{node.target} in training mode")
    return b["input"]  # type: ignore[no-any-return]


@handles("contiguous.default", "clone.default", "alias.default", "detach.default", "lift_fresh_copy.default",
         "lift_fresh.default", "detach_.default", "type_as.default", "to.dtype", "to.dtype_layout", "_to_copy.default",
         "to.device", "to.other", "float.default", "view.dtype")  # fmt: skip
def _same(node: Node, b: Bound) -> Node:
    # Casts between floating dtypes are dropped: the engine's precision decides the dtype.
    dtype = b.get("dtype")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise Unsupported(f"{node.target} to {dtype}")
    if "view" in str(node.target):
        raise Unsupported(str(node.target))
    source: Node = b["self"]
    return source
