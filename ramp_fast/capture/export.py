"""Capture: a PyTorch module becomes a :class:`~ramp_fast.graph.Graph` through ``torch.export``.

Export runs without tracing into the user's module state: no hooks, no patched classes, no copies of
weights. Everything the vocabulary lacks is collected and reported at once.
"""

from __future__ import annotations

import inspect
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from ramp_fast import graph as g
from ramp_fast.capture.batch_axes import EXAMPLE_BATCH, locate_samples
from ramp_fast.capture.batch_branches import BatchBranches, Branch
from ramp_fast.capture.exporter import first_line, known_size, quiet, source_line, unprinted
from ramp_fast.capture.graph_cache import Agreement, Entry, entry_for, logits_of
from ramp_fast.capture.known_values import KnownValues
from ramp_fast.capture.preserve import preserved, user_hooks, watched_hooks, without_hooks
from ramp_fast.capture.translate import NeedsFunctionalForm, SizesFromValues, translate
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.graph import Graph


def capture(model: torch.nn.Module, image_shape: tuple[int, int, int], *, strict: bool = True) -> Graph:
    """Capture ``model`` for images of one shape.

    Its forward hooks are part of it where they change the result. That shows on one random image, run with and without
    them; what hooks keep on the way (in lists, attributes, closures) is put back.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode, floating point, mapping ``[B, C, H, W]`` to logits ``[B, classes]``.
    image_shape : (C, H, W)
    strict : bool
        Refuse operations outside the vocabulary. With False, elementwise and linear ones get the
        rule's generic definition, with one warning each.

    Raises
    ------
    InputError
        The model cannot take images of this shape.
    UnsupportedModelError
        Operations are unsupported (all of them are listed), samples of a batch are mixed, or the model cannot be
        exported.
    """
    with torch.no_grad(), preserved(model):
        entry = entry_for(model, image_shape, strict)
        if entry and (found := _read(entry, model, image_shape, strict)) is not None:
            return found
        hooked = _hooks_matter(model, image_shape)
        with nullcontext() if hooked else without_hooks(model):
            with BatchBranches() as decided:
                exported = _export(model, image_shape)
            try:
                graph = _graph(exported, strict)
            except SizesFromValues:
                try:
                    graph = _graph(_export_one(model, image_shape), strict)
                except SizesFromValues as error:
                    raise UnsupportedModelError(str(error)) from None
            document = entry and entry.encoded(graph)
            agreement = _agreement(graph, model, image_shape) if document else Agreement.NONE
            graph = _checked(graph, model, image_shape, strict, decided.branches())
            if entry and document and agreement:
                entry.write(document, decided.branches(), agreement)
    return graph


# Of a model that takes images one at a time it is not known by which sizes it decides: an even one, an odd one, and one
# that is large.
STATIC_SIZES = (EXAMPLE_BATCH, EXAMPLE_BATCH + 1, 17)


class Exported(NamedTuple):
    program: torch.export.ExportedProgram
    weights_read: bool  # numbers were read off weights: it holds for the present ones only


def _graph(exported: Exported, strict: bool) -> Graph:
    program = exported.program
    returned = program.graph.output_node().args[0]
    _check_outputs([n.meta.get("val") if isinstance(n, fx.Node) else n for n in returned])
    try:
        graph, _ = translate(program, strict)
    except NeedsFunctionalForm:
        graph, _ = translate(program.run_decompositions({}), strict)
    literals = _literals(program)
    for node in graph.nodes:
        if node.kind == g.PARAM:
            node.params.literal = node.params.fqn in literals
    graph.weights_read = exported.weights_read or any(n.kind == g.PARAM and n.params.read for n in graph.nodes)
    graph.prune()
    return graph


# What the exporter puts behind a tensor that a model makes while it is traced, as `torch.tensor(1.0)` does. Its numbers
# are Python's, since weights have no values then; a tensor that was there before is read without.
_FRESH = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


def _literals(program: torch.export.ExportedProgram) -> set[str]:
    """Names of constants that are made anew in every forward pass."""
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    inputs = (n for n in program.graph.nodes if n.op == "placeholder" and n.name in constants)
    return {constants[n.name] for n in inputs if n.users and all(user.target in _FRESH for user in n.users)}


