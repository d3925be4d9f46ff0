"""The engine: attribution maps of a PyTorch image classifier."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import ops, rules, transfer
from ramp_fast._checks import finite_samples, flag, is_whole, positive
from ramp_fast._patched import warn_of_patches
from ramp_fast.capture import capture, static_batch
from ramp_fast.errors import InputError
from ramp_fast.gemm import exact_float32, precision_for
from ramp_fast.graph import Graph
from ramp_fast.heap import keep_freed_memory
from ramp_fast.model_checks import check_model, require_module
from ramp_fast.model_state import Structure, Weights
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
IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NORMALIZATIONS = ("max", "sum", "none")

# The exporter changes the state of the process and, while it runs, the parameters of a model that engines may share:
# one capture at a time, and no look at a model meanwhile.
_CAPTURE = threading.Lock()

# After so many captures that gave the same graph, a change of an attribute is no longer a reason for one.
_VAIN_CAPTURES = 3

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
        Explained classes, ``[B]`` or ``[B, K]``; the seed itself where one was given or computed.
    logits : Tensor
        ``[B, classes]``, what the model returns. (Of a model that ends in softmax or log_softmax the scores below it
        are explained.)
    """

    maps: Tensor
    target: Tensor
    logits: Tensor


class Engine:
    """Attributes images with one model under one rule.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode that maps ``[B, C, H, W]`` to logits ``[B, classes]``, each image on its own. It is
        never changed; when you change it, results are those of the model as it is now (Notes say what is noticed).
        Forward hooks that return a value, or change the result for a random image, are part of the model; others are
        not called.
    rule : str or ramp_fast.rules.AbsLRP
        "abslrp" (shares kept at junctions), "abslrp-release" (equal shares), or a rule object.
    precision : {"mixed", "float32", "float64", "fast"}
        "mixed": float32 forward pass, bf16 products in the pull-back where the device has them. "fast": a
        reduced-precision forward pass as well; needs a rule with a relative stabilizer.
    strict : bool
        Refuse operations outside the vocabulary (docs/rules.md). With False, elementwise and linear ones
        follow the rule's generic definition, with one warning each.
    input_shape : (C, H, W), optional
        Capture for this shape now. By default timm's configuration says it, if the model takes such images, or the
        first images do.
    micro_batch : int, optional
        Images that go through the model together. By default the whole batch on GPUs; on CPUs one, and after some
        images four, if a trial shows that this is faster and changes no bit of any result.
    cuda_graphs : bool
        On GPUs: record what is run for a batch shape when it comes a second time, and replay that from then on.
        Recordings keep their activations allocated, those of the last four batch shapes.

    Raises
    ------
    UnsupportedModelError
        The model has operations without a rule (all are listed), mixes the samples of a batch, has modules that act
        otherwise in training mode and are in it, is quantised or not floating point.
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

    Before every call the engine compares the model with what it was when it was captured. Noticed at once:

    * modules, parameters, buffers and attributes that were replaced, also within lists, dicts and plain objects that
      are attributes (NumPy arrays of up to 1 MB by value); hooks; modes; methods and attributes of modules' classes;
    * tensors whose memory, shape, dtype, device or version counter is another, as after ``copy_`` or ``mul_``;
    * on CPUs writes that no counter shows (``.data``, NumPy views, fused optimizers), by checksums: of all bytes, if
      the model has no more than 32 MB for every image in the call. Of a larger one a line of 64 bytes in every 4 KB,
      and 32 MB per image in turns: a write to a whole tensor, or to 8 KB in a row, is noticed at once, a write to a
      few numbers of a model of S MB at the latest after S / 32 images.

    Not noticed: writes of the third kind on GPUs or under ``check=False``; values in closures, globals and objects
    deeper within attributes. :meth:`refresh` makes the engine look again. An attribute that has changed three times
    without any effect on what is computed is no longer watched, with a warning.
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
        require_module(model)
        self.rule = rules.resolve(rule)
        _one_of("precision", precision, PRECISIONS)
        if precision == "fast":
            _require_stabilizer(self.rule)
        if micro_batch is not None:
            positive("Engine", "micro_batch", micro_batch)
        flag("Engine", "strict", strict)
        flag("Engine", "cuda_graphs", cuda_graphs)
        if input_shape is not None:
            _check_shape(input_shape)
        self.model, self.precision, self.strict, self.micro_batch = model, precision, strict, micro_batch
        self._plans: dict[tuple[int, int, int], Plan] = {}
        self.cuda_graphs = cuda_graphs
        self._groups: dict[tuple[int, ...], Groups] = {}
        self._recordings: weakref.WeakKeyDictionary[Plan, Recordings] = weakref.WeakKeyDictionary()
        self._structure: Structure | None = None
        self._weights: Weights | None = None
        self._device = torch.device("cpu")
        self._last: Plan | None = None
        self._former: dict[tuple[int, int, int], Any] = {}
        self._suspects: list[str] = []
        self._vain: dict[str, int] = {}
        self._unwatched: set[str] = set()
        shape = input_shape or _configured_shape(model)
        with torch.inference_mode(False), _CAPTURE:
            check_model(model)
            if shape is not None:
                try:
                    self._plan_for(tuple(int(s) for s in shape))  # type: ignore[arg-type]
                except InputError:
                    if input_shape is not None:
                        raise  # the configuration may be another model's: the first images will tell

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

    def classes(self, images: Tensor) -> int:
        """How many logits the model has for images ``[B, C, H, W]`` like these; nothing is computed."""
        _, plan, _ = self._for_images(images, False)
        return int(plan.graph.output.example[1])

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
        target: int | Tensor | Callable[[Tensor], Tensor] | None = None,
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
        target : None, int, integer Tensor [B] or [B, K], floating Tensor [B, classes], or callable
            Classes to explain: the predicted ones, one for all, one or K per image (one forward pass for all
            K); or a seed, the relevance of every logit (``contrast`` must be "none"); or a function that computes
            the seed ``[b, classes]`` from the logits ``[b, classes]`` of the forward pass that is attributed. It is
            called for as many images as go through the model together, and what it says of one must not depend on
            the others.
        contrast : {"others", "none"}
            Subtract the map of a uniform seed over all other classes, each map normalised on its own, or not.
        normalize : {"max", "sum", "none"}
            Scale every map to a largest absolute value of 1, to a sum of absolute values of 1, or leave it:
            then the map is the difference of two maps of mass 1 (with contrast), or a map of mass 1, or of the mass
            of its seed (the sum of the seed's absolute values).
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
        if batch_size is not None:
            positive("attribute", "batch_size", batch_size)
        images, plan, device = self._for_images(images, check)
        classes = int(plan.graph.output.example[1])
        wanted = _Target(target, images.shape[0], classes, contrast, check)
        kind = plan.precision.output
        shape = (images.shape[0], wanted.count, *images.shape[1:])
        width, dtype = (classes, kind) if wanted.seeded else (wanted.count, torch.long)
        with _undisturbed(device):
            maps = torch.empty(shape, dtype=kind, device=images.device)
            logits = torch.empty(images.shape[0], classes, dtype=kind, device=images.device)
            explained = torch.empty(images.shape[0], width, dtype=dtype, device=images.device)
            sides = wanted.count * (2 if wanted.contrast else 1)
            ranges = self._ranges(plan, images.shape, sides, wanted.contrast, batch_size, device)

            def attributed(batch: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
                operands, unchecked = wanted.split(given)
                result, out, chosen = self._run(plan, (batch, *operands), wanted, normalize)
                wrong = wanted.undefined(out, chosen)
                if not _looks_at(images, check):
                    wrong = wrong | ~finite_samples(batch).unsqueeze(1)
                if unchecked is not None:
                    wrong = wrong | unchecked
                return _without(result, wrong).to(kind), _returned(out, plan.graph).to(kind), chosen

            given = ((images[here].detach(), *wanted.operands(here)) for here in ranges)
            results = transfer.batches(given, attributed, device, plan.precision.forward, images.device)
            for here, parts in zip(ranges, results, strict=True):
                for whole, part in zip((maps, logits, explained), parts, strict=True):
                    whole[here] = part
        if not wanted.several:
            maps = maps.squeeze(1)
            explained = explained if wanted.seeded else explained.squeeze(1)
        return Attribution(maps, explained if wanted.given is None else wanted.given, logits)

    def refresh(self) -> None:
        """Capture the model and pack its weights anew at the next call, whatever has been noticed of changes."""
        with _CAPTURE:
            self._forget(())

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
        images, plan, device = self._for_images(images, check)
        classes = int(plan.graph.output.example[1])
        with _undisturbed(device):
            found = torch.empty(images.shape[0], classes, dtype=plan.precision.output, device=images.device)
            for here in self._ranges(plan, images.shape, 0, False, None, device):
                scores = forward(plan, images[here].detach().to(device, plan.precision.forward))
                found[here] = _returned(scores, plan.graph)
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
            As there: batch_size, seed, explain, strict, contrast, progress.

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
        """Maps ``[B, K, C, H, W]``, logits, and classes or seed, of what goes through the model together."""

        def function(batch: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            explained: list[Tensor] = []

            def seed(logits: Tensor) -> tuple[Tensor, bool]:
                found, c = wanted.seed(logits, given[0] if given else None, self.rule)
                explained.append(found)
                return c, wanted.contrast

            relevance, logits = run(plan, batch, seed)
            maps = relevance[wanted.count :] if wanted.contrast else relevance
            if normalize == "none" and wanted.seeded:
                mass = explained[0].abs().sum(-1, dtype=torch.float64).to(maps.dtype)
                maps = maps * mass.view(1, -1, *[1] * (maps.dim() - 2))
            return _normalized(maps, normalize).transpose(0, 1), logits, explained[0]

        if not (self.cuda_graphs and records(operands[0])) or wanted.function is not None:
            return function(*operands)
        recordings = self._recordings.setdefault(plan, Recordings())
        key = wanted.given is None, wanted.contrast, normalize, ops.forced_backend()
        return recordings.call(key, function, operands)

    def _for_images(self, images: Tensor, check: bool | None) -> tuple[Tensor, Plan, torch.device]:
        """Images, the plan for their shape and the model's device, once they and the model have been looked at."""
        _check_images(images, check)
        torch.get_num_threads()  # until torch is asked, oneDNN's loops in a new thread take OpenMP's default number
        with torch.inference_mode(False), _CAPTURE:
            self._notice_changes(images.shape[0], check is not False)
            plan = self._plan_for(tuple(images.shape[1:]))  # type: ignore[arg-type]
            return images.clone() if images.is_inference() else images, plan, self._device

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
        plan = self._plans.get(shape)
        if plan is None:
            self._notice_weights(math.inf, True)  # all of them: they are summed up anew below
            if self._structure is None:
                check_model(self.model)
                warn_of_patches(self.model)
                self._structure = Structure(self.model, self._unwatched)
                self._device = _device(self.model)
            # Tensors made in inference mode can only be exported in it.
            with torch.inference_mode(any(t.is_inference() for t in _tensors(self.model).values())):
                graph = capture(self.model, shape, strict=self.strict)
            self._learn(shape, graph)
            canonicalize(graph, fold_batchnorm=self.rule.fold_batchnorm)
            plan = self._plans[shape] = self._prepared(graph)
            self._weights = Weights(self._watched())
        self._last = plan
        return plan

    def _notice_changes(self, images: float, look: bool) -> None:
        """Forget plans, or pack weights again, where the model is no longer what it was."""
        if self._structure is None:
            return
        changes = list(self._structure.changes())
        if changes:
            self._forget(changes)
        else:
            self._notice_weights(images, look)

    def _notice_weights(self, images: float, look: bool) -> None:
        if self._weights is None:
            return
        names, layout = self._weights.changes(images, look)
        if not names:
            return
        tensors = self._weights.tensors
        packed = {
            id(n.params["tensor"]) for plan in self._plans.values() for n in plan.graph.nodes if n.kind == g.PARAM
        }
        # Numbers may have decided about the graph (`float(self.scale)`), and so may what is not in it.
        read = any(plan.graph.weights_read for plan in self._plans.values())
        if layout or read or any(id(tensors[n]) not in packed for n in names):
            self._forget(())
            return
        for shape, plan in self._plans.items():  # new ones, since threads may be running the old
            self._plans[shape] = self._prepared(plan.graph)
        self._weights = Weights(tensors)

    def _watched(self) -> dict[str, Tensor]:
        """Every tensor that the plans may depend on."""
        assert self._structure is not None
        constants = {
            f"{n.params['fqn']} (constant)": n.params["tensor"]
            for plan in self._plans.values()
            for n in plan.graph.nodes
            if n.kind == g.PARAM
        }
        found = {**_tensors(self.model), **self._structure.tensors, **constants}
        once = {id(t): (n, t) for n, t in reversed(found.items()) if not n.endswith("num_batches_tracked")}
        return dict(once.values())

    def _forget(self, changes: Sequence[str]) -> None:
        """Capture anew; ``changes`` names the attributes that are said to be the reason."""
        self._former = {shape: plan.graph.signature for shape, plan in self._plans.items()}
        self._suspects = list(changes)
        self._plans.clear()
        self._groups.clear()
        self._structure = self._weights = self._last = None

    def _learn(self, shape: tuple[int, int, int], graph: Graph) -> None:
        """Stop watching attributes that have changed several times without any effect on the captured graph."""
        former = self._former.pop(shape, None)
        if former is None or former != graph.signature:
            return
        for path in self._suspects:
            self._vain[path] = self._vain.get(path, 0) + 1
            if self._vain[path] == _VAIN_CAPTURES:
                self._unwatched.add(path)
                warnings.warn(
                    f"{path} of the model has changed {_VAIN_CAPTURES} times without changing what the model computes. "
                    "The engine no longer captures the model anew because of it; if it comes to matter, call "
                    "engine.refresh().",
                    RuntimeWarning,
                    stacklevel=5,
                )
        self._suspects = []

    def _prepared(self, graph: Graph) -> Plan:
        if self._device.type == "cpu":
            keep_freed_memory()
        plan = Plan(graph, self.rule, precision_for(self.precision, self._device))
        plan.prepare()
        return plan


