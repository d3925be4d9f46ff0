"""The vocabulary: which ATen operations are understood, and what they are in the rules' terms.

Each handler gets the new node and its arguments bound to the schema's names; it sets the node's kind,
operands and params. It returns another node where the operation does nothing at inference, and :class:`InSteps`
where other operations say the same: these are captured in its place.
``docs/rules.md`` documents the pull-back of every kind.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast.capture.batch_axes import EXAMPLE_BATCH
from ramp_fast.capture.linear_maps import Call, Resampling
from ramp_fast.graph import Node
from ramp_fast.params import Params, Window

Bound = dict[str, Any]
Handler = Callable[[Node, Bound], "Node | InSteps | None"]

VOCABULARY: dict[str, Handler] = {}


class Unsupported(Exception):
    """The operation, or this use of it, is outside the vocabulary."""


@dataclass(frozen=True)
class InSteps:
    """An operation is what ``function`` computes; nodes among the arguments stand for their tensors.

    ``pre_dispatch``: it is traced as the model was, and not taken apart as far as PyTorch goes.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Bound
    pre_dispatch: bool = True


def in_steps(function: Callable[..., Any], *args: Any, **kwargs: Any) -> InSteps:
    return InSteps(function, args, kwargs)


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
    node.kind, node.operands = kind, operands
    node.params = g.PARAMS.get(kind, Params)(**params)


def _constant_only(value: Any, what: str) -> None:
    if isinstance(value, Node) and not value.constant:
        raise Unsupported(f"{what} that depends on the images")


def _image(b: Bound) -> Node:
    """The first operand, whichever name the schema gives it."""
    source: Node = b["self"] if "self" in b else b["input"]
    return source


def _decided(value: Any) -> bool:
    """Whether a value of the images is made of comparisons and signs only: its slope is zero."""
    return isinstance(value, Node) and value.decided


def _fixed(value: Any) -> bool:
    """Whether a constant does not depend on the batch size either, as packed weights must not."""
    if not isinstance(value, Node) or value.kind == g.PARAM:
        return True
    return value.kind == g.CONST and all(_fixed(n) for n in value.references())


def _variable(value: Any) -> bool:
    return isinstance(value, Node) and not value.constant


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
def _linear(node: Node, b: Bound) -> InSteps | None:
    if not _fixed(b["weight"]) or not _fixed(b["bias"]):
        return in_steps(_product_and_sum, b["input"], b["weight"], b["bias"])
    if len(b["input"].shape) == 1:
        return in_steps(_linear_of_a_row, b["input"], b["weight"], b["bias"])
    _set(node, g.LINEAR, [b["input"]], weight=b["weight"], bias=b["bias"])
    return None


def _product_and_sum(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight.mT if weight.dim() > 1 else x @ weight
    return product if bias is None else product + bias


def _linear_of_a_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on a vector, as a model has it that takes the images of a batch one after the other."""
    return torch.nn.functional.linear(x.unsqueeze(0), weight, bias).squeeze(0)


@handles("addmm.default")
def _addmm(node: Node, b: Bound) -> InSteps | None:
    plain = b["beta"] == b["alpha"] == 1 and len(b["self"].shape) == 1
    if not (plain and _fixed(b["mat2"]) and _fixed(b["self"])):
        return in_steps(_scaled_sum, b["self"], b["mat1"], b["mat2"], b["beta"], b["alpha"])
    _set(node, g.LINEAR, [b["mat1"]], weight=b["mat2"], bias=b["self"], transposed=True)
    return None


@handles("baddbmm.default", "addmv.default")
def _baddbmm(node: Node, b: Bound) -> InSteps:
    _, first, second = (n for n in b.values() if isinstance(n, Node))
    return in_steps(_scaled_sum, b["self"], first, second, b["beta"], b["alpha"])


def _scaled_sum(added: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    product = a @ b if alpha == 1 else (a @ b) * alpha
    if beta == 0:
        return product
    return product + (added if beta == 1 else added * beta)


@handles("conv1d.default", "conv2d.default", "conv3d.default", "conv2d.padding", "conv1d.padding")
def _conv(node: Node, b: Bound) -> InSteps | None:
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
            sides = [side for r in reversed(reach) for side in (r // 2, r - r // 2)]  # the larger half behind
            weights = (b["weight"], b["bias"])
            return in_steps(_padded, b["input"], sides, node.target, *weights, b["stride"], dilation, b["groups"])
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
    return None


def _padded(x: Tensor, sides: list[int], convolution: Any, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """'same' padding that is not symmetric: zeros first."""
    stride, dilation, groups = how
    result: Tensor = convolution(F.pad(x, sides), weight, bias, stride, "valid", dilation, groups)
    return result


@handles("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(node: Node, b: Bound) -> None:
    _constant_only(b["weight"], f"{node.target} with a weight")
    _linear_map(node, b["input"], Call(node, b["input"]))


@handles("convolution.default")
def _convolution(node: Node, b: Bound) -> Node | InSteps | None:
    """What convolutions are in a program whose operations PyTorch has decomposed: ``run_decompositions()``."""
    dims = len(b["weight"].shape) - 2
    names = ("input", "weight", "bias", "stride", "padding")
    if b["transposed"]:
        overload = "default" if dims == 1 else "input"
        target = getattr(getattr(torch.ops.aten, f"conv_transpose{dims}d"), overload)
        _call(node, target, *(b[k] for k in (*names, "output_padding", "groups", "dilation")))
        _conv_transpose(node, b)
        return None
    _call(node, getattr(torch.ops.aten, f"conv{dims}d").default, *(b[k] for k in (*names, "dilation", "groups")))
    return _conv(node, b)


@handles("batch_norm.default")
def _batch_norm(node: Node, b: Bound) -> None:
    if b["training"]:
        raise Unsupported(
            "batch_norm.default with the batch's own statistics, which mix the samples (use track_running_stats=True)"
        )
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
        0.0,
        b["eps"],
        False,
    )


@handles("_native_batch_norm_legit.no_stats")
def _batch_of_one_norm(node: Node, b: Bound) -> InSteps:
    """An InstanceNorm, decomposed: of ``[1, images * channels, ...]``, with weights for each image's channels."""
    moved = b["input"]
    source = moved.operands[0] if moved.kind == g.REARRANGE and moved.params.how == "reshape" else moved
    weight, bias = (_before_repeat(b[k]) for k in ("weight", "bias"))
    if moved.shape[0] != 1 or source is moved or not isinstance(source.shape[1], int):
        raise Unsupported(
            "batch_norm with the batch's own statistics, which mix the samples (use track_running_stats=True)"
        )

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor]:
        normed = F.group_norm(x, x.shape[1], weight, bias, b["eps"])
        return (normed.reshape(1, -1, *x.shape[2:]),)

    return in_steps(norm, source, weight, bias)


