"""Capture: a PyTorch module becomes a :class:`~ramp_fast.graph.Graph` through ``torch.export``.

Export runs without tracing into the user's module state: no hooks, no patched classes, no copies of
weights. Everything the vocabulary lacks is collected and reported at once.
"""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ramp_fast import graph as g
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.graph import Graph, Node
from ramp_fast.samples import EXAMPLE_BATCH, locate_samples
from ramp_fast.vocabulary import VOCABULARY, Unsupported, bind

# Nodes that compute nothing: shape and dtype guards left by export.
_GUARDS = ("_assert", "sym_constrain", "_guards_fn")
# The result depends on the shape of the first operand only.
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor"}
# Of the second operand only the shape (or dtype) is read.
_SHAPED_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}


class _NeedsFunctionalForm(Exception):
    """An in-place operation writes through a view that is read later."""


def capture(model: torch.nn.Module, image_shape: tuple[int, int, int], *, strict: bool = True) -> Graph:
    """Capture ``model`` for images of one shape.

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
        Operations are unsupported (all of them are listed), or the model cannot be exported.
    """
    program = _export(model, image_shape)
    try:
        graph, batch_symbol = _translate(program, strict)
    except _NeedsFunctionalForm:
        graph, batch_symbol = _translate(program.run_decompositions({}), strict)
    if len(graph.output.shape) != 2:
        raise UnsupportedModelError(
            f"the model must return logits of shape [batch, classes]; it returns {list(graph.output.shape)}. "
            "Wrap it in a module that returns the logits alone."
        )
    graph.prune()
    if batch_symbol is None:
        _one_sample(graph)
    else:
        locate_samples(graph)
    if batch_symbol is not None and graph.output.batch != g.BatchAxis():
        raise UnsupportedModelError(
            f"the model must return logits of shape [batch, classes]; the samples of its {list(graph.output.shape)} "
            f"are in axis {graph.output.batch.axis}, {graph.output.batch.inner} rows each"
        )
    return graph


def _one_sample(graph: Graph) -> None:
    """Whatever is computed from one image belongs to it."""
    for node in graph.nodes:
        if not node.constant and node.shape:
            node.batch = g.BatchAxis(0, 1, node.shape[0] if isinstance(node.shape[0], int) else 1)


def static_batch(graph: Graph) -> int | None:
    """The batch size the model insists on, or None where any batch is possible."""
    size = graph.input.shape[0]
    return size if isinstance(size, int) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings about the model's internals from the user's terminal."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _attributes_restored(model: torch.nn.Module) -> Iterator[None]:
    """The exporter leaves copies of lists and dicts among a module's attributes: put the user's own back.

    What a model caches in them while it is traced would be tensors without values: the contents are put back too.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    contents = [(own, copy.copy(own)) for own in _containers(v for _, a in before for v in a.values())]
    try:
        yield
    finally:
        for own, kept in contents:
            if not _same_items(own, kept):
                own.clear()
                (own.extend if isinstance(own, list) else own.update)(kept)
        for module, attributes in before:
            now = vars(module)
            for name in [n for n in now if n not in attributes]:
                del now[name]
            for name, value in attributes.items():
                if now.get(name, now) is not value:
                    now[name] = value


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """Every dict, list and set among ``values``, nested ones included, each once."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if type(value) in (dict, list, set, OrderedDict) and id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _same_items(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects, compared by identity."""
    if isinstance(a, set):
        return {id(v) for v in a} == {id(v) for v in b}
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    return len(a) == len(b) and all(v is w for v, w in zip(a, b, strict=True))


def _export(model: torch.nn.Module, image_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = torch.device("cpu") if parameter is None else parameter.device

    def export(batch: int) -> torch.export.ExportedProgram:
        example = torch.zeros(batch, *image_shape, dtype=dtype, device=device)
        shapes = ({0: torch.export.Dim.AUTO},) if batch > 1 else None
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)

    with torch.no_grad(), _quiet(), _attributes_restored(model):
        try:
            program = export(EXAMPLE_BATCH)
        except Exception as error:
            try:
                model(torch.zeros(1, *image_shape, dtype=dtype, device=device))
            except Exception as failure:
                raise InputError(
                    f"the model cannot take images of shape {list(image_shape)}: {_first_line(failure)}"
                ) from failure
            try:
                program = export(1)
            except Exception:
                raise UnsupportedModelError(
                    f"torch.export cannot capture {type(model).__name__}: {_first_line(error)}. "
                    "Control flow that depends on values must be rewritten."
                ) from error
        else:
            if _known_size(_images_of(program).shape[0]) is not None:
                # The exporter gave up on the batch silently: one image at a time is always right.
                program = export(1)
    return program