def _checked(
    graph: Graph, model: torch.nn.Module, image_shape: tuple[int, int, int], strict: bool, branches: list[Branch]
) -> Graph:
    """A graph as it was translated, up to its logits, once it is known that the samples of a batch are kept apart."""
    _explain_scores(graph)
    _check_batches(model, image_shape, strict, static_batch(graph), branches)
    return graph


def _explain_scores(graph: Graph) -> None:
    """End a graph, as it was translated, at its logits, and locate the samples."""
    _leave_out_final_softmax(graph)
    if graph.ending:
        graph.prune()
    size = static_batch(graph)
    if size == 1:
        _one_sample(graph)
        return
    locate_samples(graph, symbolic=size is None)
    if graph.output.batch != g.BatchAxis():
        raise UnsupportedModelError(
            f"the model must return logits of shape [batch, classes]; the samples of its {list(graph.output.shape)} "
            f"are in axis {graph.output.batch.axis}, {graph.output.batch.inner} rows each"
        )
    graph.signature = graph.describe()


def _read(entry: Entry, model: torch.nn.Module, image_shape: tuple[int, int, int], strict: bool) -> Graph | None:
    """The graph in the cache, if it is this model's; a model to be refused is, by a new capture."""
    stored = entry.read()
    if stored is None or _agreement(stored.graph, model, image_shape) < stored.agreement:
        return None
    try:
        return _checked(stored.graph, model, image_shape, strict, stored.branches)
    except Exception:
        return None


def _agreement(graph: Graph, model: torch.nn.Module, image_shape: tuple[int, int, int]) -> Agreement:
    """How near a graph, as it was translated, comes to its model's result for a random image."""
    images = _example(model, 1, image_shape, noise=True)
    try:
        (expected,) = (r for r in _results(model, images.clone()) if r is not None)
        found = logits_of(graph, images)
    except Exception:  # a graph of another model, or one whose dtypes are made one only by an engine
        return Agreement.NONE
    if found.dtype != expected.dtype or not bool(expected.isfinite().all()) or not _close(found, expected):
        return Agreement.NONE
    return Agreement.EXACT if torch.equal(found, expected) else Agreement.CLOSE


def _example(
    model: torch.nn.Module, batch: int, image_shape: tuple[int, int, int], *, noise: bool = False
) -> torch.Tensor:
    """Images in the dtype and on the device of the model."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtype, device = (tensors[0].dtype, tensors[0].device) if tensors else (torch.float32, torch.device("cpu"))
    if not noise:
        return torch.zeros(batch, *image_shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *image_shape, dtype=torch.float32, generator=generator, device="cpu").to(device, dtype)


def _results(model: torch.nn.Module, images: torch.Tensor) -> list[Any]:
    """What the model returns for ``images``, as a flat list; what it writes to its buffers is undone."""
    devices = [images.device] if images.is_cuda else []
    buffers = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    try:
        with torch.random.fork_rng(devices), torch.autocast(images.device.type, enabled=False), quiet():
            return pytree.tree_leaves(model(images))
    finally:
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _hooks_matter(model: torch.nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether the user's hooks change what the model computes, or return what may be a change for other images."""
    if not user_hooks(model):
        return False
    images = _example(model, 1, image_shape, noise=True)
    try:
        with without_hooks(model):
            plain = _results(model, images)
    except Exception:  # hooks may complete the model: the exporter will tell
        return True
    with watched_hooks(model) as changing:
        try:
            with torch.enable_grad():  # hooks may ask for gradients of what they see
                hooked = _results(model, images.clone().requires_grad_())
        except Exception:  # or for numbers, which tensors with gradients do not give
            try:
                hooked = _results(model, images)
            except Exception as error:
                raise UnsupportedModelError(
                    f"{type(model).__name__} does not run with its hooks, and runs without them: {first_line(error)}"
                ) from error
    if changing:  # for other images, if not for this one
        return True
    return len(plain) != len(hooked) or not all(_close(a, b) for a, b in zip(plain, hooked, strict=True))


