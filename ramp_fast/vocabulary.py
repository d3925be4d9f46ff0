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
from ramp_fast.maps import Call, Resampling

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


def _image(b: Bound) -> Node:
    """The first operand, whichever name the schema gives it."""
    source: Node = b["self"] if "self" in b else b["input"]
    return source


def _split_off(node: Node, suffix: str, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    """An operation that a handler takes apart is computed in steps: one of them, shaped ``like`` a node."""
    part = Node(f"{node.name}_{suffix}", "", target, args, module=node.module, shape=like.shape, example=like.example)
    if all(n.constant for n in part.references()):
        part.kind, part.params = g.CONST, {"floating": True}
    else:
        VOCABULARY[str(target).removeprefix("aten.")](part, bind(target, args, {}))
    return part


def _linear_map(node: Node, source: Node, function: Call, **params: Any) -> None:
    """Linear in ``source`` with constant weights of both signs."""
    node.target, node.args, node.kwargs = function, (source, *function.constants), {}
    _set(node, g.LINEAR_MAP, [source], **params)


def _reduced(rank: int, dims: list[int], keepdim: bool) -> tuple[list[list[int]], list[int]]:
    """Labels of a reduction's axes, operands' and result's, as an einsum would name them."""
    result = [-1 - d if d in dims else d for d in range(rank)] if keepdim else [d for d in range(rank) if d not in dims]
    return [list(range(rank))], result


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or dim == []:
        return list(range(rank))
    return sorted(d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim]))


# Operations with weights


@handles("linear.default")
def _linear(node: Node, b: Bound) -> None:
    _constant_only(b["weight"], "linear.default with a weight")
    if len(b["input"].shape) == 1:
        _linear_of_a_row(node, b)
        return
    _set(node, g.LINEAR, [b["input"]], weight=b["weight"], bias=b["bias"])


def _linear_of_a_row(node: Node, b: Bound) -> None:
    """A linear layer on a vector, as a model has it that takes the images of a batch one after the other."""
    source, aten = b["input"], torch.ops.aten
    like = Node("", "", node.target, shape=(1, *source.shape), example=(1, *source.example))
    row = _split_off(node, "row", aten.unsqueeze.default, (source, 0), like)
    like = Node("", "", node.target, shape=(1, *node.shape), example=(1, *node.example))
    product = _split_off(node, "product", aten.linear.default, (row, b["weight"], b["bias"]), like)
    _call(node, aten.squeeze.dim, product, 0)
    _set(node, g.MOVE, [product], how="reshape", before=[row, product])


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
            _conv_after_pad(node, b, reach)
            return
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