class _Target:
    """The classes or the seed that was asked for, checked.

    Where values are not to be looked at, ``unchecked`` ``[B, K]`` says on their device which are wrong.
    """

    def __init__(
        self,
        target: int | Tensor | Callable[[Tensor], Tensor] | None,
        batch: int,
        classes: int,
        contrast: str,
        check: bool | None = None,
    ) -> None:
        self.classes, self.contrast, self.check = classes, contrast == "others", check
        self.unchecked: Tensor | None = None
        self.given: Tensor | None = None
        self.ids: Tensor | None = None
        self.several = False
        self.function: Callable[[Tensor], Tensor] | None = None
        if not isinstance(target, Tensor) and callable(target):
            self.function, target = target, None
            self._require_no_contrast()
        if self.contrast and classes < 2:
            raise InputError('contrast="others" needs at least two classes; pass contrast="none"')
        if isinstance(target, bool) or not (target is None or isinstance(target, (int, Tensor))):
            raise InputError(f"target must be None, an int, a Tensor or a callable, got {type(target).__name__}")
        if isinstance(target, int):
            if _unlike_a_class(target) or (check is not False and not 0 <= target < classes):
                raise InputError(f"target must be between 0 and {classes - 1}, got {target}")
            target = torch.full((batch,), target)
        if isinstance(target, Tensor):
            self._check(target, batch)
        self.count = self.ids.shape[1] if self.ids is not None else 1

    def _check(self, target: Tensor, batch: int) -> None:
        _check_dense("target", target)
        if target.is_floating_point():
            if target.dtype not in IMAGE_DTYPES:
                raise InputError(f"a seed must be floating point of 16 bits or more, got {target.dtype}")
            if target.shape != (batch, self.classes):
                raise InputError(f"a seed must be [{batch}, {self.classes}] (batch, classes), got {list(target.shape)}")
            self._require_no_contrast()
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
        ids = target.long()  # first: unsigned integers have no extremes in PyTorch
        if looks and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.classes):
            raise InputError(
                f"target must be between 0 and {self.classes - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        self.several = target.dim() == 2
        self.ids = ids.reshape(batch, target.shape[1] if self.several else 1)
        if not looks:
            self.unchecked = (self.ids < 0) | (self.ids >= self.classes)

    def _require_no_contrast(self) -> None:
        if self.contrast:
            raise InputError('a seed holds the relevance for and against every class: pass contrast="none"')

    @property
    def seeded(self) -> bool:
        """Whether a seed was given or is computed, and no classes."""
        return self.given is not None or self.function is not None

    def operands(self, here: slice) -> tuple[Tensor, ...]:
        """What was given for the images ``here``: seed or classes, and which are wrong where nobody has looked yet."""
        return tuple(t[here] for t in (self.ids if self.given is None else self.given, self.unchecked) if t is not None)

    def split(self, operands: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Operands, on whatever device by now, as seed or classes (or nothing), and which are wrong."""
        return (operands, None) if self.unchecked is None else (operands[:-1], operands[-1])

    def seed(self, logits: Tensor, given: Tensor | None, rule: AbsLRP) -> tuple[Tensor, Tensor]:
        """Classes ``[b, K]`` or the seed ``[b, classes]``, and coefficients ``[T, b, classes]``."""
        if self.seeded:
            seed = self._computed(logits) if given is None else given.to(logits)
            return seed, rule.start(seed.unsqueeze(0), logits)
        ids = logits.argmax(-1, keepdim=True) if given is None else given
        positive = torch.zeros(ids.shape[1], *logits.shape, dtype=logits.dtype, device=logits.device)
        positive.scatter_(2, ids.t().unsqueeze(-1).clamp(0, self.classes - 1), 1.0)  # unchecked ones may be outside
        p = rule.start(positive, logits)
        if not self.contrast:
            return ids, p
        n = rule.start((1 - positive) / (self.classes - 1), logits)
        return ids, torch.cat([p, p - n])

    def _computed(self, logits: Tensor) -> Tensor:
        assert self.function is not None
        seed = self.function(logits.clone())
        if not isinstance(seed, Tensor) or not seed.is_floating_point() or seed.shape != logits.shape:
            found = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
            raise InputError(
                f"target, a callable, must return a floating-point seed {list(logits.shape)} (images, classes) for "
                f"these logits; it returned {found}"
            )
        return seed.detach().to(logits)

    def undefined(self, logits: Tensor, explained: Tensor) -> Tensor:
        """Which maps ``[b, K]`` are not defined, since the model's own numbers are not.

        A logit of minus infinity, which models give to classes that they leave out, counts where it is explained.
        """
        wrong = ~(logits < math.inf).all(-1, keepdim=True)
        if self.seeded:
            finite = explained.isfinite() & ((explained == 0) | (logits > -math.inf))
            return wrong | ~finite.all(-1, keepdim=True)
        return wrong | (logits.gather(1, explained.clamp(0, self.classes - 1)) == -math.inf)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and inference mode, in which autograd could not pull back through small functions."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        on(device),
        exact_float32(device),
        torch.autocast(device.type, enabled=False),
    ):
        yield


_ENDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "log_softmax": lambda scores: scores.log_softmax(-1),
    "log": torch.log,
}


def _returned(scores: Tensor, graph: Graph) -> Tensor:
    """What the model makes of the scores that are explained."""
    for name in graph.ending:
        scores = _ENDINGS[name](scores)
    return scores


def _looks_at(values: Tensor, check: bool | None) -> bool:
    return values.device.type == "cpu" if check is None else check


def _without(maps: Tensor, wrong: Tensor) -> Tensor:
    """``maps`` ``[B, K, C, H, W]``, NaN where ``wrong`` (``[B, 1]`` or ``[B, K]``)."""
    if wrong.device.type == "cpu" and not bool(wrong.any()):
        return maps
    return maps.masked_fill(wrong.view(*wrong.shape, 1, 1, 1), math.nan)


def _normalized(maps: Tensor, how: str) -> Tensor:
    if how == "none":
        return maps
    size = maps.abs().flatten(2)
    scale = size.amax(-1) if how == "max" else size.sum(-1, dtype=torch.float64).to(maps.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return maps / scale.view(*scale.shape, 1, 1, 1)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
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
    if check is not None:
        flag("images", "check", check)
    _check_dense("images", images)
    if images.dim() != 4:
        raise InputError(f"images must be [B, C, H, W], got shape {list(images.shape)}")
    if images.dtype not in IMAGE_DTYPES:
        raise InputError(
            "images must be floating point (16 bits or more) and preprocessed as the model wants them, got "
            f"{images.dtype}"
        )
    if _looks_at(images, check) and not bool(finite_samples(images).all()):
        raise InputError("images have values that are not finite")


def _check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose values do not lie in memory one by one."""
    kinds = {
        "nested": tensor.is_nested,
        "on the meta device, without values": tensor.is_meta,
        "quantised": tensor.is_quantized,
        f"in the layout {tensor.layout}": tensor.layout != torch.strided,
    }
    found = next((kind for kind, is_kind in kinds.items() if is_kind), None)
    if found is not None:
        raise InputError(f"{name} must be an ordinary dense tensor, this one is {found}")


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(is_whole(n) for n in shape):
        raise InputError(f"input_shape must be three positive integers (C, H, W), got {shape!r}")


def _unlike_a_class(target: int) -> bool:
    return not -(2**63) <= target < 2**63


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _device(model: torch.nn.Module) -> torch.device:
    first = next(iter(_tensors(model).values()), None)
    return torch.device("cpu") if first is None else first.device


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