def _before_repeat(constant: Any) -> Any:
    """A constant that is repeated for every image."""
    repeats = isinstance(constant, Node) and constant.target is torch.ops.aten.repeat.default
    return constant.args[0] if repeats else constant


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
        _native_batch_norm(node, b)
        return
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
    "clamp_min.Tensor",
    "clamp_max.Tensor",
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
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "exp2.default",
    "log2.default",
    "log10.default",
    "erfc.default",
    "tan.default",
    "asin.default",
    "acos.default",
    "sinc.default",
    "logit.default",
    "special_ndtr.default",
    "special_log_ndtr.default",
    "special_erfcx.default",
    "special_entr.default",
)


def _activation(how: str) -> Handler:
    def handler(node: Node, b: Bound) -> InSteps | None:
        name = str(node.target).removeprefix("aten.").split(".")[0]
        variable = [v for v in b.values() if _variable(v)]
        (source, *others) = variable
        if name.startswith("clamp") and "Tensor" in str(node.target):
            # the larger of two, and the smaller: choices, as torch.maximum and torch.minimum are
            return in_steps(_clamped, b["self"], b.get("min"), b.get("max"))
        if others or source.shape != node.shape:
            raise Unsupported(f"{node.target.__name__} of several tensors that depend on the images, or broadcast")
        lowest, highest = b.get("min_val", b.get("min")), b.get("max_val", b.get("max"))
        cut_at_zero = name in ("hardtanh", "clamp", "clamp_min") and lowest == 0
        if how == "relu" or (cut_at_zero and not isinstance(highest, Node)):
            # nn.ReLU6 and x.clamp(min=0) are what relu6 and relu are
            cap = 6.0 if name == "relu6" else math.inf if highest is None else float(highest)
            _set(node, g.ACTIVATION, [source], how="relu", function="relu", cap=cap)
            return None
        _set(node, g.ACTIVATION, [source], how=how, function=name)
        return None

    return handler