def _close(a: Any, b: Any) -> bool:
    """Whether two results agree but for rounding, which is some units in the last place: to half of their digits."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return bool(a is b or a == b)
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and bool((a == b).all())
    a, b = a.detach(), b.detach()
    size = float(b.nan_to_num().abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=torch.finfo(a.dtype).eps ** 0.5 * size, equal_nan=True)


def _check_batches(
    model: torch.nn.Module, image_shape: tuple[int, int, int], strict: bool, static: int | None, branches: list[Branch]
) -> None:
    """An image must get the same logits in batches of other sizes: the graph is the model for one size.

    Whether a model computes something else for other sizes is looked at where it decides by them (``branches``), and
    where it was captured for one image (``static``): then nobody has seen what it does with sizes.
    """
    places = {size: branch.place for branch in reversed(branches) for size in branch.sizes}
    sizes = sorted({*places, *(STATIC_SIZES if static is not None else ())})
    if not sizes:
        return
    captured = static or EXAMPLE_BATCH
    images = _example(model, -(-sizes[-1] // captured) * captured, image_shape, noise=True)
    parts: list[list[torch.Tensor]] = []  # of the results, as far as they are needed
    for size in sizes:
        try:
            together = _logits(model, images[:size])
            while len(parts) * captured < size:
                start = len(parts) * captured
                parts.append(_logits(model, images[start : start + captured]))
        except Exception:
            continue  # it does not take so many
        apart = (torch.cat(several)[:size] for several in zip(*parts, strict=True))
        if all(_close(a, b) for a, b in zip(apart, together, strict=True)):
            continue
        if static is not None and size == EXAMPLE_BATCH:  # this names the operation, if one mixes
            _explain_scores(_graph(_exported(model, EXAMPLE_BATCH, image_shape, symbolic=False), strict))
        beside = "alone" if captured == 1 else f"in one of {captured}"
        reason = "Does its forward pass use the size of the batch?"
        if size in places:
            reason = f"Its forward pass decides by the size of the batch ({places[size]})."
        raise UnsupportedModelError(
            f"{type(model).__name__} gives an image other logits in a batch of {size} than {beside}: a map would "
            f"depend on the images beside it. {reason}"
        )


def _logits(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a model returns for images, which stay what they are."""
    return [r for r in _results(model, images.clone()) if isinstance(r, torch.Tensor)]