def _images_of(program: torch.export.ExportedProgram) -> torch.Tensor:
    """The example that stands for the images."""
    sample = next(n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
    images: torch.Tensor = sample.meta["val"]
    return images


def _known_size(size: int | torch.SymInt) -> int | None:
    """A size that the exporter took for fixed, if it did: then it may still come as a symbol."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _translate(program: torch.export.ExportedProgram, strict: bool) -> tuple[Graph, Any]:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        names = list(signature.buffers_to_mutate.values()) + list(signature.user_inputs_to_mutate.values())
        raise UnsupportedModelError(f"the model writes to its own state in the forward pass: {', '.join(names)}")
    if len(signature.user_inputs) != 1:
        raise UnsupportedModelError("the model must take exactly one input, the images")
    if len(signature.user_outputs) != 1:
        raise UnsupportedModelError(
            f"the model must return exactly one tensor, the logits; it returns {len(signature.user_outputs)}. "
            "Wrap it in a module that returns the logits alone."
        )
    leaves: dict[str, str] = {}
    for mapping in (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        signature.inputs_to_lifted_tensor_constants,
    ):
        leaves.update(mapping)
    translator = _Translator(program, leaves, strict)
    for node in program.graph.nodes:
        translator.visit(node)
    if translator.unsupported:
        lines = "\n".join(f"  {name}  in  {module or '(model)'}" for name, module in translator.unsupported)
        raise UnsupportedModelError(
            "operations that no rule is known for:\n" + lines + "\n"
            "docs/rules.md lists the supported ones. Engine(..., strict=False) applies the generic definition "
            "to elementwise and linear operations.",
            translator.unsupported,
        )
    assert translator.input is not None
    assert translator.output is not None
    return Graph(translator.nodes, translator.input, translator.output), translator.batch_symbol


class _Translator:
    """Walks the exported graph once and emits nodes of the vocabulary."""

    def __init__(self, program: torch.export.ExportedProgram, leaves: dict[str, str], strict: bool) -> None:
        self.leaves = leaves
        self.tensors: dict[str, torch.Tensor] = {**dict(program.state_dict), **program.constants}
        self.strict = strict
        self.nodes: list[Node] = []
        self.env: dict[fx.Node, Node] = {}
        self.root: dict[fx.Node, fx.Node] = {}  # storage owner, for in-place operations
        self.unsupported: list[tuple[str, str]] = []
        self.input: Node | None = None
        self.output: Node | None = None
        self.batch_symbol: Any = None
        self.position = {node: i for i, node in enumerate(_flattened(program.graph_module))}
        self.inlined: dict[fx.Node, list[Any]] = {}
        self.names: dict[str, int] = {}
        self.sizes: dict[Any, tuple[int | str, int]] = {}

    def emit(self, node: Node, origin: fx.Node) -> Node:
        taken = self.names.setdefault(node.name, 0)
        self.names[node.name] += 1
        if taken:  # regions name their operations anew
            node.name = f"{node.name}_{taken}"
        self.nodes.append(node)
        self.env[origin] = node
        return node

    def resolve(self, value: Any) -> Any:
        """``value`` with the nodes of this graph in place of the exporter's."""
        if isinstance(value, fx.Node):
            return self.env[value]
        if isinstance(value, (tuple, list)):
            return type(value)(self.resolve(v) for v in value)
        if isinstance(value, dict):
            return {k: self.resolve(v) for k, v in value.items()}
        return value

    def shape(self, value: Any) -> tuple[int | str, ...]:
        """Sizes for people: the batch shows by name."""
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(s if isinstance(s, int) else self.size(s)[0] for s in value.shape)

    def example(self, value: Any) -> tuple[int, ...]:
        """Sizes at the example batch; for a size itself, its value."""
        if isinstance(value, torch.Tensor):
            return tuple(self.example(s)[0] for s in value.shape)
        if isinstance(value, torch.SymInt):
            return (self.size(value)[1],)
        return (value,) if isinstance(value, (bool, int)) else ()

    def size(self, value: torch.SymInt) -> tuple[int | str, int]:
        """A size for people, "batch", "4*batch" or what else it is, and its value at the example batch."""
        expression = value.node.expr
        if expression not in self.sizes:
            known = value.node.maybe_as_int()
            if known is not None:
                self.sizes[expression] = known, known
            else:
                symbol = self.batch_symbol.node.expr
                here, more = (int(expression.subs(symbol, n)) for n in (EXAMPLE_BATCH, EXAMPLE_BATCH + 1))
                each = here // EXAMPLE_BATCH
                name = str(value).replace(str(symbol), "batch")
                if (here, more) == (each * EXAMPLE_BATCH, each * (EXAMPLE_BATCH + 1)):
                    name = "batch" if each == 1 else f"{each}*batch"
                self.sizes[expression] = name, here
        return self.sizes[expression]

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            self.output = self.env[node.args[0][0]]  # type: ignore[index]
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "get_attr" and isinstance(_submodule(node), fx.GraphModule):
            return  # the body of a region, inlined where it is called
        elif node.op == "get_attr" or node.op == "call_module":
            self._unsupported(node, str(node.target))

    def _inline(self, node: fx.Node) -> None:
        """A region under its own autocast or grad mode: its operations take their place in the graph."""
        body = _body(node)
        assert body is not None
        enabled, at = (node.args[2], 4) if "autocast" in str(node.target) else (False, 1)
        if enabled:
            self._unsupported(node, "a region under autocast (the engine's precision decides the dtype)")
        arguments = iter(node.args[at + 1 :])
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                outer = next(arguments)
                assert isinstance(outer, fx.Node)
                self.env[inner] = self.env[outer]
                self.root[inner] = self.root.get(outer, outer)
            elif inner.op == "output":
                results = inner.args[0]
                self.inlined[node] = list(results) if isinstance(results, (tuple, list)) else [results]
            else:
                self.visit(inner)

    def _placeholder(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if node.name in self.leaves:
            fqn = self.leaves[node.name]
            leaf = Node(node.name, g.PARAM, _no_call, params={"tensor": self.tensors[fqn], "fqn": fqn})
            leaf.shape, leaf.example = self.shape(value), self.example(value)
            leaf.params["floating"] = value.is_floating_point()
            self.emit(leaf, node)
            return
        if not isinstance(value, torch.Tensor):
            self.emit(Node(node.name, g.CONST, _no_call), node)
            return
        batch: Any = value.shape[0]
        if _known_size(batch) is None:
            self.batch_symbol = batch
        leaf = Node(node.name, g.INPUT, _no_call, shape=self.shape(value), example=self.example(value))
        self.input = self.emit(leaf, node)

    def _call(self, node: fx.Node) -> None:
        name = _short_name(node.target)
        if name.startswith(_GUARDS):
            return
        if _body(node) is not None:
            self._inline(node)
            return
        if node.target is operator.getitem and node.args[0] in self.inlined:
            inner = self.inlined[node.args[0]][node.args[1]]  # type: ignore[index]
            self.env[node] = self.env[inner]
            self.root[node] = self.root.get(inner, inner)
            return
        value = node.meta.get("val")
        args, kwargs = self.resolve(node.args), self.resolve(node.kwargs)
        target: Any = node.target
        mutated: fx.Node | None = None
        if isinstance(target, torch._ops.OpOverload) and _is_inplace(target):
            (mutated, *_) = node.all_input_nodes
            self._check_aliases(node, mutated)
            target = _functional(target)
            name = _short_name(target)
        module = _module_name(node)
        out = Node(node.name, "", target, tuple(args), dict(kwargs), module=module, shape=self.shape(value))
        out.example = self.example(value)
        variable = any(not ref.constant for ref in out.references())
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            out.kind = g.INT
        elif not variable or _constant_valued(name.split(".")[0], args):
            out.kind = g.CONST
            out.params["floating"] = isinstance(value, torch.Tensor) and value.is_floating_point()
        else:
            replacement = self._lookup(out, name, node)
            if replacement is not None:
                self.env[node] = replacement
                self._track(node, mutated)
                return
        self.nodes.extend(out.params.pop("before", ()))  # what the handler split off
        self.emit(out, node)
        self._track(node, mutated)

    def _lookup(self, out: Node, name: str, origin: fx.Node) -> Node | None:
        """Fill in ``out``'s kind; return another node where the operation does nothing."""
        if out.target is operator.getitem:
            source = out.args[0]
            if source.kind != g.PARTS:  # one of several results, of which the first is the value
                if out.args[1] != 0:
                    if origin.users:
                        self._unsupported(origin, f"a secondary result of {source.target}")
                    return source  # type: ignore[no-any-return]
                source.shape, source.example = out.shape, out.example
                return source  # type: ignore[no-any-return]
            out.kind, out.operands = g.PART, [source]
            out.params = {"index": out.args[1]}
            return None
        handler = VOCABULARY.get(name)
        try:
            if handler is None:
                raise Unsupported(name)
            bound = bind(out.target, out.args, out.kwargs)
            return handler(out, bound)
        except Unsupported as error:
            if not self.strict and self._generic(out, origin):
                warnings.warn(
                    f"{name} in {out.module or 'the model'} is outside the vocabulary: the rule's generic "
                    "definition is applied through autograd",
                    stacklevel=2,
                )
                return None
            self._unsupported(origin, str(error))
            out.kind = g.GENERIC
            return None

    def _generic(self, out: Node, origin: fx.Node) -> bool:
        """Whether an unknown operation is elementwise in its only variable operand (then it is marked so)."""
        sources = [n for n in dict.fromkeys(out.references()) if not n.constant]
        if len(sources) != 1 or out.shape != sources[0].shape or torch.Tag.pointwise not in origin.target.tags:  # type: ignore[union-attr]
            return False
        out.kind, out.operands = g.GENERIC, sources
        return True

    def _unsupported(self, node: fx.Node, what: str) -> None:
        entry = (what, _module_name(node))
        if entry not in self.unsupported:
            self.unsupported.append(entry)

    def _track(self, node: fx.Node, mutated: fx.Node | None) -> None:
        if mutated is not None:
            before = self.env[mutated]
            for alias in self._aliases(mutated):  # the same tensor under other names
                if self.env.get(alias) is before:
                    self.env[alias] = self.env[node]
            self.root[node] = self.root.get(mutated, mutated)
        elif isinstance(node.target, torch._ops.OpOverload) and _is_view(node.target) and node.all_input_nodes:
            source = node.all_input_nodes[0]
            self.root[node] = self.root.get(source, source)

    def _check_aliases(self, node: fx.Node, mutated: fx.Node) -> None:
        here = self.position[node]
        aliases = self._aliases(mutated)
        plain = not any(_may_copy(n) for n in aliases)
        for other in aliases:
            if other is mutated or (plain and self.env.get(other) is self.env[mutated]):
                continue
            if any(self.position[user] > here for user in other.users):
                raise _NeedsFunctionalForm

    def _aliases(self, node: fx.Node) -> list[fx.Node]:
        """Every name of the storage that ``node`` is, or may be, a view of; itself included."""
        owner = self.root.get(node, node)
        return [owner, *(n for n, r in self.root.items() if r is owner and n is not owner)]


def _submodule(node: fx.Node) -> Any:
    return getattr(node.graph.owning_module, str(node.target), None)


def _body(node: fx.Node) -> fx.GraphModule | None:
    """The body of a region that runs under another autocast or grad mode."""
    if not str(node.target).startswith(("wrap_with_autocast", "wrap_with_set_grad_enabled")):
        return None
    at = 4 if "autocast" in str(node.target) else 1
    body = _submodule(node.args[at])  # type: ignore[arg-type]
    assert isinstance(body, fx.GraphModule)
    return body


def _flattened(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes in execution order, with those of nested regions where they run."""
    for node in module.graph.nodes:
        if node.op == "call_function" and (body := _body(node)) is not None:
            yield from _flattened(body)
        yield node


def _no_call() -> None:
    raise RuntimeError("a leaf of the graph is never called")


def _short_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.")
    return getattr(target, "__name__", str(target))


def _constant_valued(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the images decide nothing but the shape."""
    return name in _SHAPE_ONLY or (name in _SHAPED_LIKE and isinstance(args[0], Node) and args[0].constant)


def _is_inplace(target: torch._ops.OpOverload) -> bool:
    arguments = target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def _is_view(target: torch._ops.OpOverload) -> bool:
    # reshape, flatten and contiguous declare an alias only sometimes: treat them as views.
    declared = any(a.alias_info is not None for a in target._schema.arguments)
    return declared or _short_name(target).split(".")[0] in {"reshape", "flatten", "contiguous", "to", "dropout"}


def _may_copy(node: fx.Node) -> bool:
    """Whether the result is a view of the operand or a copy, depending on memory order and dtype."""
    return _short_name(node.target).split(".")[0] in {"reshape", "flatten", "contiguous", "to"}


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    packet = getattr(torch.ops.aten, target._schema.name.split("::")[1].rstrip("_"))
    overload: torch._ops.OpOverload = getattr(packet, target._overloadname)
    return overload


def _module_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if isinstance(path, str) and not path.startswith("_empty_nn_module_stack"):
            return path
    return ""
