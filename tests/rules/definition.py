"""absLRP by its definition, in relevance form and float64: what the engine's coefficients are tested against.

:func:`explain` runs a module on a tensor that records every operation, then walks back. An operation ``f`` with output
relevance ``R`` gives each operand ``x``

    R_x = N( x * d/dx <f + f_abs, R / |f|> )

by autograd, with ``f_abs`` the operation at absolute operands and weights, without bias. One image at a time, so that a
mass is a plain sum, wherever the model keeps its batch axis. Nothing here is shared with the engine: no capture, no
coefficients, no rewriting of the graph. Conventions that go beyond the equation carry their reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor]
# From the relevance of the output to that of every operand.
Pull = Callable[[Tensor], list[Tensor]]

MASK_BELOW = -99.0


class Step:
    """One recorded value: how it was made, and the relevance that arrives at it."""

    def __init__(
        self, value: Tensor, operands: Sequence[Step] = (), pull: Pull | None = None, kind: str = "op"
    ) -> None:
        self.value, self.operands, self.pull, self.kind = value, list(operands), pull, kind
        self.arrived: list[tuple[Tensor, Tensor]] = []  # relevance with the mass it stands for
        self.scores = False  # on the way into a softmax


class Options:
    """What :func:`explain` was asked for."""

    def __init__(self, shares: str, divided: bool, picks: bool) -> None:
        self.kept, self.divided, self.picks = shares == "kept", divided, picks
        self.tape: list[Step] = []


class Traced(Tensor):
    """A tensor that records what is done with it."""

    step: Step
    options: Options

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.removesuffix("_") if not func.__name__.endswith("__") else func.__name__
        kwargs = kwargs or {}
        if func in (Tensor.mT.__get__, Tensor.T.__get__):  # type: ignore[attr-defined]
            return _move(func, args, kwargs)
        if name in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name not in HANDLERS:
            raise NotImplementedError(f"the definition has no {name}")
        return HANDLERS[name](func, args, kwargs)


_QUESTIONS = {
    "__get__",
    "size",
    "dim",
    "is_floating_point",
    "is_complex",
    "numel",
    "__len__",
    "stride",
    "is_contiguous",
}


def explain(
    model: torch.nn.Module,
    images: Tensor,
    seed: Tensor,
    *,
    shares: str = "kept",
    divided: bool = True,
    picks: bool = False,
) -> Tensor:
    """Relevance of ``images`` ``[B, C, H, W]``, each of mass 1, for a ``seed`` ``[B, classes]`` at the logits.

    ``divided`` is the form of max-pools; with ``picks`` indexing counts as a choice of tokens for the head.
    """
    return torch.cat(
        [_explain_one(model, x[None], s[None], Options(shares, divided, picks)) for x, s in _zip(images, seed)]
    )


def constant(value: Tensor, like: Tensor) -> Tensor:
    """A constant of the model as an operand of the operations that ``like`` goes through."""
    assert isinstance(like, Traced)
    return _traced(Step(value.detach()), like.options)


def _zip(images: Tensor, seed: Tensor) -> Any:
    return zip(images, seed, strict=True)


def _explain_one(model: torch.nn.Module, image: Tensor, seed: Tensor, options: Options) -> Tensor:
    source = Step(image)
    with torch.no_grad():
        out = model(_traced(source, options))
    one = torch.ones((), dtype=seed.dtype)
    out.step.arrived.append((_normalized(seed, one), one))
    for step in reversed(options.tape):
        if not step.arrived or step.pull is None:
            continue
        relevance = torch.stack([r for r, _ in step.arrived]).sum(0)
        mass = sum(m for r, m in step.arrived if r.any())  # masses add where relevance adds
        pulled = step.pull(relevance)
        masses = [r.abs().sum() for r in pulled]
        for operand, r, m in zip(step.operands, pulled, masses, strict=True):
            if step.kind == "join":
                target = m  # parts keep the mass they carry
            elif not options.kept and step.kind != "move":
                target = torch.ones_like(m)
            else:
                target = mass * m / sum(masses) if sum(masses) else m
            operand.arrived.append((_normalized(r, target), target))
    return _normalized(torch.stack([r for r, _ in source.arrived]).sum(0), one)


def _normalized(relevance: Tensor, mass: Tensor) -> Tensor:
    total = relevance.abs().sum()
    return relevance * (mass / total) if total > 0 else relevance


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


# Recording


def _traced(step: Step, options: Options) -> Traced:
    tensor = step.value.clone().as_subclass(Traced)
    tensor.step, tensor.options = step, options
    return tensor


def _options(args: Any) -> Options:
    return next(a for a in _flat(args) if isinstance(a, Traced)).options


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [w for v in value for w in _flat(v)]
    if isinstance(value, dict):
        return _flat(list(value.values()))
    return [value]


def _step(value: Any) -> Step:
    """A constant among the operands takes its relevance away."""
    if isinstance(value, Traced):
        return value.step
    return Step(torch.as_tensor(value, dtype=torch.float64))


def _plain(value: Any) -> Any:
    if isinstance(value, Traced):
        return value.step.value
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v) for v in value)
    return value


def _record(options: Options, step: Step) -> Traced:
    options.tape.append(step)
    return _traced(step, options)


def _by_definition(
    options: Options,
    f: Function,
    f_abs: Function,
    operands: list[Step],
    *,
    positive_output: bool = False,
    kind: str = "op",
) -> Traced:
    value = f(*(s.value for s in operands))
    step = Step(value, operands, None, kind)

    def pull(relevance: Tensor) -> list[Tensor]:
        if positive_output:
            relevance = torch.where(value > 0, relevance, 0.0)
        with torch.enable_grad():
            leaves = [s.value.detach().clone().requires_grad_() for s in operands]
            total = ((f(*leaves) + f_abs(*leaves)) * _ratio(relevance, value.abs())).sum()
            grads = torch.autograd.grad(total, leaves)
        pulled = [_zero_times(s.value, d) for s, d in zip(operands, grads, strict=True)]
        if step.scores and options.kept:  # with kept shares only positive queries and keys carry relevance
            pulled = [torch.where(s.value > 0, r, 0.0) for s, r in zip(operands, pulled, strict=True)]
        return pulled

    step.pull = pull
    return _record(options, step)


def _zero_times(x: Tensor, d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(x), x * d)


def _given(names: str, args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


# Operations


def _linear(func: Any, args: Any, kwargs: Any) -> Traced:
    x, weight, *rest = args
    bias = rest[0] if rest else kwargs.get("bias")
    return _by_definition(
        x.options, lambda u: F.linear(u, weight, bias), lambda u: F.linear(u.abs(), weight.abs()), [x.step]
    )


def _conv(func: Any, args: Any, kwargs: Any) -> Traced:
    x, weight, bias, *geometry = args
    return _by_definition(
        x.options,
        lambda u: func(u, weight, bias, *geometry, **kwargs),
        lambda u: func(u.abs(), weight.abs(), None, *geometry, **kwargs),
        [x.step],
    )


def _batch_norm(func: Any, args: Any, kwargs: Any) -> Traced:
    given = _given("input running_mean running_var weight bias training momentum eps", args, kwargs)
    x, mean, var, weight, bias = (given.get(k) for k in ("input", "running_mean", "running_var", "weight", "bias"))
    eps = given.get("eps", 1e-5)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    gain = ((torch.ones_like(var) if weight is None else weight) / (var + eps).sqrt()).view(shape)
    shift = (torch.zeros_like(var) if bias is None else bias).view(shape) - mean.view(shape) * gain
    return _by_definition(x.options, lambda u: u * gain + shift, lambda u: u.abs() * gain.abs(), [x.step])


def _standardised(
    x: Traced, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, centred: bool, shape: Any, grouped: Any
) -> Traced:
    """(u - mean) / sigma * weight + bias, with mean and sigma detached."""
    gain = torch.ones(()).double() if weight is None else weight.view(shape)
    shift = 0.0 if bias is None else bias.view(shape)

    def statistics(u: Tensor) -> tuple[Tensor, Tensor]:
        v = grouped(u.detach())
        mean = v.mean(axes, keepdim=True) if centred else torch.zeros(()).double()
        sigma = ((v - mean).square().mean(axes, keepdim=True) + eps).sqrt()
        return mean.expand_as(v).reshape(u.shape), sigma.expand_as(v).reshape(u.shape)

    def f(u: Tensor) -> Tensor:
        mean, sigma = statistics(u)
        return (u - mean) / sigma * gain + shift

    def f_abs(u: Tensor) -> Tensor:
        # RMS does not change under absolute values; a standard deviation does. The mean is a constant.
        _, sigma = statistics(u.abs())
        return u.abs() / sigma * gain.abs()

    return _by_definition(x.options, f, f_abs, [x.step])


def _layer_norm(func: Any, args: Any, kwargs: Any) -> Traced:
    given = _given("input normalized_shape weight bias eps", args, kwargs)
    shape = tuple(given["normalized_shape"])
    axes = tuple(range(-len(shape), 0))
    return _standardised(
        given["input"], axes, given.get("weight"), given.get("bias"), given.get("eps", 1e-5), True, shape, lambda u: u
    )


def _rms_norm(func: Any, args: Any, kwargs: Any) -> Traced:
    given = _given("input normalized_shape weight eps", args, kwargs)
    shape, eps = tuple(given["normalized_shape"]), given.get("eps")
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    axes = tuple(range(-len(shape), 0))
    return _standardised(given["input"], axes, given.get("weight"), None, eps, False, shape, lambda u: u)


def _group_norm(func: Any, args: Any, kwargs: Any) -> Traced:
    given = _given("input num_groups weight bias eps", args, kwargs)
    x, groups = given["input"], given["num_groups"]
    shape = (1, -1) + (1,) * (x.dim() - 2)
    weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
    return _standardised(x, (-1,), weight, bias, eps, True, shape, lambda u: u.unflatten(1, (groups, -1)).flatten(2))


def _relu(func: Any, args: Any, kwargs: Any) -> Traced:
    """ReLU and ReLU6: both slopes are taken as one wherever the output is positive (saturation included)."""
    x = args[0]
    value = func(x.step.value)

    def pull(relevance: Tensor) -> list[Tensor]:
        r = torch.where(value > 0, _ratio(relevance, value.abs()), 0.0)
        return [2 * x.step.value.abs() * r]

    return _record(x.options, Step(value, [x.step], pull))


def _activation(func: Any, args: Any, kwargs: Any) -> Traced:
    """Relevance of outputs that are not positive is dropped."""
    x = args[0]
    rest = args[1:]
    if "clamp" in func.__name__ or func.__name__ == "hardtanh":
        lowest = kwargs.get("min", kwargs.get("min_val", rest[0] if rest and func.__name__ != "clamp_max" else None))
        if lowest == 0:  # relu and relu6 under another name (nn.ReLU6 is one)
            return _relu(lambda u: func(u, *rest, **kwargs), args, kwargs)

    def f(u: Tensor) -> Tensor:
        return func(u, *rest, **{k: v for k, v in kwargs.items() if k != "inplace"})  # type: ignore[no-any-return]

    return _by_definition(x.options, f, lambda u: f(u.abs()), [x.step], positive_output=True)


def _add(func: Any, args: Any, kwargs: Any) -> Traced:
    signs = {"sub": (1, -1), "__sub__": (1, -1), "rsub": (-1, 1), "__rsub__": (-1, 1)}.get(func.__name__, (1, 1))
    if isinstance(args[0], Traced) and isinstance(args[1], Tensor) and bool((_plain(args[1]) < MASK_BELOW).any()):
        return _biased(args[0], args[1])
    a, b = (_step(x) for x in args)
    shape = torch.broadcast_shapes(a.value.shape, b.value.shape)
    # A constant takes its share away entry by entry of the sum.
    a, b = (s if isinstance(x, Traced) else Step(s.value.expand(shape)) for x, s in zip(args, (a, b), strict=True))
    return _by_definition(
        _options(args),
        lambda u, v: signs[0] * u + signs[1] * v,
        lambda u, v: u.abs() + v.abs(),
        [a, b],
        kind="add",
    )


def _mul(func: Any, args: Any, kwargs: Any) -> Traced:
    a, b = args
    if not isinstance(a, Traced):
        a, b = b, a
    if isinstance(b, Traced):
        return _by_definition(a.options, lambda u, v: u * v, lambda u, v: u.abs() * v.abs(), [a.step, b.step])
    return _scale(a, torch.as_tensor(b, dtype=torch.float64))


def _scale(a: Traced, factor: Tensor) -> Traced:
    if factor.numel() == 1:  # a number changes nothing: relevance passes
        value = a.step.value * factor
        return _record(a.options, Step(value, [a.step], lambda r: [r.reshape(a.step.value.shape)], "number"))
    return _by_definition(a.options, lambda u: u * factor, lambda u: u.abs() * factor.abs(), [a.step])


def _div(func: Any, args: Any, kwargs: Any) -> Traced:
    a, b = args
    if isinstance(b, Traced):  # a statistic, detached
        d = b.step.value
        return _by_definition(a.options, lambda u: u / d, lambda u: u.abs() / d.abs(), [a.step])
    return _scale(a, 1 / torch.as_tensor(b, dtype=torch.float64))


def _neg(func: Any, args: Any, kwargs: Any) -> Traced:
    return _scale(args[0], torch.tensor(-1.0, dtype=torch.float64))


def _product(options: Options, f: Function, a: Step, b: Step, attends: bool) -> Traced:
    return _by_definition(
        options,
        f,
        lambda u, v: f(u.abs(), v.abs()),
        [a, b],
        # with kept shares only positive head outputs carry relevance
        positive_output=attends and options.kept,
        kind="matmul",
    )


def _matmul(func: Any, args: Any, kwargs: Any) -> Traced:
    a, b = args
    if not isinstance(b, Traced):
        return _by_definition(a.options, lambda u: u @ b, lambda u: u.abs() @ b.abs(), [a.step])
    attends = any(_before(s, {"move"}).kind == "softmax" for s in (a.step, b.step))
    return _product(a.options, lambda u, v: u @ v, a.step, b.step, attends)


def _before(step: Step, kinds: set[str]) -> Step:
    while step.kind in kinds and step.operands:
        step = step.operands[0]
    return step


def _softmax(func: Any, args: Any, kwargs: Any) -> Traced:
    """exp(S) over a detached denominator; what a mask has pushed far down is no score."""
    x = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    hidden = x.step.value < MASK_BELOW
    product = _before(x.step, {"move", "number", "add"})
    product.scores = product.kind == "matmul"

    def f(u: Tensor) -> Tensor:
        u = u.masked_fill(hidden, float("-inf"))
        top = u.detach().amax(dim, keepdim=True)
        return (u - top).exp() / (u.detach() - top).exp().sum(dim, keepdim=True)

    return _by_definition(x.options, f, lambda u: f(u.abs()), [x.step], kind="softmax")


def _biased(scores: Traced, mask: Tensor) -> Traced:
    """Scores plus a constant: what it hides is hidden, the rest takes its share as an operand of an addition."""
    options = scores.options
    if mask.dtype == torch.bool:
        hidden, bias = ~mask, torch.zeros(())
    else:
        hidden = mask < MASK_BELOW
        bias = mask.masked_fill(hidden, 0.0).expand(scores.shape)
    if bias.any():
        scores = _by_definition(
            options, lambda a, b: a + b, lambda a, b: a.abs() + b.abs(), [scores.step, Step(bias)], kind="add"
        )
    hidden = hidden.expand(scores.shape)

    def pull(relevance: Tensor) -> list[Tensor]:
        return [relevance.masked_fill(hidden, 0.0)]

    return _record(options, Step(scores.step.value.masked_fill(hidden, float("-inf")), [scores.step], pull, "move"))


def _attention(func: Any, args: Any, kwargs: Any) -> Traced:
    given = _given("query key value attn_mask dropout_p is_causal", args, kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    scale = given.get("scale") or q.shape[-1] ** -0.5
    repeat = q.shape[1] // k.shape[1]
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    options = q.options
    scaled = _scale(q, torch.tensor(scale, dtype=torch.float64))
    scores = _product(options, lambda a, b: a @ b.repeat_interleave(repeat, 1).mT, scaled.step, k.step, False)
    if mask is not None:
        scores = _biased(scores, mask)
    weights = _softmax(None, (scores, -1), {})
    return _product(options, lambda a, b: a @ b.repeat_interleave(repeat, 1), weights.step, v.step, True)


def _pool(func: Any, args: Any, kwargs: Any) -> Traced:
    """Means and sums: linear, with weights that are not negative."""
    x = args[0]
    rest = args[1:]
    return _by_definition(
        x.options, lambda u: func(u, *rest, **kwargs), lambda u: func(u.abs(), *rest, **kwargs), [x.step]
    )


def _max_pool(func: Any, args: Any, kwargs: Any) -> Traced:
    x = args[0]
    rest = args[1:]
    kwargs = {k: v for k, v in kwargs.items() if k != "return_indices"}
    value, indices = F.max_pool2d(x.step.value, *rest, **kwargs, return_indices=True)

    def pull(relevance: Tensor) -> list[Tensor]:
        r = relevance if x.options.divided else relevance * value
        spread = torch.zeros_like(x.step.value).flatten(2)
        return [spread.scatter_add(2, indices.flatten(2), r.flatten(2)).view(x.step.value.shape)]

    return _record(x.options, Step(value, [x.step], pull))


def _move(func: Any, args: Any, kwargs: Any) -> Any:
    """Values change place: their relevance goes along."""
    x = args[0]
    before = x.step.value
    out = func(before, *_plain(args[1:]), **kwargs)

    def one(value: Tensor, select: Callable[[Any], Tensor]) -> Traced:
        def pull(relevance: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                leaf = torch.zeros_like(before, requires_grad=True)
                moved = select(func(leaf, *_plain(args[1:]), **kwargs))
            return [torch.autograd.grad(moved, leaf, relevance)[0]]

        return _record(x.options, Step(value, [x.step], pull, "move"))

    if isinstance(out, (tuple, list)):
        return tuple(one(v, lambda o, i=i: o[i]) for i, v in enumerate(out))
    return one(out, lambda o: o)


def _pick(func: Any, args: Any, kwargs: Any) -> Any:
    """Indexing; as a choice of tokens for the head it is a linear layer with constant weights."""
    moved = _move(func, args, kwargs)
    if not args[0].options.picks:
        return moved
    return _by_definition(moved.options, lambda u: u.clone(), lambda u: u.abs(), [moved.step])


def _join(func: Any, args: Any, kwargs: Any) -> Traced:
    tensors = [_step(t) for t in args[0]]
    value = func([s.value for s in tensors], *args[1:], **kwargs)

    def pull(relevance: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [torch.zeros_like(s.value, requires_grad=True) for s in tensors]
            joined = func(leaves, *args[1:], **kwargs)
        return list(torch.autograd.grad(joined, leaves, relevance))

    return _record(_options(args), Step(value, tensors, pull, "join"))


def _choice(func: Any, args: Any, kwargs: Any) -> Traced:
    """maximum, minimum, where: relevance goes to the entry chosen, half to each of two equal ones."""
    operands = [a.step for a in args if isinstance(a, Traced)]
    value = func(*_plain(args))

    def pull(relevance: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [s.value.detach().clone().requires_grad_() for s in operands]
            given = iter(leaves)
            chosen = func(*(next(given) if isinstance(a, Traced) else a for a in args))
        return list(torch.autograd.grad(chosen, leaves, relevance))

    return _record(_options(args), Step(value, operands, pull))


def _decide(func: Any, args: Any, kwargs: Any) -> Tensor:
    result: Tensor = func(*_plain(args))
    return result


def _log_softmax(func: Any, args: Any, kwargs: Any) -> Traced:
    """Scores minus a detached logarithm of a sum."""
    x, dim = args
    total = x.step.value.logsumexp(dim, keepdim=True)
    return _by_definition(x.options, lambda u: u - total, lambda u: u.abs() - total, [x.step])


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]


HANDLERS: dict[str, Callable[[Any, Any, Any], Any]] = {}
for _handler, _names in (
    (_linear, "linear"),
    (_conv, "conv1d conv2d"),
    (_batch_norm, "batch_norm"),
    (_layer_norm, "layer_norm"),
    (_group_norm, "group_norm"),
    (_rms_norm, "rms_norm"),
    (_relu, "relu relu6"),
    (
        _activation,
        "gelu silu mish elu selu celu leaky_relu sigmoid tanh hardswish hardsigmoid hardtanh softplus logsigmoid "
        "log_sigmoid clamp clamp_min clamp_max abs square exp sqrt rsqrt pow __pow__ prelu "
        "reciprocal log log1p expm1 erf sin cos atan softshrink hardshrink threshold _threshold",
    ),
    (_add, "add __add__ __radd__ __iadd__ sub __sub__ rsub __rsub__"),
    (_mul, "mul __mul__ __rmul__"),
    (_div, "div __truediv__ __div__ true_divide"),
    (_neg, "neg __neg__"),
    (_matmul, "matmul bmm mm __matmul__"),
    (_softmax, "softmax"),
    (_attention, "scaled_dot_product_attention"),
    (_pool, "mean sum avg_pool2d avg_pool1d adaptive_avg_pool2d adaptive_avg_pool1d"),
    (_max_pool, "max_pool2d boolean_dispatch _max_pool2d"),
    (
        _move,
        "view reshape flatten unflatten permute transpose squeeze unsqueeze unbind split chunk roll flip pad expand "
        "repeat repeat_interleave movedim pixel_shuffle narrow split_with_sizes contiguous",
    ),
    (_pick, "select __getitem__"),
    (_join, "cat stack"),
    (_choice, "maximum minimum where"),
    (_decide, "__gt__ gt"),
    (_log_softmax, "log_softmax"),
    (_same, "dropout detach clone"),
):
    for _name in _names.split():
        HANDLERS[_name] = _handler