def _clamped(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


for _name in _RELU_LIKE:
    VOCABULARY[_name] = _activation("relu")
for _name in _SMOOTH:
    VOCABULARY[_name] = _activation("smooth")


@handles("prelu.default")
def _prelu(node: Node, b: Bound) -> None:
    _constant_only(b["weight"], "prelu.default with a slope")
    _set(node, g.ACTIVATION, [b["self"]], how="smooth", function="prelu")


@handles("rrelu.default")
def _rrelu(node: Node, b: Bound) -> InSteps:
    if b["training"]:
        raise Unsupported("rrelu.default in training mode, which draws random slopes")
    return in_steps(F.leaky_relu, b["self"], (b["lower"] + b["upper"]) / 2)


@handles("nan_to_num.default")
def _nan_to_num(node: Node, b: Bound) -> None:
    _set(node, g.REARRANGE, [b["self"]], how="reshape")  # finite values stay what they are


@handles("glu.default")
def _glu(node: Node, b: Bound) -> InSteps:
    def gated(x: Tensor, dim: int) -> Tensor:
        value, gate = x.chunk(2, dim)
        return value * gate.sigmoid()

    return in_steps(gated, b["self"], b["dim"])


# Choices between values, and what is decided by values


@handles("maximum.default", "minimum.default", "fmax.default", "fmin.default")
def _larger(node: Node, b: Bound) -> None:
    _set(node, g.CHOICE, [b["self"], b["other"]])


@handles("max.other", "min.other")
def _larger_of_two(node: Node, b: Bound) -> InSteps:
    return in_steps(torch.maximum if str(node.target).startswith("aten.max") else torch.minimum, b["self"], b["other"])


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_LOGICAL = ("logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_not", "sign", "sgn", "signbit",
            "isnan", "isinf", "isfinite")  # fmt: skip


@handles(*(f"{n}.{kind}" for n in _COMPARISONS for kind in ("Scalar", "Tensor")), *(f"{n}.default" for n in _LOGICAL),
         *(f"bitwise_{n}.Tensor" for n in ("and", "or", "xor")))  # fmt: skip
def _decision(node: Node, b: Bound) -> None:
    _set(node, g.DECISION, [v for v in b.values() if _variable(v)])


@handles("any.dim", "any.dims", "all.dim", "all.dims")
def _any(node: Node, b: Bound) -> None:
    rank = len(b["self"].shape)
    _set(node, g.DECISION, [b["self"]], labels=_reduced(rank, _axes(b["dim"], rank), b["keepdim"]))


# Sums and products


def _pair(node: Node, a: Any, b: Any) -> tuple[Any, Any]:
    if any(isinstance(n, Node) and n.kind == g.INT for n in (a, b)):
        raise Unsupported(f"{node.target} of a tensor and a size")
    return a, b


@handles("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def _add(node: Node, b: Bound) -> InSteps | None:
    first, second = _pair(node, b["self"], b["other"])
    name = str(node.target)
    if b["alpha"] != 1:
        if "rsub" in name:
            return in_steps(lambda u, v, alpha: v - u * alpha, first, second, b["alpha"])
        sign = -1 if "sub" in name else 1
        return in_steps(lambda u, v, alpha: u + v * alpha if sign > 0 else u - v * alpha, first, second, b["alpha"])
    signs = (-1, 1) if "rsub" in name else (1, -1) if "sub" in name else (1, 1)
    dim = _shift_axis(first, second) if signs == (1, -1) else None
    if dim is not None:
        _call(node, torch.ops.aten.log_softmax.int, first, dim)
        _set(node, g.SHIFT, [first], dim=dim)
        return None
    _set(node, g.ADD, [n for n in (first, second) if isinstance(n, Node)], first=first, second=second, signs=signs)
    return None


def _shift_axis(x: Any, total: Any) -> int | None:
    """The axis of a log_softmax written out, ``x - x.logsumexp(dim, keepdim=True)``; None of anything else."""
    if not (_variable(x) and _variable(total)):
        return None
    shape = total.example
    if total.kind == g.REARRANGE and total.params.how == "reshape":  # an axis that was left out is put back
        total = total.operands[0]
    if total.kind != g.REDUCTION or total.target is not torch.ops.aten.logsumexp.default or total.operands[0] is not x:
        return None
    dims = _axes(total.args[1], len(x.example))
    kept = tuple(1 if d in dims else n for d, n in enumerate(x.example))
    return dims[0] if len(dims) == 1 and shape == kept else None


@handles("mul.Tensor", "mul.Scalar")
def _mul(node: Node, b: Bound) -> None:
    first, second = _pair(node, b["self"], b["other"])
    if isinstance(second, Node) and not second.constant:
        if isinstance(first, Node) and not first.constant:
            if _is_statistic(first):
                first, second = second, first
            if _is_statistic(second):
                # A written-out norm: the factor is a statistic, detached as a denominator is.
                _set(node, g.DIV, [first], denominator=second, inverse=True, number=second.decided)
                return
            _set(node, g.MUL, [first, second])
            return
        first, second = second, first
    _set(node, g.SCALE, [first], factor=second, inverse=False)


def _is_statistic(node: Node) -> bool:
    """Whether a factor is no value of its own: the inverse of a norm, or a mask that the images decide.

    Numbers and weights that it was multiplied by before, limits and powers do not make it one.
    """
    if node.decided:
        return True
    if node.kind in (g.SCALE, g.DIV) or (node.kind == g.REARRANGE and len(node.operands) == 1):
        return _is_statistic(node.operands[0])
    if node.kind != g.ACTIVATION:
        return False
    function = node.params.function
    power = node.args[1] if function == "pow" else 0
    if function in ("rsqrt", "reciprocal") or (isinstance(power, (int, float)) and power < 0):
        return True
    return function in ("sqrt", "square", "pow", "abs", "clamp", "clamp_min", "clamp_max") and _is_statistic(
        node.operands[0]
    )


@handles("addcmul.default", "addcdiv.default")
def _addcmul(node: Node, b: Bound) -> InSteps:
    def summed(added: Tensor, first: Tensor, second: Tensor, value: float) -> Tensor:
        product = first * second if "addcmul" in str(node.target) else first / second
        return added + (product if value == 1 else product * value)

    return in_steps(summed, b["self"], b["tensor1"], b["tensor2"], b["value"])


@handles("lerp.Scalar", "lerp.Tensor")
def _lerp(node: Node, b: Bound) -> InSteps:
    return in_steps(lambda start, end, weight: start * (1 - weight) + end * weight, b["self"], b["end"], b["weight"])


@handles("logaddexp.default")
def _logaddexp(node: Node, b: Bound) -> InSteps:
    def summed(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack(torch.broadcast_tensors(first, second), -1).logsumexp(-1)

    return in_steps(summed, b["self"], b["other"])


@handles("div.Tensor", "div.Scalar")
def _div(node: Node, b: Bound) -> InSteps | None:
    first, second = _pair(node, b["self"], b["other"])
    if isinstance(second, Node) and not second.constant:
        if not isinstance(first, Node) or first.constant:
            return in_steps(lambda x, y: y.reciprocal() * x, first, second)
        # A denominator is a statistic, as in normalisation layers: it is detached.
        _set(node, g.DIV, [first], denominator=second, inverse=False, number=second.decided)
        return None
    _set(node, g.SCALE, [first], factor=second, inverse=True)
    return None


@handles("neg.default")
def _neg(node: Node, b: Bound) -> None:
    _set(node, g.SCALE, [b["self"]], factor=-1.0, inverse=False)


@handles("matmul.default", "bmm.default", "mm.default", "mv.default", "dot.default")
def _matmul(node: Node, b: Bound) -> InSteps | None:
    first, second = b["self"], next(b[k] for k in ("other", "mat2", "vec", "tensor") if k in b)
    if len(first.shape) == 1 or len(second.shape) == 1:
        return in_steps(_product_of_vectors, first, second)
    if second.constant:
        if len(second.shape) == 2 and _fixed(second):
            _set(node, g.LINEAR, [first], weight=second, bias=None, transposed=True)
        else:
            _linear_map(node, first, Call(node, first))
    elif first.constant:
        if len(first.shape) == 2 <= len(second.shape) and _fixed(first):
            return in_steps(lambda a, b: (b.mT @ a.mT).mT, first, second)
        _linear_map(node, second, Call(node, second))
    else:
        _set(node, g.MATMUL, [first, second])
    return None


def _product_of_vectors(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 1:
        return (a.unsqueeze(0) @ (b.unsqueeze(-1) if b.dim() == 1 else b)).squeeze(-2)
    return (a @ b.unsqueeze(-1)).squeeze(-1)


@handles("einsum.default")
def _einsum(node: Node, b: Bound) -> None:
    """A product of two tensors, or a linear map of one."""
    tensors = list(b["tensors"])
    terms, result = _spelled_out(b["equation"], [len(n.shape) for n in tensors])
    if any(len(set(term)) != len(term) for term in terms):
        raise Unsupported(f"einsum.default {b['equation']!r}, which takes a diagonal (use torch.diagonal)")
    _call(node, torch.ops.aten.einsum.default, f"{','.join(terms)}->{result}", tensors)
    variable = [i for i, n in enumerate(tensors) if not n.constant]
    labels = [list(terms[i]) for i in variable]
    if len(variable) == 1:
        source = tensors[variable[0]]
        _linear_map(node, source, Call(node, source), labels=(labels, list(result)))
    elif len(variable) == 2:
        _set(node, g.BILINEAR, [tensors[i] for i in variable], labels=(labels, list(result)))
    else:
        raise Unsupported(
            f"einsum.default of {len(variable)} tensors that depend on the images (multiply two at a time)"
        )


def _spelled_out(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Terms and result of an equation of einsum, its ellipsis as letters and its result said."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    lengths = [rank - len(t.replace("...", "")) if "..." in t else 0 for t, rank in zip(terms, ranks, strict=True)]
    if max(lengths) > len(free):
        raise Unsupported(f"einsum.default {equation!r}: too many axes")
    shared = "".join(free[: max(lengths)])
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        result = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms = [t.replace("...", shared[len(shared) - n :]) for t, n in zip(terms, lengths, strict=True)]
    return terms, result.replace("...", shared)


@handles("bilinear.default")
def _bilinear(node: Node, b: Bound) -> InSteps | None:
    first, second = b["input1"], b["input2"]
    _constant_only(b["weight"], "bilinear.default with a weight")
    _constant_only(b["bias"], "bilinear.default with a bias")
    variable = [n for n in (first, second) if not n.constant]
    if len(variable) == 1:
        return in_steps(_bilinear_form, first, second, b["weight"], b["bias"])
    lead = [str(i) for i in range(len(first.shape) - 1)]
    labels = [[*lead, "i"], [*lead, "j"]], [*lead, "k"]
    _set(node, g.BILINEAR, variable, labels=labels)
    return None


def _bilinear_form(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result = torch.einsum("...i,kij,...j->...k", first, weight, second)
    return result if bias is None else result + bias


@handles("log_softmax.int", "_log_softmax.default")
def _log_softmax(node: Node, b: Bound) -> None:
    _set(node, g.SHIFT, [b["self"]], dim=b["dim"])


@handles("softmax.int", "_softmax.default")
def _softmax(node: Node, b: Bound) -> None:
    _set(node, g.SOFTMAX, [b["self"]], dim=b["dim"])


@handles("scaled_dot_product_attention.default")
def _attention(node: Node, b: Bound) -> InSteps | None:
    if b["dropout_p"]:
        raise Unsupported("scaled_dot_product_attention.default with dropout at inference")
    q, k, v = b["query"], b["key"], b["value"]
    rank = len(q.shape)
    if rank < 3 or not rank == len(k.shape) == len(v.shape):
        raise Unsupported("scaled_dot_product_attention.default on tensors of different ranks")
    if b["enable_gqa"] and rank != 4:
        raise Unsupported(f"scaled_dot_product_attention.default, grouped, on {rank}-dimensional tensors")
    if isinstance(b["attn_mask"], Node) and not b["attn_mask"].constant:
        if b["is_causal"] or b["enable_gqa"]:
            raise Unsupported("scaled_dot_product_attention.default, causal or grouped, with a mask from the images")
        return in_steps(_attention_with_bias, q, k, v, b["attn_mask"], b["scale"] or 1 / math.sqrt(int(q.shape[-1])))
    _set(
        node,
        g.ATTENTION,
        [q, k, v],
        mask=b["attn_mask"],
        causal=bool(b["is_causal"]),
        scale=b["scale"] if b["scale"] is not None else 1 / math.sqrt(int(q.shape[-1])),
        grouped=bool(b["enable_gqa"]),
    )
    return None


def _attention_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention with scores that are biased, or masked, by something the images decide (relative positions)."""
    scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1) @ v


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


@handles("max_pool1d.default", "max_pool1d_with_indices.default", "max_pool3d.default",
         "max_pool3d_with_indices.default", "adaptive_max_pool1d.default", "adaptive_max_pool2d.default",
         "adaptive_max_pool3d.default", "amax.default", "amin.default", "max.dim", "min.dim")  # fmt: skip
def _extreme(node: Node, b: Bound) -> None:
    labels = None
    if "dim" in b:
        rank = len(b["self"].shape)
        labels = _reduced(rank, _axes(b["dim"], rank), b["keepdim"])
    _set(node, g.MAX_REDUCTION, [b["self"]], labels=labels)


@handles("linalg_vector_norm.default", "norm.ScalarOpt_dim", "std.correction", "std.dim", "var.correction", "var.dim",
         "logsumexp.default")  # fmt: skip
def _function(node: Node, b: Bound) -> None:
    rank = len(b["self"].shape)
    _set(node, g.REDUCTION, [b["self"]], labels=_reduced(rank, _axes(b["dim"], rank), b["keepdim"]))


@handles("std_mean.correction", "var_mean.correction", "std_mean.dim", "var_mean.dim")
def _spread_and_mean(node: Node, b: Bound) -> InSteps:
    spread = torch.std if "std" in str(node.target) else torch.var
    given = b["correction"] if "correction" in b else int(b["unbiased"])
    correction = 1 if given is None else given

    def both(x: Tensor, dim: Any, keepdim: bool) -> tuple[Tensor, Tensor]:
        return spread(x, dim, correction=correction, keepdim=keepdim), x.mean(dim, keepdim)

    return in_steps(both, b["self"], b["dim"], b["keepdim"])


@handles("mean.dim", "sum.dim_IntList")
def _mean(node: Node, b: Bound) -> None:
    rank = len(b["self"].shape)
    dims = _axes(b["dim"], rank)
    how = "mean" if "mean" in str(node.target) else "sum"
    labels = _reduced(rank, dims, b["keepdim"])
    _set(node, g.LINEAR_POOL, [b["self"]], how=how, dims=dims, keepdim=b["keepdim"], labels=labels)


@handles("adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default", "_adaptive_avg_pool2d.default")
def _adaptive_pool(node: Node, b: Bound) -> None:
    size = b["output_size"]
    source = b["self"]
    if node.target is torch.ops.aten._adaptive_avg_pool2d.default:
        _call(node, torch.ops.aten.adaptive_avg_pool2d.default, source, size)
    if all(s == 1 for s in size):
        dims = list(range(len(source.shape) - len(size), len(source.shape)))
        _set(node, g.LINEAR_POOL, [source], how="mean", dims=dims, keepdim=True)
    else:
        _set(node, g.LINEAR_POOL, [source], how="vjp")


@handles("avg_pool2d.default")
def _average_pool(node: Node, b: Bound) -> None:
    source = _image(b)

    def pair(value: list[int]) -> tuple[int, int]:
        return value[0], value[-1]

    size, padding = pair(b["kernel_size"]), pair(b["padding"])
    stride = pair(b["stride"]) if b["stride"] else size
    window = Window(size, stride, padding, b["count_include_pad"])
    # With ceil_mode the last windows may reach beyond the padding, which is never counted.
    axes = zip(source.example[-2:], node.example[-2:], size, stride, padding, strict=True)
    inside = len(source.example) == 4 and all((m - 1) * s + k <= n + 2 * pad for n, m, k, s, pad in axes)
    usual = inside and b["divisor_override"] is None
    _set(node, g.LINEAR_POOL, [source], how="vjp", window=window if usual else None)


@handles(
    "avg_pool1d.default",
    "upsample_bilinear2d.vec",
    "upsample_bilinear2d.default",
    "_upsample_bilinear2d_aa.vec",
    "_upsample_bilinear2d_aa.default",
    "upsample_linear1d.vec",
    "upsample_linear1d.default",
    "upsample_trilinear3d.vec",
    "upsample_trilinear3d.default",
    "adaptive_avg_pool3d.default",
    "_adaptive_avg_pool3d.default",
    "avg_pool3d.default",
    "col2im.default",
    "cumsum.default",
)
def _other_pool(node: Node, b: Bound) -> None:
    _set(node, g.LINEAR_POOL, [_image(b)], how="vjp")


@handles("grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default")
def _grid_sampler(node: Node, b: Bound) -> None:
    _constant_only(b["grid"], f"{node.target.__name__} with a grid")
    _set(node, g.LINEAR_POOL, [b["input"]], how="vjp")


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
    if "squeeze" in str(node.target) and "unsqueeze" not in str(node.target):
        # Axes of one entry at capture: a batch that happens to be one image is no such axis.
        named = _axes(b.get("dim"), len(source.shape))
        _call(node, torch.ops.aten.squeeze.dims, source, [d for d in named if source.shape[d] == 1])
    _set(node, g.REARRANGE, [source], how="reshape")
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
    _set(node, g.REARRANGE, [source], how="permute", dims=[s - 2 for s in moved.shape])


@handles("slice.Tensor")
def _slice(node: Node, b: Bound) -> Node | InSteps | None:
    source = b["self"]
    if node.shape == source.shape and b["step"] == 1:
        return source  # type: ignore[no-any-return]
    dim = b["dim"] % len(source.shape)
    start, end, step = bounds = [_number(b[k]) for k in ("start", "end", "step")]
    if any(isinstance(bound, Node) for bound in bounds):
        return _slice_of_batches(source, dim, lambda n: slice(*(_size_at(bound, n) for bound in bounds)))
    _set(node, g.REARRANGE, [source], how="slice", dim=dim, start=start, end=end, step=step)
    return None


@handles("narrow.default")
def _narrow(node: Node, b: Bound) -> Node | InSteps | None:
    source, start, length = b["self"], _number(b["start"]), _number(b["length"])
    dim = b["dim"] % len(source.shape)
    if isinstance(start, Node) or isinstance(length, Node):
        first, entries = (partial(_size_at, size) for size in (start, length))
        return _slice_of_batches(source, dim, lambda n: slice(first(n), first(n) + entries(n)))
    _set(node, g.REARRANGE, [source], how="slice", dim=dim, start=start, end=start + length, step=1)
    return None


def _slice_of_batches(source: Node, dim: int, bounds: Callable[[int], slice]) -> Node | InSteps:
    """``both[:len(x)]`` of ``both = torch.cat([x, x.flip(-1)])``: some of the batches that lie one behind the other.

    ``bounds`` gives the slice for so many images.
    """
    count = _batches_in(source.shape[dim])
    parts = set()
    for images in (EXAMPLE_BATCH, EXAMPLE_BATCH + 1):
        entries = range(count * images)[bounds(images)]
        if not entries or entries.step != 1 or entries.start % images or entries.stop % images:
            raise Unsupported("a slice whose bounds depend on the batch, and which takes some images of it only")
        parts.add((entries.start // images, entries.stop // images))
    if len(parts) > 1:
        raise Unsupported("a slice whose bounds depend on the batch, and not in proportion")
    ((first, behind),) = parts
    if (first, behind) == (0, count):
        return source

    def part(x: Tensor) -> Tensor:
        batches: Tensor = x.unflatten(dim, (count, -1))
        return batches.narrow(dim, first, behind - first).flatten(dim, dim + 1)

    return in_steps(part, source)


def _batches_in(size: int | str) -> int:
    """How many batches an axis is long; 0 where that is no whole number of them."""
    each, _, rest = ("1*batch" if size == "batch" else str(size)).partition("*")
    return int(each) if rest == "batch" and each.isdecimal() else 0


def _number(size: Any) -> Any:
    """A size of the graph as a number, where it is the same for any number of images."""
    return size.params.more if isinstance(size, Node) and size.example[0] == size.params.more else size


def _size_at(size: Any, images: int) -> Any:
    """A number, or a size of the graph for so many images."""
    if not isinstance(size, Node):
        return size
    return size.example[0] if images == EXAMPLE_BATCH else size.params.more


@handles("select.int")
def _select(node: Node, b: Bound) -> None:
    source = b["self"]
    dim = b["dim"] % len(source.shape)
    if source.shape[dim] == 1:
        _set(node, g.REARRANGE, [source], how="reshape")
    else:
        _set(node, g.REARRANGE, [source], how="select", dim=dim, index=b["index"])


@handles("cat.default", "concat.default", "concatenate.default", "stack.default")
def _cat(node: Node, b: Bound) -> None:
    parts = list(b["tensors"])
    how = "stack" if "stack" in str(node.target) else "cat"
    _set(node, g.REARRANGE, parts, how=how, dim=b["dim"] % len(node.shape))


@handles("unbind.int", "split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default",
         "tensor_split.sections", "tensor_split.indices", "unsafe_split.Tensor", "unsafe_chunk.default",
         "unsafe_split_with_sizes.default")  # fmt: skip
def _parts(node: Node, b: Bound) -> None:
    source = b["self"]
    how = "unbind" if "unbind" in str(node.target) else "split"
    _set(node, g.SPLIT, [source], how=how, dim=b["dim"] % len(source.shape))


@handles("expand.default", "expand_as.default")
def _expand(node: Node, b: Bound) -> Node | None:
    source = b["self"]
    if node.shape == source.shape:
        return source  # type: ignore[no-any-return]
    _set(node, g.REARRANGE, [source], how="expand")
    return None


@handles("constant_pad_nd.default", "pad.default")
def _pad(node: Node, b: Bound) -> Node | None:
    source = b["self"]
    if not any(p if isinstance(p, int) else True for p in b["pad"]):
        return source  # type: ignore[no-any-return]
    # Constant padding is no part of the images: its relevance goes. Reflected values are copies.
    _set(node, g.REARRANGE, [source], how="vjp", pads=b.get("mode", "constant") == "constant")
    return None


@handles("roll.default", "flip.default", "index_select.default", "repeat.default", "repeat_interleave.self_int",
         "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default", "upsample_nearest2d.vec",
         "upsample_nearest2d.default", "upsample_nearest1d.vec", "upsample_nearest1d.default", "upsample_nearest3d.vec",
         "upsample_nearest3d.default", *(f"_upsample_nearest_exact{n}d.{kind}" for n in (1, 2, 3)
         for kind in ("vec", "default")), "im2col.default", "diagonal.default", "unfold.default",
         "rot90.default", "reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default",
         "replication_pad1d.default", "replication_pad2d.default", "replication_pad3d.default")  # fmt: skip
def _linear_move(node: Node, b: Bound) -> None:
    source = _image(b)
    _set(node, g.REARRANGE, [source], how="vjp")


@handles("index.Tensor")
def _index(node: Node, b: Bound) -> None:
    for index in b["indices"]:
        _constant_only(index, "index.Tensor with an index")
    _set(node, g.REARRANGE, [b["self"]], how="vjp")


@handles("copy.default")
def _copy(node: Node, b: Bound) -> Node | None:
    """What is left of writing into a tensor, once that is spelled out: the new values."""
    source = b["src"]
    if node.shape == source.shape:
        return source  # type: ignore[no-any-return]
    _call(node, torch.ops.aten.expand_as.default, source, b["self"])
    _set(node, g.REARRANGE, [source], how="expand")
    return None


@handles("slice_scatter.default")
def _slice_scatter(node: Node, b: Bound) -> Node | InSteps:
    whole, source = b["self"], b["src"]
    dim = b["dim"] % len(whole.shape)
    if node.shape == source.shape and b["step"] == 1:
        return source  # type: ignore[no-any-return]
    if any(isinstance(b[k], Node) for k in ("start", "end", "step")) or not isinstance(whole.shape[dim], int):
        raise Unsupported("slice_scatter.default with bounds that depend on the batch")
    places = range(whole.example[dim])[slice(b["start"], b["end"], b["step"])]
    return in_steps(_written, whole, source, dim, places)


@handles("select_scatter.default")
def _select_scatter(node: Node, b: Bound) -> InSteps:
    whole, dim = b["self"], b["dim"] % len(b["self"].shape)
    if isinstance(b["index"], Node) or not isinstance(whole.shape[dim], int):
        raise Unsupported("select_scatter.default with an index that depends on the batch")
    index = b["index"] % whole.example[dim]
    return in_steps(lambda x, new: _written(x, new.unsqueeze(dim), dim, range(index, index + 1)), whole, b["src"])


def _written(whole: Tensor, new: Tensor, dim: int, places: Sequence[int]) -> Tensor:
    """``whole`` with ``new`` at ``places`` along ``dim``: parts of both, joined."""
    length = whole.shape[dim]
    if list(places) == list(range(places[0], places[-1] + 1)):
        pieces = [whole.narrow(dim, 0, places[0]), new, whole.narrow(dim, places[-1] + 1, length - places[-1] - 1)]
        return torch.cat([p for p in pieces if p.shape[dim]], dim)
    index = list(range(length))
    for i, place in enumerate(places):
        index[place] = length + i
    return torch.cat([whole, new], dim).index_select(dim, torch.tensor(index, device=whole.device))


@handles("index_put.default")
def _index_put(node: Node, b: Bound) -> InSteps:
    whole, values = b["self"], b["values"]
    used = [(i, n) for i, n in enumerate(b["indices"]) if n is not None]
    ((dim, index), *others) = used
    if others or b["accumulate"]:
        raise Unsupported("index_put.default along several axes, or accumulating (use torch.where)")
    rank = len(values.shape)
    if _boolean(index) and dim == 0 and all(s == 1 for s in values.shape):
        return in_steps(_filled_where, whole, index, values)
    places = _places(index, whole, dim)
    if rank > len(whole.shape):
        raise Unsupported("index_put.default with values of more axes than the tensor")

    def put(x: Tensor, new: Tensor) -> Tensor:
        shape = [*x.shape[:dim], len(places), *x.shape[dim + 1 :]]
        return _written(x, new.expand(shape), dim, places)

    return in_steps(put, whole, values)


@handles("index_fill.int_Scalar", "index_fill.int_Tensor")
def _index_fill(node: Node, b: Bound) -> InSteps:
    whole, dim = b["self"], b["dim"] % len(b["self"].shape)
    places = _places(b["index"], whole, dim)

    def fill(x: Tensor, value: Any) -> Tensor:
        return _written(x, torch.full_like(x.narrow(dim, 0, len(places)), value), dim, places)

    return in_steps(fill, whole, b["value"])


def _places(index: Any, whole: Node, dim: int) -> list[int]:
    """The entries of a constant index along ``dim``."""
    if not (isinstance(index, Node) and _fixed(index)) or not isinstance(whole.shape[dim], int):
        raise Unsupported("writing to places that depend on the images or the batch (use torch.where)")
    places: list[int] = (_evaluated(index).reshape(-1) % whole.example[dim]).tolist()
    if _boolean(index) or len(index.shape) > 1 or len(set(places)) != len(places):
        raise Unsupported("writing to one place twice, or along several axes (use torch.where)")
    return places


def _evaluated(node: Node) -> Any:
    if node.kind == g.PARAM:
        node.params.read |= node.params.floating  # other numbers would have given another graph
        return node.params.tensor
    return node.target(*g.map_nodes(_evaluated, node.args), **g.map_nodes(_evaluated, node.kwargs))


def _boolean(node: Any) -> bool:
    return isinstance(node, Node) and node.dtype == torch.bool


def _filled_where(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())), value.view([]), x)


@handles("gather.default")
def _gather(node: Node, b: Bound) -> None:
    _constant_only(b["index"], "gather.default with an index")
    _set(node, g.REARRANGE, [b["self"]], how="vjp")


@handles("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(node: Node, b: Bound) -> InSteps | None:
    if _variable(b["value"]) or b["self"].constant:
        return in_steps(lambda x, mask, value: torch.where(mask, value, x), b["self"], b["mask"], b["value"])
    _call(node, node.target, b["self"], b["mask"], _in_range(b["value"]))
    _set(node, g.REARRANGE, [b["self"]], how="vjp", masks=True)
    return None


@handles("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(node: Node, b: Bound) -> None:
    first, second = _in_range(b["self"]), _in_range(b["other"])
    _call(node, node.target, b["condition"], first, second)
    variable = [n for n in (first, second) if _variable(n)]
    if len(variable) == 2:
        _set(node, g.CHOICE, variable)
    elif variable:
        _set(node, g.REARRANGE, variable, how="vjp", masks=True)
    else:
        _set(node, g.DECISION, [b["condition"]])


def _in_range(value: Any) -> Any:
    """A number that fills, where bfloat16 can hold it: masks are the lowest numbers of wider dtypes."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return value
    largest = torch.finfo(torch.bfloat16).max
    return max(-largest, min(largest, value))


# Nothing happens at inference


@handles("dropout.default", "dropout_.default", "feature_dropout.default", "alpha_dropout.default",
         "feature_alpha_dropout.default", "native_dropout.default")  # fmt: skip
def _dropout(node: Node, b: Bound) -> Node:
    if b["train"] and b["p"]:
        raise Unsupported(f"{node.target} in training mode")
    return b["input"]  # type: ignore[no-any-return]


@handles("contiguous.default", "clone.default", "alias.default", "detach.default", "lift_fresh_copy.default",
         "lift_fresh.default", "detach_.default", "type_as.default", "to.dtype", "to.dtype_layout", "_to_copy.default",
         "to.device", "to.other", "float.default", "view.dtype")  # fmt: skip
def _same(node: Node, b: Bound) -> Node | None:
    # Casts between floating dtypes are dropped: the engine's precision decides the dtype.
    source: Node = b["self"]
    dtype = b.get("dtype")
    if isinstance(dtype, torch.dtype) and (source.decided or dtype == torch.bool):
        _set(node, g.DECISION, [source])
        return None
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        why = "there is no rule for complex numbers" if dtype.is_complex else "whole numbers have no slope"
        raise Unsupported(f"{node.target} to {dtype} ({why})")
    if "view" in str(node.target):
        raise Unsupported(str(node.target))
    return source


# Operations that no rule can be given, or none that is worth it, with what to do instead

_REASONS = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "recurrent layers have no rule over time"),
    **dict.fromkeys(("sort", "topk", "argsort", "kthvalue", "median", "mode"),
                    "choosing by rank has no rule; capture a model that keeps every token"),
    **dict.fromkeys(("cumprod", "cummax", "cummin", "prod"), "products over an axis have no rule"),
    **dict.fromkeys(("cdist", "pairwise_distance"), "distances have no rule; write them with products and sums"),
    **dict.fromkeys(("floor", "ceil", "round", "trunc", "fix", "frac"), "rounding has no slope"),
}  # fmt: skip


def composite(node: Node) -> InSteps:
    """What PyTorch itself composes of other operations: aliases, ``cosine_similarity``, ``hsplit``."""
    name = _name_of(node.target)
    reason = _REASONS.get(name.split(".")[0])
    if reason is not None:
        raise Unsupported(f"{name} ({reason})")
    target: Any = node.target
    composed = isinstance(target, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )
    if not composed:
        raise Unsupported(name)
    return InSteps(target, node.args, node.kwargs, pre_dispatch=False)


def _name_of(target: Any) -> str:
    return str(target).removeprefix("aten.") if isinstance(target, torch._ops.OpOverload) else target.__name__