def _conv_after_pad(node: Node, b: Bound, reach: list[int]) -> None:
    """'same' padding that is not symmetric: zeros first, the larger half behind."""
    source = b["input"]
    sizes = [side for r in reversed(reach) for side in (r // 2, r - r // 2)]
    grown = tuple(s + r for s, r in zip(source.example[2:], reach, strict=True))
    like = Node("", "", node.target, shape=(*source.shape[:2], *grown), example=(*source.example[:2], *grown))
    padded = _split_off(node, "pad", torch.ops.aten.constant_pad_nd.default, (source, sizes, 0.0), like)
    target = getattr(torch.ops.aten, f"conv{len(reach)}d").default
    args = (padded, b["weight"], b["bias"], b["stride"], [0] * len(reach), b["dilation"], b["groups"])
    _call(node, target, *args)
    _conv(node, bind(target, args, {}))
    node.params["before"] = [padded]


@handles("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(node: Node, b: Bound) -> None:
    _constant_only(b["weight"], f"{node.target} with a weight")
    _linear_map(node, b["input"], Call(node, b["input"]))


@handles("batch_norm.default")
def _batch_norm(node: Node, b: Bound) -> None:
    if b["training"]:
        raise Unsupported("batch_norm.default with the statistics of the batch (training mode, or none were kept)")
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


@handles("native_layer_norm.default")
def _native_layer_norm(node: Node, b: Bound) -> None:
    _layer_norm(node, b)
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    _call(node, torch.ops.aten.layer_norm.default, *(b[k] for k in names))


@handles("rms_norm.default")
def _rms_norm(node: Node, b: Bound) -> None:
    dims = len(b["normalized_shape"])
    _set(node, g.RMS_NORM, [b["input"]], weight=b["weight"], eps=b["eps"], dims=dims)


@handles("group_norm.default")
def _group_norm(node: Node, b: Bound) -> None:
    _set(node, g.GROUP_NORM, [b["input"]], weight=b["weight"], bias=b["bias"], eps=b["eps"], groups=b["num_groups"])


@handles("native_group_norm.default")
def _native_group_norm(node: Node, b: Bound) -> None:
    _set(node, g.GROUP_NORM, [b["input"]], weight=b["weight"], bias=b["bias"], eps=b["eps"], groups=b["group"])
    _call(node, torch.ops.aten.group_norm.default, *(b[k] for k in ("input", "group", "weight", "bias", "eps")))


@handles("instance_norm.default")
def _instance_norm(node: Node, b: Bound) -> None:
    if not b["use_input_stats"]:
        raise Unsupported("instance_norm.default with running statistics")
    groups = b["input"].shape[1]
    if not isinstance(groups, int):
        raise Unsupported("instance_norm.default with the batch among the channels")
    _set(node, g.GROUP_NORM, [b["input"]], weight=b["weight"], bias=b["bias"], eps=b["eps"], groups=groups)


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
    "clamp.Tensor",
    "clamp_min.default",
    "clamp_max.default",
    "abs.default",
    "square.default",
    "exp.default",
    "sqrt.default",
    "rsqrt.default",
    "reciprocal.default",
    "log.default",
    "log1p.default",
    "expm1.default",
    "erf.default",
    "sin.default",
    "cos.default",
    "atan.default",
    "softshrink.default",
    "hardshrink.default",
    "threshold.default",
    "pow.Tensor_Scalar",
)


def _activation(how: str) -> Handler:
    def handler(node: Node, b: Bound) -> None:
        source = next(iter(b.values()))
        for value in list(b.values())[1:]:
            _constant_only(value, f"{node.target} with bounds")
        name = str(node.target).removeprefix("aten.").split(".")[0]
        lowest, highest = b.get("min_val", b.get("min")), b.get("max_val", b.get("max"))
        cut_at_zero = name in ("hardtanh", "clamp", "clamp_min") and lowest == 0
        if how == "relu" or (cut_at_zero and not isinstance(highest, Node)):
            # nn.ReLU6 and x.clamp(min=0) are what relu6 and relu are
            cap = 6.0 if name == "relu6" else math.inf if highest is None else float(highest)
            _set(node, g.ACTIVATION, [source], how="relu", function="relu", cap=cap)
            return
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
    if any(isinstance(n, Node) and n.kind == g.INT for n in (a, b)):
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
            if _is_inverse(first):
                first, second = second, first
            if _is_inverse(second):
                # A written-out norm: the factor is a statistic, detached as a denominator is.
                _set(node, g.DIV, [first], denominator=second, inverse=True)
                return
            _set(node, g.MUL, [first, second])
            return
        first, second = second, first
    _set(node, g.SCALE, [first], factor=second, inverse=False)


def _is_inverse(node: Node) -> bool:
    while node.kind == g.MOVE and len(node.operands) == 1:
        node = node.operands[0]
    if node.kind != g.ACTIVATION:
        return False
    power = node.args[1] if node.params["function"] == "pow" else 0
    return node.params["function"] in ("rsqrt", "reciprocal") or power < 0


@handles("addcmul.default")
def _addcmul(node: Node, b: Bound) -> None:
    """``self + tensor1 * tensor2``, in two steps."""
    if b["value"] != 1:
        raise Unsupported("addcmul.default with a value")
    factors = (b["tensor1"], b["tensor2"])
    like = Node("", "", node.target)
    like.shape = _broadcast(factors[0].shape, factors[1].shape)
    like.example = _broadcast(factors[0].example, factors[1].example)
    product = _split_off(node, "product", torch.ops.aten.mul.Tensor, factors, like)
    _call(node, torch.ops.aten.add.Tensor, b["self"], product)
    _add(node, {"self": b["self"], "other": product, "alpha": 1})
    node.params["before"] = [product]


def _broadcast(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


@handles("div.Tensor", "div.Scalar")
def _div(node: Node, b: Bound) -> None:
    first, second = _pair(node, b["self"], b["other"])
    if isinstance(second, Node) and not second.constant:
        if not isinstance(first, Node) or first.constant:
            raise Unsupported("div.Tensor of a constant by a tensor that depends on the images")
        # A denominator is a statistic, as in normalisation layers: it is detached.
        _set(node, g.DIV, [first], denominator=second, inverse=False)
        return
    _set(node, g.SCALE, [first], factor=second, inverse=True)


@handles("neg.default")
def _neg(node: Node, b: Bound) -> None:
    _set(node, g.SCALE, [b["self"]], factor=-1.0, inverse=False)


@handles("matmul.default", "bmm.default", "mm.default")
def _matmul(node: Node, b: Bound) -> None:
    first, second = b["self"], b["other"] if "other" in b else b["mat2"]
    if second.constant:
        if len(second.shape) == 2:
            _set(node, g.LINEAR, [first], weight=second, bias=None, transposed=True)
        else:
            _linear_map(node, first, Call(node, first), contracts=True)
    elif first.constant:
        _linear_map(node, second, Call(node, second), contracts=True)
    else:
        _set(node, g.MATMUL, [first, second])


@handles("einsum.default")
def _einsum(node: Node, b: Bound) -> None:
    """A product of two tensors, or a linear map of one."""
    equation, tensors = b["equation"].replace(" ", ""), list(b["tensors"])
    if "." in equation or "->" not in equation:
        raise Unsupported(f"einsum.default {b['equation']!r}: spell out every axis and the result")
    left, result = equation.split("->")
    labels = [list(term) for term in left.split(",")]
    if any(len(set(term)) != len(term) for term in labels):
        raise Unsupported(f"einsum.default {b['equation']!r}, which takes a diagonal")
    variable = [i for i, n in enumerate(tensors) if not n.constant]
    if len(variable) == 1:
        source = tensors[variable[0]]
        _linear_map(node, source, Call(node, source), labels=([labels[variable[0]]], list(result)))
    elif len(variable) == len(tensors) == 2:
        _set(node, g.BILINEAR, tensors, labels=(labels, list(result)))
    else:
        raise Unsupported(f"einsum.default of {len(variable)} tensors that depend on the images")


@handles("softmax.int", "_softmax.default")
def _softmax(node: Node, b: Bound) -> None:
    _set(node, g.SOFTMAX, [b["self"]], dim=b["dim"])


@handles("scaled_dot_product_attention.default")
def _attention(node: Node, b: Bound) -> None:
    if b["dropout_p"]:
        raise Unsupported("scaled_dot_product_attention.default with dropout at inference")
    q, k, v = b["query"], b["key"], b["value"]
    rank = len(q.shape)
    if rank < 3 or not rank == len(k.shape) == len(v.shape):
        raise Unsupported("scaled_dot_product_attention.default on tensors of different ranks")
    if b["enable_gqa"] and rank != 4:
        raise Unsupported(f"scaled_dot_product_attention.default, grouped, on {rank}-dimensional tensors")
    if isinstance(b["attn_mask"], Node) and not b["attn_mask"].constant:
        _attention_in_steps(node, b)
        return
    _set(
        node,
        g.ATTENTION,
        [q, k, v],
        mask=b["attn_mask"],
        causal=bool(b["is_causal"]),
        scale=b["scale"] if b["scale"] is not None else 1 / math.sqrt(int(q.shape[-1])),
        grouped=bool(b["enable_gqa"]),
    )


def _attention_in_steps(node: Node, b: Bound) -> None:
    """Attention with scores that are biased by something the images decide (decomposed relative positions)."""
    q, k, v, bias = b["query"], b["key"], b["value"], b["attn_mask"]
    if b["is_causal"] or b["enable_gqa"]:
        raise Unsupported("scaled_dot_product_attention.default, causal or grouped, with a mask from the images")
    aten, rank = torch.ops.aten, len(q.shape)
    scale = b["scale"] if b["scale"] is not None else 1 / math.sqrt(int(q.shape[-1]))
    turned = Node("", "", node.target, shape=(*k.shape[:-2], k.shape[-1], k.shape[-2]),
                  example=(*k.example[:-2], k.example[-1], k.example[-2]))  # fmt: skip
    like = Node("", "", node.target, shape=(*q.shape[:-1], k.shape[-2]), example=(*q.example[:-1], k.example[-2]))
    query = _split_off(node, "query", aten.mul.Tensor, (q, scale), q)
    key = _split_off(node, "key", aten.transpose.int, (k, rank - 2, rank - 1), turned)
    plain = _split_off(node, "scores", aten.matmul.default, (query, key), like)
    scores = _split_off(node, "biased", aten.add.Tensor, (plain, bias), like)
    weights = _split_off(node, "weights", aten.softmax.int, (scores, -1), like)
    _call(node, aten.matmul.default, weights, v)
    _set(node, g.MATMUL, [weights, v], before=[query, key, plain, scores, weights])


# Pools


@handles("max_pool2d.default", "max_pool2d_with_indices.default")
def _max_pool(node: Node, b: Bound) -> None:
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


@handles("max_pool1d.default", "max_pool3d.default", "adaptive_max_pool1d.default", "adaptive_max_pool2d.default",
         "amax.default", "amin.default", "max.dim", "min.dim")  # fmt: skip
def _extreme(node: Node, b: Bound) -> None:
    params: Bound = {}
    if "dim" in b:
        rank = len(b["self"].shape)
        params["labels"] = _reduced(rank, _axes(b["dim"], rank), b["keepdim"])
    _set(node, g.EXTREME, [b["self"]], **params)


@handles("linalg_vector_norm.default", "norm.ScalarOpt_dim", "std.correction", "std.dim", "var.correction", "var.dim",
         "logsumexp.default")  # fmt: skip
def _function(node: Node, b: Bound) -> None:
    rank = len(b["self"].shape)
    _set(node, g.FUNCTION, [b["self"]], labels=_reduced(rank, _axes(b["dim"], rank), b["keepdim"]))


@handles("mean.dim", "sum.dim_IntList")
def _mean(node: Node, b: Bound) -> None:
    rank = len(b["self"].shape)
    dims = _axes(b["dim"], rank)
    how = "mean" if "mean" in str(node.target) else "sum"
    labels = _reduced(rank, dims, b["keepdim"])
    _set(node, g.LINEAR_POOL, [b["self"]], how=how, dims=dims, keepdim=b["keepdim"], labels=labels)


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
    "_upsample_bilinear2d_aa.vec",
    "_upsample_bilinear2d_aa.default",
    "upsample_linear1d.vec",
    "upsample_linear1d.default",
    "adaptive_avg_pool3d.default",
    "avg_pool3d.default",
    "col2im.default",
    "cumsum.default",
)
def _other_pool(node: Node, b: Bound) -> None:
    _set(node, g.LINEAR_POOL, [_image(b)], how="vjp")


@handles("upsample_bicubic2d.vec", "upsample_bicubic2d.default", "_upsample_bicubic2d_aa.vec",
         "_upsample_bicubic2d_aa.default")  # fmt: skip
def _bicubic(node: Node, b: Bound) -> None:
    source = _image(b)
    _linear_map(node, source, Resampling(node, source))


# Movers: values change place, not size. `how` names the inverse.


@handles("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
         "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "view_as.default",
         "reshape_as.default")  # fmt: skip
def _reshape(node: Node, b: Bound) -> Node | None:
    source = b["self"]
    if node.shape == source.shape:
        return source  # type: ignore[no-any-return]
    if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        node.target = torch.ops.aten.reshape.default  # our tensors may have other strides than the model's
    _set(node, g.MOVE, [source], how="reshape")
    return None


@handles("permute.default", "transpose.int", "t.default", "swapaxes.default", "swapdims.default", "movedim.int",
         "movedim.intlist", "moveaxis.int", "moveaxis.intlist", "numpy_T.default", "mT.default")  # fmt: skip
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


@handles("cat.default", "concat.default", "concatenate.default", "stack.default")
def _cat(node: Node, b: Bound) -> None:
    parts = list(b["tensors"])
    how = "stack" if "stack" in str(node.target) else "cat"
    _set(node, g.MOVE, parts, how=how, dim=b["dim"] % len(node.shape))


@handles("unbind.int", "split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default",
         "tensor_split.sections")  # fmt: skip
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
    # Constant padding is no part of the images: its relevance goes. Reflected values are copies.
    _set(node, g.MOVE, [source], how="vjp", pads=b.get("mode", "constant") == "constant")
    return None


@handles("roll.default", "flip.default", "index_select.default", "repeat.default", "repeat_interleave.self_int",
         "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default", "upsample_nearest2d.vec",
         "upsample_nearest2d.default", "upsample_nearest1d.vec", "im2col.default", "diagonal.default", "unfold.default",
         "rot90.default", "reflection_pad1d.default", "reflection_pad2d.default", "replication_pad1d.default",
         "replication_pad2d.default")  # fmt: skip
def _linear_move(node: Node, b: Bound) -> None:
    source = _image(b)
    _set(node, g.MOVE, [source], how="vjp")


@handles("index.Tensor")
def _index(node: Node, b: Bound) -> None:
    for index in b["indices"]:
        _constant_only(index, "index.Tensor with an index")
    _set(node, g.MOVE, [b["self"]], how="vjp")


@handles("copy.default")
def _copy(node: Node, b: Bound) -> Node | None:
    """What is left of writing into a tensor, once that is spelled out: the new values."""
    source = b["src"]
    if source.constant:
        raise Unsupported("copy.default of constants into a tensor that depends on the images")
    if node.shape == source.shape:
        return source  # type: ignore[no-any-return]
    _call(node, torch.ops.aten.expand_as.default, source, b["self"])
    _set(node, g.MOVE, [source], how="expand")
    return None


@handles("slice_scatter.default")
def _slice_scatter(node: Node, b: Bound) -> Node | None:
    """Writing into a slice: what is before, the new values, what is behind."""
    whole, source = b["self"], b["src"]
    dim = b["dim"] % len(whole.shape)
    bounds = (b["start"], b["end"], b["step"])
    if node.shape == source.shape and b["step"] == 1:
        return source  # type: ignore[no-any-return]
    if any(isinstance(n, Node) for n in bounds) or b["step"] != 1 or not isinstance(whole.shape[dim], int):
        raise Unsupported("slice_scatter.default with steps or bounds that depend on the batch")
    length = whole.example[dim]
    start, end, _ = slice(b["start"], b["end"]).indices(length)
    pieces = []
    for first, last in ((0, start), (end, length)):
        like = Node("", "", node.target, shape=(*whole.shape[:dim], last - first, *whole.shape[dim + 1 :]),
                    example=(*whole.example[:dim], last - first, *whole.example[dim + 1 :]))  # fmt: skip
        piece = _split_off(node, f"from_{first}", torch.ops.aten.slice.Tensor, (whole, dim, first, last, 1), like)
        pieces.append(piece if last > first else None)
    before, behind = pieces
    parts = [n for n in (before, source, behind) if n is not None]
    _call(node, torch.ops.aten.cat.default, parts, dim)
    _set(node, g.MOVE, parts, how="cat", dim=dim, before=[n for n in (before, behind) if n is not None])
    return None


@handles("gather.default")
def _gather(node: Node, b: Bound) -> None:
    _constant_only(b["index"], "gather.default with an index")
    _set(node, g.MOVE, [b["self"]], how="vjp")


@handles("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(node: Node, b: Bound) -> None:
    _constant_only(b["mask"], f"{node.target} with a mask")
    _constant_only(b["value"], f"{node.target} with a value")
    _set(node, g.MOVE, [b["self"]], how="vjp", masks=True)


@handles("where.self", "where.ScalarOther", "where.ScalarSelf")
def _where(node: Node, b: Bound) -> None:
    _constant_only(b["condition"], f"{node.target} with a condition")
    variable = [n for n in (b["self"], b["other"]) if isinstance(n, Node) and not n.constant]
    if len(variable) != 1:
        raise Unsupported(f"{node.target} of two tensors that depend on the images")
    _set(node, g.MOVE, variable, how="vjp", masks=True)


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
