"""The engine: attribution maps of a PyTorch image classifier."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import ops, rules
from ramp_fast._checks import flag, is_whole, one_of, positive
from ramp_fast.capture import canonicalize, capture, static_batch
from ramp_fast.capture.exporter import TURNS
from ramp_fast.capture.model_checks import check_model, require_module
from ramp_fast.capture.model_state import ModelState, configured_shape, device_of, tensors_of
from ramp_fast.capture.observe import keep_outputs, mark_outputs
from ramp_fast.capture.patched import warn_of_patches
from ramp_fast.capture.token_slices import hoist_slices
from ramp_fast.errors import InputError
from ramp_fast.explainer import CONTRASTS, Attribution, Explainer, Method
from ramp_fast.gemm import exact_float32, precision_for
from ramp_fast.graph import Graph
from ramp_fast.plan import Plan
from ramp_fast.rules import LayerRule, Rule
from ramp_fast.runtime import conditions, host_copies
from ramp_fast.runtime.cuda_graphs import Recordings, on, records
from ramp_fast.runtime.groups import Groups
from ramp_fast.runtime.heap import keep_freed_memory
from ramp_fast.runtime.inspection import Balance
from ramp_fast.runtime.run import run_logits
from ramp_fast.runtime.targets import NORMALIZATIONS, Explained, Request, Target, check_images, returned, validates

if TYPE_CHECKING:
    from ramp_fast.evaluation import Data, Evaluation
    from ramp_fast.metrics import Metric

# Plans with other modules' outputs kept apart that an engine remembers; packed weights are shared.
_OBSERVING = 8

PRECISIONS = ("float64", "float32", "mixed", "fast")


class Engine(Explainer):
    """Attributes images with one model under one rule.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode that maps ``[B, C, H, W]`` to logits ``[B, classes]``, each image on its own. It is
        never changed; when you change it, results are those of the model as it is now (Notes say what is noticed).
        Forward hooks that return a value, or change the result for a random image, are part of the model; others are
        not called.
    rule : str, ramp_fast.rules.Rule or ramp_fast.rules.LayerRule
        A name, "abslrp" or another of :data:`ramp_fast.rules.NAMED`, with settings if you like
        ("lrp-epsilon:epsilon=0.1"); a rule; or a rule for layers, which all of them follow then.
    precision : {"mixed", "float32", "float64", "fast"}
        "mixed": float32 forward pass, bf16 products in the pull-back where the device has them. "fast": a
        reduced-precision forward pass as well, for which absLRP needs a relative stabilizer.
    strict : bool
        Refuse operations outside the vocabulary (docs/rules.md). With False, elementwise and linear ones
        follow the rule's generic definition, with one warning each.
    input_shape : (C, H, W), optional
        Capture for this shape now. By default timm's configuration says it, if the model takes such images, or the
        first images do.
    micro_batch : int, optional
        Images that go through the model together. By default the whole batch on GPUs; on CPUs one, and after some
        images four, if a trial shows that this is faster and changes no bit of any result. A number of yours is taken
        as it is: the last bits of a map may then depend on how many images go together.
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

    With the environment variable ``RAMP_FAST_CACHE=FOLDER`` captured graphs are kept in that folder, without weights,
    and found by other processes (docs/performance.md).

    Where the model is on a GPU and the images are not, ``batch_size`` (or ``micro_batch``) lets the copies of one batch
    run beside the computation of another.

    Before every call the engine compares the model with what it was when it was captured. Noticed at once:

    * modules, parameters, buffers and attributes that were replaced, also within lists, dicts and plain objects that
      are attributes (NumPy arrays of up to 1 MB by value); hooks; modes; methods and attributes of modules' classes;
    * tensors whose memory, shape, dtype, device or version counter is another, as after ``copy_`` or ``mul_``;
    * on CPUs writes that no counter shows (``.data``, NumPy views, fused optimizers), by checksums: of all bytes, if
      the model has no more than 8 MB for every image in the call. Of a larger one a line of 64 bytes in every 4 KB,
      and 8 MB per image in turns: a write to a whole tensor, or to 8 KB in a row, is noticed at once, a write to a
      few numbers of a model of S MB at the latest after S / 8 images.

    Not noticed: writes of the third kind on GPUs or under ``check=False``; values in closures, globals and objects
    deeper within attributes. :meth:`refresh` makes the engine look again. An attribute that has changed three times
    without any effect on what is computed is no longer watched, with a warning.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rule: str | Rule | LayerRule = "abslrp",
        precision: str = "mixed",
        strict: bool = True,
        *,
        input_shape: tuple[int, int, int] | None = None,
        micro_batch: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        require_module(model)
        self.rule = rules.resolve(rule)
        one_of("precision", precision, PRECISIONS)
        self.rule.check_precision(precision)
        if micro_batch is not None:
            positive("Engine", "micro_batch", micro_batch)
        flag("Engine", "strict", strict)
        flag("Engine", "cuda_graphs", cuda_graphs)
        if input_shape is not None:
            _check_shape(input_shape)
        self.model, self.precision, self.strict, self.micro_batch = model, precision, strict, micro_batch
        self.cuda_graphs = cuda_graphs
        self._lock = threading.RLock()  # of what is known of the model, and of plans
        self._state = ModelState(model)
        self._plans: dict[tuple[int, int, int], Plan] = {}
        self._graphs: dict[tuple[int, int, int], Graph] = {}  # as captured
        self._observing: OrderedDict[Hashable, Plan] = OrderedDict()  # with outputs of modules kept apart
        self._last: Plan | None = None
        self._device = torch.device("cpu")
        self._groups: dict[tuple[int, ...], Groups] = {}
        self._recordings: weakref.WeakKeyDictionary[Plan, Recordings] = weakref.WeakKeyDictionary()
        shape = input_shape or configured_shape(model)
        with torch.inference_mode(False):
            check_model(model)
            if shape is not None:
                try:
                    self._plan_for(tuple(int(s) for s in shape))  # type: ignore[arg-type]
                except InputError:
                    if input_shape is not None:
                        raise  # the configuration may be another model's: the first images will tell

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule.name

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
        own = precision_for(self.precision, device_of(self.model)).forward
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
        layers: Sequence[str] = (),
        condition: conditions.Condition | Sequence[conditions.Condition] | None = None,
        check_conservation: bool = False,
    ) -> Attribution:
        """Relevance maps of ``images``.

        Parameters
        ----------
        images : Tensor
            ``[B, C, H, W]``, floating point, preprocessed as the model wants them.
        target : None, int, integer Tensor [B] or [B, K], floating Tensor [B, classes], or callable
            Classes to explain: the predicted ones, one for all, one or K per image (one forward pass for all
            K); or a seed (``contrast`` must be "none"): the relevance of every logit, or, of signed rules, the
            coefficient that its value is multiplied by, as a gradient's; or a function that computes
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
        layers : sequence of str
            Modules (names as of ``model.named_modules()``) whose outputs' relevance is wanted too.
        condition : dict of str to channels, or sequence of such dicts
            What of the relevance of these modules' outputs goes on; the rest is dropped (concept relevance, Achtibat
            et al. 2023). Channels are numbers along the first axis of an output ``[C, H, W]`` or ``[C]``, along the
            last of ``[tokens, C]``; a boolean mask that broadcasts to the shape of one image's output says anything
            else. K dicts give K maps of one class per image, as K targets do.
        check_conservation : bool
            Whether to say how much relevance every module has kept. For rules that conserve sums of relevance.

        Returns
        -------
        Attribution
            A map is zero everywhere where no relevance arrives.

        Raises
        ------
        InputError
            An argument has the wrong shape, dtype or range; a module does not exist, or has no output of its own
            under the rule. Nothing has been computed then.

        Notes
        -----
        With ``layers`` or ``condition`` nothing is fused across the modules that are named, and all tokens of the last
        blocks are computed: maps are those of a plain call but for rounding, and take longer. With these or with
        ``check_conservation`` images go through one by one on CPUs.
        """
        one_of("contrast", contrast, CONTRASTS)
        one_of("normalize", normalize, NORMALIZATIONS)
        if batch_size is not None:
            positive("attribute", "batch_size", batch_size)
        flag("attribute", "check_conservation", check_conservation)
        if check_conservation:
            self.rule.check_balance()
        restrictions, several_conditions = conditions.checked(condition)
        layers = _names(layers)
        images, plan, device = self._for_images(images, check)
        classes = int(plan.graph.output.example[1])
        wanted = Target(target, images.shape[0], classes, contrast, check)
        if several_conditions and wanted.several:
            raise InputError("several conditions are for one class per image: got targets [B, K] beside them")
        observed = tuple(dict.fromkeys([*layers, *(name for own in restrictions for name in own)]))
        if observed:
            plan = self._observing_plan(tuple(images.shape[1:]), observed)
        masks = conditions.masks(restrictions, plan)
        request = Request(wanted, normalize, validates(images, check), layers, masks, check_conservation)
        with _undisturbed(device):
            whole = request.unfilled(plan, images)
            if request.inspects and device.type == "cpu":
                ranges = [slice(i, i + 1) for i in range(images.shape[0])]
            else:
                ranges = self._ranges(plan, images.shape, wanted.count, wanted.contrast, batch_size, device)
            given = ((images[here].detach(), *wanted.operands(here)) for here in ranges)
            explain = partial(self._explain, plan, request)
            results = host_copies.batches(given, explain, device, plan.precision.forward, images.device)
            for here, parts in zip(ranges, results, strict=True):
                for all_of_them, part in zip(whole, parts, strict=True):
                    all_of_them[here] = part
        maps, logits, explained, *found = whole  # relevance of layers, then totals
        if not (wanted.several or several_conditions):
            maps, *found = (t.squeeze(1) for t in (maps, *found))
        if not (wanted.several or wanted.seeded):
            explained = explained.squeeze(1)
        return Attribution(
            maps,
            explained if wanted.given is None else wanted.given,
            logits,
            dict(zip(layers, found, strict=False)),
            Balance.of(plan, found[-1]) if check_conservation else None,
        )

    def refresh(self) -> None:
        """Capture the model and pack its weights anew at the next call, whatever has been noticed of changes."""
        with self._lock:
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
            (on CPUs, unless ``micro_batch`` says otherwise, always). Without gradients.

        Raises
        ------
        InputError
            Images have the wrong shape, dtype or values. (Numbers that overflow within the model may not show.)
        """
        return self.logits_and_scores(images, check=check)[0]

    def logits_and_scores(self, images: Tensor, *, check: bool | None = None) -> tuple[Tensor, Tensor]:
        """The model's logits, as :meth:`logits`, and the scores that are explained, both ``[B, classes]``.

        They are one tensor but for models that end in softmax or log_softmax, below which the scores are.
        """
        images, plan, device = self._for_images(images, check)
        classes = int(plan.graph.output.example[1])
        with _undisturbed(device):
            scores = torch.empty(images.shape[0], classes, dtype=plan.precision.output, device=images.device)
            found = torch.empty_like(scores) if plan.graph.ending else scores
            for here in self._ranges(plan, images.shape, 0, False, None, device):
                own = run_logits(plan, images[here].detach().to(device, plan.precision.forward))
                scores[here] = own
                if plan.graph.ending:
                    found[here] = returned(own, plan.graph)
        return found, scores

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
        # Imported here: attributing needs neither data sets nor metrics.
        from ramp_fast.evaluation.evaluator import evaluate, labelled

        named = labelled(methods, "method")
        if not any(method is self for method in named.values()):
            own = self.name
            if own in named:
                raise InputError(f"the engine is called {own!r} itself: give the method of that name another label")
            named = {own: self, **named}
        return evaluate(self, data, metrics, named, **options)

    def _explain(self, plan: Plan, request: Request, images: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        """Images that go through the model together, in the plan's dtype and on its device."""
        given, invalid = request.target.split(operands)
        if self.cuda_graphs and records(images) and request.target.function is None and not request.inspects:
            recordings = self._recordings.setdefault(plan, Recordings())
            key = *request.key(), ops.forced_backend()

            def explain(*inputs: Tensor) -> tuple[Tensor, ...]:
                return request.explain(plan, *inputs).tensors()

            found = Explained.of(recordings.call(key, explain, (images, *given)))
        else:
            found = request.explain(plan, images, *given)
        return request.finished(found, images, invalid, plan).tensors()

    def _for_images(self, images: Tensor, check: bool | None) -> tuple[Tensor, Plan, torch.device]:
        """Images, the plan for their shape and the model's device, once they and the model have been looked at."""
        check_images(images, check)
        torch.get_num_threads()  # until torch is asked, oneDNN's loops in a new thread take OpenMP's default number
        with torch.inference_mode(False), self._lock:
            with TURNS.looking():
                self._notice_changes(images.shape[0], check is not False)
            plan = self._plan_for(tuple(images.shape[1:]))  # type: ignore[arg-type]
            return images.clone() if images.is_inference() else images, plan, self._device

    def _ranges(
        self, plan: Plan, shape: torch.Size, targets: int, contrast: bool, batch_size: int | None, device: torch.device
    ) -> list[slice]:
        """Which images go through the model together; ``targets`` of each are explained (0: logits alone)."""
        ranges: list[slice] = []
        for size in self._sizes(plan, shape, targets, contrast, batch_size, device):
            start = ranges[-1].stop if ranges else 0
            ranges.append(slice(start, start + size))
        return ranges

    def _sizes(
        self, plan: Plan, shape: torch.Size, targets: int, contrast: bool, batch_size: int | None, device: torch.device
    ) -> list[int]:
        """How many images go through the model at a time."""
        batch = shape[0]
        if static_batch(plan.graph) is not None:
            return [1] * batch
        together = self.micro_batch or batch
        if batch_size is not None:
            together = min(together, batch_size)
        if self.micro_batch is None and device.type == "cpu":
            groups = self._groups.setdefault(tuple(shape[1:]), Groups())
            return groups.sizes(plan, shape, together, targets, contrast)
        return [min(together, batch - start) for start in range(0, batch, max(together, 1))]

    def _plan_for(self, shape: tuple[int, int, int]) -> Plan:
        with self._lock:
            plan = self._plans.get(shape)
            if plan is None:
                with TURNS.exporting():
                    graph = self._graphs[shape] = self._captured(shape)
                plan = self._plans[shape] = self._prepared(canonicalize(graph.copy(), self.rule.rewrites()))
                with TURNS.looking():
                    self._state.take_weights(self._constants())
            self._last = plan
            return plan

    def _observing_plan(self, shape: tuple[int, ...], names: tuple[str, ...]) -> Plan:
        """The plan for images of one shape with the outputs of these modules kept apart, all of each output."""
        with self._lock:
            key = shape, frozenset(names)
            plan = self._observing.get(key)
            if plan is None:
                graph = self._graphs[shape].copy()  # type: ignore[index]  # three sizes
                mark_outputs(graph, self.model, names)
                canonicalize(graph, [apply for apply in self.rule.rewrites() if apply is not hoist_slices])
                keep_outputs(graph)
                plan = self._observing[key] = self._prepared(graph)
                if len(self._observing) > _OBSERVING:
                    self._observing.popitem(last=False)
            self._observing.move_to_end(key)
            return plan

    def _captured(self, shape: tuple[int, int, int]) -> Graph:
        """The model's graph for images of one shape."""
        self._notice_weights(math.inf, True)  # all of them: they are summed up anew afterwards
        if not self._state.captured:
            check_model(self.model)
            warn_of_patches(self.model)
            self._state.take_structure()
            self._device = device_of(self.model)
        # Tensors made in inference mode can only be exported in it.
        with torch.inference_mode(any(t.is_inference() for t in tensors_of(self.model).values())):
            graph = capture(self.model, shape, strict=self.strict)
        self._state.learn(shape, graph.signature)
        return graph

    def _notice_changes(self, images: float, look: bool) -> None:
        """Forget plans, or pack weights again, where the model is no longer what it was."""
        if changes := self._state.changed_attributes():
            self._forget(changes)
        else:
            self._notice_weights(images, look)

    def _notice_weights(self, images: float, look: bool) -> None:
        changed, layout = self._state.changed_weights(images, look)
        if not changed:
            return
        packed = {id(tensor) for tensor in self._constants().values()}
        # Numbers may have decided about the graph (`float(self.scale)`), and so may what is not in it.
        read = any(plan.graph.weights_read for plan in self._plans.values())
        if layout or read or any(id(tensor) not in packed for tensor in changed):
            self._forget(())
            return
        for shape, plan in self._plans.items():  # new ones, since threads may be running the old
            self._plans[shape] = self._prepared(plan.graph)
        self._observing.clear()
        self._state.take_weights_again()

    def _constants(self) -> dict[str, Tensor]:
        """Every tensor that is a leaf of a captured graph."""
        return {
            f"{n.params.fqn} (constant)": n.params.tensor
            for plan in self._plans.values()
            for n in plan.graph.nodes
            if n.kind == g.PARAM
        }

    def _forget(self, suspects: Sequence[str]) -> None:
        """Capture anew; ``suspects`` names the attributes that are said to be the reason."""
        self._state.forget({shape: plan.graph.signature for shape, plan in self._plans.items()}, suspects)
        self._plans.clear()
        self._graphs.clear()
        self._observing.clear()
        self._groups.clear()
        self._last = None

    def _prepared(self, graph: Graph) -> Plan:
        if self._device.type == "cpu":
            keep_freed_memory()
        plan = Plan(graph, self.rule, precision_for(self.precision, self._device))
        plan.prepare()
        return plan


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


def _names(layers: Any) -> tuple[str, ...]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(n, str) for n in layers):
        raise InputError(f'layers must be a list of module names, for example ["layer4"]; got {layers!r}')
    return tuple(dict.fromkeys(layers))


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(is_whole(n) for n in shape):
        raise InputError(f"input_shape must be three positive integers (C, H, W), got {shape!r}")
