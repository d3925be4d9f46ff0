"""The engine: attribution maps of a PyTorch image classifier."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import ops, rules, transfer
from ramp_fast._checks import finite_samples
from ramp_fast.capture import capture, static_batch
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.gemm import exact_float32, precision_for
from ramp_fast.graph import Graph
from ramp_fast.heap import keep_freed_memory
from ramp_fast.passes import canonicalize
from ramp_fast.plan import Plan
from ramp_fast.replay import Recordings, on, records
from ramp_fast.rules.abslrp import AbsLRP, RelativeStabilizer
from ramp_fast.runtime import GROUP, Groups, forward, run

if TYPE_CHECKING:
    from ramp_fast.evaluation import Data, Evaluation
    from ramp_fast.methods import Method
    from ramp_fast.metrics import Metric

PRECISIONS = ("float64", "float32", "mixed", "fast")
CONTRASTS = ("others", "none")
NORMALIZATIONS = ("max", "sum", "none")

# The exporter changes the state of the process and, while it runs, the parameters of a model that engines may share:
# one capture at a time, and no look at a model meanwhile.
_CAPTURE = threading.Lock()

# Below this the stabilizer no longer tames the rounding of a reduced-precision forward pass.
_SMALLEST_FAST_STABILIZER = 0.05


@dataclass(frozen=True)
class Attribution:
    """What :meth:`Engine.attribute` returns.

    Attributes
    ----------
    maps : Tensor
        Relevance of every pixel and channel, ``[B, C, H, W]`` (``[B, K, C, H, W]`` for K targets), float32
        (float64 under precision "float64"), on the images' device.
    target : Tensor
        Explained classes, ``[B]`` or ``[B, K]``; the seed itself where one was given.
    logits : Tensor
        ``[B, classes]``, of the forward pass that was attributed.
    """

    maps: Tensor
    target: Tensor
    logits: Tensor


class Engine:
    """Attributes images with one model under one rule.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode that maps ``[B, C, H, W]`` to logits ``[B, classes]``. It is never changed;
        when its weights are, the engine notices and uses the new ones.
    rule : str or AbsLRP
        "abslrp" (shares kept at junctions), "abslrp-release" (equal shares), or a rule object.
    precision : {"mixed", "float32", "float64", "fast"}
        "mixed": float32 forward pass, bf16 products in the pull-back where the device has them. "fast": a
        reduced-precision forward pass as well; needs a rule with a relative stabilizer.
    strict : bool
        Refuse operations outside the vocabulary (docs/rules.md). With False, elementwise and linear ones
        follow the rule's generic definition, with one warning each.
    input_shape : (C, H, W), optional
        Capture for this shape now. By default timm's configuration says it, or the first images do.
    micro_batch : int, optional
        Images that go through the model together. By default the whole batch on GPUs; on CPUs one, and after some
        images four, if a trial shows that this is faster and changes no bit of any result.
    cuda_graphs : bool
        On GPUs: record what is run for a batch shape when it comes a second time, and replay that from then on.
        Recordings keep their activations allocated, those of the last four batch shapes.

    Raises
    ------
    UnsupportedModelError
        The model has operations without a rule (all are listed), is in training mode, quantised or not
        floating point.
    ValueError, TypeError
        An argument is not one of the values above.

    Examples
    --------
    >>> engine = Engine(timm.create_model("vit_base_patch16_224", pretrained=True).eval())
    >>> a = engine.attribute(images)
    >>> a.maps.shape
    torch.Size([8, 3, 224, 224])

    Notes
    -----
    Threads may share an engine, and engines a model: results are those of one thread, to the last bit on CPUs. Models
    are captured one at a time; do not call a model while it is captured, nor write to its weights during a run (weights
    may be replaced: a run keeps those it began with). Every thread that attributes has ``torch.get_num_threads()``
    native threads of its own, as for every PyTorch operation: with W of them, ``torch.set_num_threads(cores // W)``
    keeps the processor from being oversubscribed.

    Where the model is on a GPU and the images are not, ``batch_size`` (or ``micro_batch``) lets the copies of one batch
    run beside the computation of another.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rule: str | AbsLRP = "abslrp",
        precision: str = "mixed",
        strict: bool = True,
        *,
        input_shape: tuple[int, int, int] | None = None,
        micro_batch: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.rule = rules.resolve(rule)
        _one_of("precision", precision, PRECISIONS)
        if precision == "fast":
            _require_stabilizer(self.rule)
        if micro_batch is not None and (not isinstance(micro_batch, int) or micro_batch < 1):
            raise ValueError(f"micro_batch must be a positive integer, got {micro_batch!r}")
        self.model, self.precision, self.strict, self.micro_batch = model, precision, bool(strict), micro_batch
        self._plans: dict[tuple[int, int, int], Plan] = {}
        self.cuda_graphs = bool(cuda_graphs)
        self._groups: dict[tuple[int, ...], Groups] = {}
        self._recordings: weakref.WeakKeyDictionary[Plan, Recordings] = weakref.WeakKeyDictionary()
        self._state: dict[str, tuple[Any, ...]] = {}
        self._layout: tuple[Any, ...] = ()
        self._last: Plan | None = None
        shape = input_shape or _configured_shape(model)
        with _CAPTURE:
            _check_model(model)
            if shape is not None:
                self._plan_for(tuple(shape))  # type: ignore[arg-type]

    @property
    def plan(self) -> Plan:
        """The plan for the images seen last (or for ``input_shape``); ``print`` it.

        Raises
        ------
        RuntimeError
            No image shape is known yet.
        """
        plan = self._last
        if plan is None:
            raise RuntimeError("no plan yet: pass input_shape=(C, H, W) to Engine, or attribute images first")
        return plan

    def computes_in(self, dtype: torch.dtype) -> bool:
        """Whether the forward pass is computed in ``dtype`` or a wider one."""
        own = precision_for(self.precision, _device(self.model)).forward
        return torch.promote_types(own, dtype) == own

    @property
    def _settings(self) -> dict[str, Any]:
        names = "rule", "precision", "strict", "micro_batch", "cuda_graphs"
        return {name: getattr(self, name) for name in names}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have the settings and the model; they capture it anew."""
        return partial(Engine, **self._settings), (self.model,)

    def for_model(self, model: torch.nn.Module) -> Engine:
        """An engine of the same settings for another model (one with other weights, for example)."""
        return Engine(model, **self._settings)

    def attribute(
        self,
        images: Tensor,
        target: int | Tensor | None = None,
        contrast: str = "others",
        normalize: str = "max",
        *,
        batch_size: int | None = None,
        check: bool | None = None,
    ) -> Attribution:
        """Relevance maps of ``images``.

        Parameters
        ----------
        images : Tensor
            ``[B, C, H, W]``, floating point, preprocessed as the model wants them.
        target : None, int, integer Tensor [B] or [B, K], or floating Tensor [B, classes]
            Classes to explain: the predicted ones, one for all, one or K per image (one forward pass for all
            K), or a seed of relevance at the logits, used as given (``contrast`` must be "none").
        contrast : {"others", "none"}
            Subtract the map of a uniform seed over all other classes, each map normalised on its own, or not.
        normalize : {"max", "sum", "none"}
            Scale every map to a largest absolute value of 1, to a sum of absolute values of 1, or leave it:
            then the map is the difference of two maps of mass 1 (with contrast), or a map of mass 1.
        batch_size : int, optional
            Work on this many images at a time. Results do not depend on it.
        check : bool, optional
            Whether to look at values before anything is computed: images and seeds must be finite, classes exist. By
            default those on the CPU are looked at and those on a GPU are not, because that would wait for the device;
            an image that is not finite, or whose class does not exist, has a map of NaN then.

        Returns
        -------
        Attribution
            A map is zero everywhere where no relevance arrives.

        Raises
        ------
        InputError
            An argument has the wrong shape, dtype or range. Nothing has been computed then.
        """
        _one_of("contrast", contrast, CONTRASTS)
        _one_of("normalize", normalize, NORMALIZATIONS)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"batch_size must be a positive integer, got {batch_size!r}")
        plan, device = self._for_images(images, check)
        classes = int(plan.graph.output.example[1])
        wanted = _Target(target, images.shape[0], classes, contrast, check)
        kind = plan.precision.output
        shape = (images.shape[0], wanted.count, *images.shape[1:])
        maps = torch.empty(shape, dtype=kind, device=images.device)
        logits = torch.empty(images.shape[0], classes, dtype=kind, device=images.device)
        chosen = torch.empty(images.shape[0], wanted.count, dtype=torch.long, device=images.device)
        with torch.no_grad(), on(device), exact_float32(device), torch.autocast(device.type, enabled=False):
            sides = wanted.count * (2 if wanted.contrast else 1)
            ranges = self._ranges(plan, images.shape, sides, wanted.contrast, batch_size, device)

            def attributed(batch: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
                operands, unchecked = wanted.split(given)
                result, out, ids = self._run(plan, (batch, *operands), wanted, normalize)
                if not _looks_at(images, check):
                    result = _without(result, ~finite_samples(batch))
                if unchecked is not None:
                    result = _without(result, unchecked)
                return result.to(kind), out.to(kind), ids

            given = ((images[here].detach(), *wanted.operands(here)) for here in ranges)
            results = transfer.batches(given, attributed, device, plan.precision.forward, images.device)
            for here, parts in zip(ranges, results, strict=True):
                for whole, part in zip((maps, logits, chosen), parts, strict=True):
                    whole[here] = part
        if not wanted.several:
            maps, chosen = maps.squeeze(1), chosen.squeeze(1)
        return Attribution(maps, chosen if wanted.given is None else wanted.given, logits)

    def logits(self, images: Tensor, *, check: bool | None = None) -> Tensor:
        """The model's logits, as :meth:`attribute` computes them.

        On CPUs the plan's forward pass can take half the time of the model's own: BatchNorm, ReLU and residual sums are
        computed with the convolution before, images lie channels last, weights are packed.

        Parameters
        ----------
        images, check
            As for :meth:`attribute`.

        Returns
        -------
        Tensor [B, classes]
            Those of ``attribute(images).logits``, to the last bit where as many images go through the model together
            (on CPUs, unless ``micro_batch`` or ``batch_size`` say otherwise, always). Without gradients.

        Raises
        ------
        InputError
            Images have the wrong shape, dtype or values. (Numbers that overflow within the model may not show.)
        """
        plan, device = self._for_images(images, check)
        classes = int(plan.graph.output.example[1])
        found = torch.empty(images.shape[0], classes, dtype=plan.precision.output, device=images.device)
        with torch.no_grad(), on(device), exact_float32(device), torch.autocast(device.type, enabled=False):
            for here in self._ranges(plan, images.shape, 0, False, None, device):
                found[here] = forward(plan, images[here].detach().to(device, plan.precision.forward))
        return found

    def evaluate(
        self,
        data: Data,
        metrics: Sequence[str | Metric] | Mapping[str, str | Metric] = ("gae", "deletion", "insertion"),
        methods: Sequence[str] | Mapping[str, str | Method | Engine] = (),
        **options: Any,
    ) -> Evaluation:
        """Metrics of this engine's maps, and of other methods beside it; their logits are the engine's on CPUs.

        Parameters
        ----------
        data, metrics
            As for :func:`ramp_fast.evaluation.evaluate`.
        methods
            As there: further methods. The engine comes first, under its rule's name, unless it is among them.
        **options
            As there: batch_size, seed, explain, strict, progress.

        Returns
        -------
        ramp_fast.evaluation.Evaluation

        Examples
        --------
        >>> result = engine.evaluate((images, labels), ["deletion", "abpc:granularity=patch"], ["ixg", "random"])
        >>> print(result)
        >>> result.plot("curves").savefig("curves.png")
        """
        from ramp_fast.evaluation import evaluate, labelled  # which imports engines

        named = labelled(methods, "method")
        if not any(method is self for method in named.values()):
            own = rules.name_of(self.rule)
            if own in named:
                raise InputError(f"the engine is called {own!r} itself: give the method of that name another label")
            named = {own: self, **named}
        return evaluate(self, data, metrics, named, **options)

    def _run(self, plan: Plan, operands: tuple[Tensor, ...], wanted: _Target, normalize: str) -> tuple[Tensor, ...]:
        """Maps ``[B, K, C, H, W]``, logits and classes of what goes through the model together."""

        def function(batch: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            chosen: list[Tensor] = []

            def seed(logits: Tensor) -> tuple[Tensor, bool]:
                ids, c = wanted.seed(logits, given[0] if given else None, self.rule)
                chosen.append(ids)
                return c, wanted.contrast

            relevance, logits = run(plan, batch, seed)
            maps = relevance[wanted.count :] if wanted.contrast else relevance
            return _normalized(maps, normalize).transpose(0, 1), logits, chosen[0]

        if not (self.cuda_graphs and records(operands[0])):
            return function(*operands)
        recordings = self._recordings.setdefault(plan, Recordings())
        key = wanted.given is None, wanted.contrast, normalize, ops.forced_backend()
        return recordings.call(key, function, operands)

    def _for_images(self, images: Tensor, check: bool | None) -> tuple[Plan, torch.device]:
        """The plan for images of this shape, once they and the model have been looked at, and the model's device."""
        _check_images(images, check)
        torch.get_num_threads()  # until torch is asked, oneDNN's loops in a new thread take OpenMP's default number
        with _CAPTURE:
            _check_model(self.model)
            return self._plan_for(tuple(images.shape[1:])), _device(self.model)  # type: ignore[arg-type]

    def _ranges(
        self, plan: Plan, shape: torch.Size, sides: int, contrast: bool, batch_size: int | None, device: torch.device
    ) -> list[slice]:
        """Which images go through the model together, with so many right-hand sides (0: for their logits alone)."""
        ranges: list[slice] = []
        for size in self._sizes(plan, shape, sides, contrast, batch_size, device):
            start = ranges[-1].stop if ranges else 0
            ranges.append(slice(start, start + size))
        return ranges

    def _sizes(
        self, plan: Plan, shape: torch.Size, sides: int, contrast: bool, batch_size: int | None, device: torch.device
    ) -> list[int]:
        """How many images go through the model at a time."""
        batch = shape[0]
        if static_batch(plan.graph) is not None:
            return [1] * batch
        together = self.micro_batch or batch
        if batch_size is not None:
            together = min(together, batch_size)
        if self.micro_batch is None and device.type == "cpu":
            if together < GROUP:
                return [1] * batch
            groups = self._groups.setdefault(tuple(shape[1:]), Groups())
            return groups.sizes(plan, shape, sides, contrast)
        return [min(together, batch - start) for start in range(0, batch, max(together, 1))]

    def _plan_for(self, shape: tuple[int, int, int]) -> Plan:
        layout, state = _fingerprint(self.model)
        if layout != self._layout:
            self._plans.clear()
            self._groups.clear()
            self._last = None
        plan = self._plans.get(shape)
        if plan is None:
            graph = capture(self.model, shape, strict=self.strict)
            canonicalize(graph, fold_batchnorm=self.rule.fold_batchnorm)
            plan = self._plans[shape] = self._prepared(graph)
            if state != self._state:
                self._refresh(except_for=shape)
        elif state != self._state:
            self._refresh()
            plan = self._plans[shape]
        self._layout, self._state, self._last = layout, state, plan
        return plan

    def _prepared(self, graph: Graph) -> Plan:
        device = _device(self.model)
        if device.type == "cpu":
            keep_freed_memory()
        plan = Plan(graph, self.rule, precision_for(self.precision, device))
        plan.prepare()
        return plan

    def _refresh(self, except_for: tuple[int, int, int] | None = None) -> None:
        """The model's weights have changed: pack them again, into new plans, since threads may be running the old."""
        tensors = _tensors(self.model)
        for shape, plan in self._plans.items():
            if shape == except_for:
                continue
            if plan.graph.weights_read:
                graph = canonicalize(
                    capture(self.model, shape, strict=self.strict), fold_batchnorm=self.rule.fold_batchnorm
                )
                self._plans[shape] = self._prepared(graph)
                continue
            for node in plan.graph.nodes:
                if node.kind == g.PARAM and node.params["fqn"] in tensors:
                    node.params["tensor"] = tensors[node.params["fqn"]]
            self._plans[shape] = self._prepared(plan.graph)


class _Target:
    """The classes or the seed that was asked for, checked.

    Where values are not to be looked at, ``unchecked`` ``[B, K]`` says on their device which are wrong.
    """

    def __init__(
        self, target: int | Tensor | None, batch: int, classes: int, contrast: str, check: bool | None = None
    ) -> None:
        self.classes, self.contrast, self.check = classes, contrast == "others", check
        self.unchecked: Tensor | None = None
        self.given: Tensor | None = None
        self.ids: Tensor | None = None
        self.several = False
        if self.contrast and classes < 2:
            raise InputError('contrast="others" needs at least two classes; pass contrast="none"')
        if isinstance(target, bool) or not (target is None or isinstance(target, (int, Tensor))):
            raise InputError(f"target must be None, an int or a Tensor, got {type(target).__name__}")
        if isinstance(target, int):
            target = torch.full((batch,), target)
        if isinstance(target, Tensor):
            self._check(target, batch)
        self.count = self.ids.shape[1] if self.ids is not None else 1

    def _check(self, target: Tensor, batch: int) -> None:
        if target.is_floating_point():
            if target.shape != (batch, self.classes):
                raise InputError(f"a seed must be [{batch}, {self.classes}] (batch, classes), got {list(target.shape)}")
            if self.contrast:
                raise InputError('a seed is used as given: pass contrast="none"')
            if not _looks_at(target, self.check):
                self.unchecked = ~finite_samples(target).unsqueeze(1)
            elif not bool(finite_samples(target).all()):
                raise InputError("the seed has values that are not finite")
            self.given = target
            return
        if target.dtype == torch.bool or target.is_complex():
            raise InputError(f"target must be integers (classes) or floating point (a seed), got {target.dtype}")
        if target.dim() not in (1, 2) or target.shape[0] != batch or (target.dim() == 2 and target.shape[1] == 0):
            raise InputError(f"target must be [{batch}] or [{batch}, K], got {list(target.shape)}")
        looks = _looks_at(target, self.check)
        if looks and target.numel() and (int(target.min()) < 0 or int(target.max()) >= self.classes):
            raise InputError(
                f"target must be between 0 and {self.classes - 1}, got {int(target.min())} to {int(target.max())}"
            )
        self.several = target.dim() == 2
        self.ids = target.long().reshape(batch, target.shape[1] if self.several else 1)
        if not looks:
            self.unchecked = (self.ids < 0) | (self.ids >= self.classes)

    def operands(self, here: slice) -> tuple[Tensor, ...]:
        """What was given for the images ``here``: seed or classes, and which are wrong where nobody has looked yet."""
        return tuple(t[here] for t in (self.ids if self.given is None else self.given, self.unchecked) if t is not None)

    def split(self, operands: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Operands, on whatever device by now, as seed or classes (or nothing), and which are wrong."""
        return (operands, None) if self.unchecked is None else (operands[:-1], operands[-1])

    def seed(self, logits: Tensor, given: Tensor | None, rule: AbsLRP) -> tuple[Tensor, Tensor]:
        """Classes ``[b, K]`` and coefficients ``[T, b, classes]`` from what was given."""
        if given is not None and given.is_floating_point():
            return logits.argmax(-1, keepdim=True), rule.start(given.to(logits).unsqueeze(0), logits)
        ids = logits.argmax(-1, keepdim=True) if given is None else given
        positive = torch.zeros(ids.shape[1], *logits.shape, dtype=logits.dtype, device=logits.device)
        positive.scatter_(2, ids.t().unsqueeze(-1).clamp(0, self.classes - 1), 1.0)  # unchecked ones may be outside
        p = rule.start(positive, logits)
        if not self.contrast:
            return ids, p
        n = rule.start((1 - positive) / (self.classes - 1), logits)
        return ids, torch.cat([p, p - n])


def _looks_at(values: Tensor, check: bool | None) -> bool:
    return values.device.type == "cpu" if check is None else check


def _without(maps: Tensor, wrong: Tensor) -> Tensor:
    """``maps`` ``[B, K, C, H, W]``, NaN where ``wrong`` (``[B]`` or ``[B, K]``)."""
    return maps.masked_fill(wrong.view(*wrong.shape, *[1] * (maps.dim() - wrong.dim())), float("nan"))


def _normalized(maps: Tensor, how: str) -> Tensor:
    if how == "none":
        return maps
    size = maps.abs().flatten(2)
    scale = size.amax(-1) if how == "max" else size.sum(-1, dtype=torch.float64).to(maps.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return maps / scale.view(*scale.shape, 1, 1, 1)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(repr(k) for k in known)}; got {value!r}")


def _require_stabilizer(rule: AbsLRP) -> None:
    s = rule.stabilizer
    if not isinstance(s, RelativeStabilizer) or s.factor < _SMALLEST_FAST_STABILIZER:
        raise ValueError(
            'precision="fast" computes the forward pass in reduced precision, and the division by near-zero logits '
            f"would amplify its rounding to errors of 40 % of a map: use a rule with a relative stabilizer of at "
            f"least {_SMALLEST_FAST_STABILIZER}, such as AbsLRP(stabilizer=RelativeStabilizer(0.1)); got {s!r}"
        )


def _check_images(images: Any, check: bool | None) -> None:
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.dim() != 4:
        raise InputError(f"images must be [B, C, H, W], got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise InputError(f"images must be floating point and preprocessed as the model wants them, got {images.dtype}")
    if _looks_at(images, check) and not bool(finite_samples(images).all()):
        raise InputError("images have values that are not finite")


def _check_model(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise UnsupportedModelError(
                f"{name} is a quantised module ({type(module).__name__}): use the floating-point model"
            )
    training = [name or "(model)" for name, m in model.named_modules() if m.training]
    if training:
        others = " and others" if len(training) > 1 else ""
        raise UnsupportedModelError(f"the model is in training mode ({training[0]}{others}): call model.eval()")
    devices = set()
    for name, tensor in _tensors(model).items():
        devices.add(tensor.device)
        if tensor.is_quantized or (isinstance(tensor, torch.nn.Parameter) and not tensor.is_floating_point()):
            raise UnsupportedModelError(
                f"parameter {name} is {tensor.dtype}: quantised and non-floating models cannot be attributed; "
                "use the floating-point model"
            )
    if len(devices) > 1:
        raise UnsupportedModelError(f"the model is spread over several devices: {sorted(map(str, devices))}")
    if any(d.type == "meta" for d in devices):
        raise UnsupportedModelError("the model has no weights (meta device)")


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _device(model: torch.nn.Module) -> torch.device:
    first = next(iter(_tensors(model).values()), None)
    return torch.device("cpu") if first is None else first.device


def _fingerprint(model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, tuple[Any, ...]]]:
    """What a captured graph depends on (names, shapes, dtypes, device), and the identity of the weights."""
    tensors = _tensors(model)
    shapes = tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in tensors.items())
    # The modules themselves: one that was replaced may compute something else.
    layout = (shapes, tuple(model.named_modules()))
    state = {n: (id(t), t.data_ptr(), None if t.is_inference() else t._version) for n, t in tensors.items()}
    return layout, state


def _configured_shape(model: torch.nn.Module) -> tuple[int, int, int] | None:
    """The input shape from timm's configuration, where the model's own patch grid does not contradict it."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is None or len(size) != 3:
        return None
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own is not None:
        size = (size[0], *own)
    return int(size[0]), int(size[1]), int(size[2])