def _check_outputs(values: list[Any]) -> None:
    """One tensor of logits."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if len(tensors) != 1 or len([v for v in values if v is not None]) != 1:
        kinds = ", ".join("a tensor" if isinstance(v, torch.Tensor) else type(v).__name__ for v in values) or "nothing"
        raise UnsupportedModelError(
            f"the model must return exactly one tensor, the logits; it returns {len(values)} values ({kinds}). "
            "Wrap it in a module that returns the logits alone."
        )
    (logits,) = tensors
    if logits.dim() != 2:
        sizes = ["batch" if not isinstance(s, int) else s for s in logits.shape]
        of_pixels = ", for example the mean of the scores of all pixels, .mean((2, 3))" if logits.dim() == 4 else ""
        raise UnsupportedModelError(
            f"the model must return logits of shape [batch, classes]; it returns {sizes}. "
            f"Wrap it in a module that returns one score for each class{of_pixels}."
        )
    if not logits.is_floating_point():
        raise UnsupportedModelError(
            f"the model must return logits, which are floating point; it returns {logits.dtype}"
        )


def _one_sample(graph: Graph) -> None:
    """Whatever is computed from one image belongs to it."""
    for node in graph.nodes:
        if not node.constant and node.shape:
            node.batch = g.BatchAxis(0, 1, node.shape[0] if isinstance(node.shape[0], int) else 1)


def _leave_out_final_softmax(graph: Graph) -> None:
    """Class scores are explained, not the probabilities or log-probabilities that a model makes of them at its end.

    No log-probability is positive, and a probability is about all classes at once.
    """
    while True:
        last = graph.output
        scores = last.operands[0] if last.operands else last
        per_class = last.kind in (g.SOFTMAX, g.SHIFT) and last.params.dim % max(len(last.shape), 1) == 1
        logarithm = last.kind == g.ACTIVATION and last.params.function == "log" and scores.kind == g.SOFTMAX
        if len(last.shape) != 2 or not (per_class or logarithm):
            return
        name = {g.SOFTMAX: "softmax", g.SHIFT: "log_softmax", g.ACTIVATION: "log"}[last.kind]
        graph.output, graph.ending = scores, (name, *graph.ending)


def static_batch(graph: Graph) -> int | None:
    """The batch size the model insists on, or None where any batch is possible."""
    size = graph.input.shape[0]
    return size if isinstance(size, int) else None


def _export(model: torch.nn.Module, image_shape: tuple[int, int, int]) -> Exported:
    """The exported program: for any batch where the exporter finds a way, else for one image."""
    try:
        exported = _exported(model, EXAMPLE_BATCH, image_shape)
    except Exception as error:
        return _export_one(model, image_shape, error)
    if known_size(_images_of(exported.program).shape[0]) is not None:
        # The exporter gave up on the batch silently: one image at a time is always right.
        return _export_one(model, image_shape)
    return exported


def _exported(
    model: torch.nn.Module, batch: int, image_shape: tuple[int, int, int], *, symbolic: bool = True
) -> Exported:
    shapes: Any = None
    if symbolic and batch > 1:
        shapes = ({0: torch.export.Dim.AUTO},)
        first = next(iter(_parameters(model)), None)
        if first is not None and first.kind is first.VAR_POSITIONAL:  # forward(self, *inputs) gets a tuple
            shapes = (shapes,)
    images = _example(model, batch, image_shape)
    known = KnownValues(model)
    with quiet(), unprinted(), known:
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    return Exported(program, known.read)


def _export_one(
    model: torch.nn.Module, image_shape: tuple[int, int, int], failure: Exception | None = None
) -> Exported:
    """The program for one image, or why there is none; ``failure`` is what the export of a batch ended with."""
    try:
        return _exported(model, 1, image_shape)
    except Exception as error:
        failure = failure or error
    name = type(model).__name__
    _check_arguments(model)
    try:
        results = _results(model, _example(model, 1, image_shape))
    except Exception as error:
        try:
            _results(model, _example(model, EXAMPLE_BATCH, image_shape))
        except Exception:
            raise InputError(
                f"the model cannot take images of shape {list(image_shape)}: {first_line(error)}"
            ) from error
        raise UnsupportedModelError(
            f"{name} runs on {EXAMPLE_BATCH} images and not on one: it must take batches of any size"
        ) from error
    _check_outputs(results)  # a detector's boxes are a better reason than how it finds them
    if isinstance(failure, GuardOnDataDependentSymNode):
        raise UnsupportedModelError(
            f"the forward pass of {name} decides by values of its tensors{_place(failure)}: control flow that depends "
            f"on values must be rewritten ({first_line(failure)})"
        ) from failure
    raise UnsupportedModelError(f"torch.export cannot capture {name}: {first_line(failure)}") from failure


def _parameters(model: torch.nn.Module) -> list[inspect.Parameter]:
    """What the forward method takes, as far as Python knows."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _check_arguments(model: torch.nn.Module) -> None:
    """The images must be all that the model needs."""
    parameters = _parameters(model)
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (*named, inspect.Parameter.KEYWORD_ONLY)]
    first = [p.name for p in parameters if p.kind in (*named, inspect.Parameter.VAR_POSITIONAL)][:1]
    more = [name for name in needed if name not in first]
    if more:
        raise UnsupportedModelError(
            f"the model must take exactly one input, the images; {type(model).__name__}.forward also needs "
            f"{', '.join(more)}. Wrap it in a module whose forward takes the images alone."
        )


def _place(error: BaseException) -> str:
    """The line of the model that an error of the exporter comes from, if it is known."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")]
    frames = [f for f in frames if Path(f.filename).parent != Path(__file__).parent]
    return f" ({source_line(frames[-1].filename, frames[-1].lineno or 0)})" if frames else ""


def _images_of(program: torch.export.ExportedProgram) -> torch.Tensor:
    """The example that stands for the images."""
    sample = next(n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
    images: torch.Tensor = sample.meta["val"]
    return images
