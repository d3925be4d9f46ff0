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
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from ramp_fast import graph as g
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.graph import Graph, Node
from ramp_fast.known import KnownValues
from ramp_fast.vocabulary import VOCABULARY, InSteps, Unsupported, bind, composite

# Nodes that compute nothing: shape and dtype guards left by export.
_GUARDS = ("_assert", "sym_constrain", "_guards_fn")
# The result depends on the shape of the first operand only.
_SHAPE_ONLY = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "fill", "zero"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
}
# The values are the first operand's; the second one says only what shape or dtype they get.
_SHAPE_OF_SECOND = {"expand_as", "view_as", "reshape_as", "type_as"}

EXAMPLE_BATCH = 2  # torch.export specialises a batch of 1


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
    program, weights_read = _export(model, image_shape)
    try:
        graph, batch_symbol = _translate(program, strict)
    except _NeedsFunctionalForm:
        graph, batch_symbol = _translate(program.run_decompositions({}), strict)
    graph.weights_read = weights_read
    _leave_out_final_softmax(graph)
    if len(graph.output.shape) != 2:
        raise UnsupportedModelError(
            f"the model must return logits of shape [batch, classes]; it returns {list(graph.output.shape)}. "
            "Wrap it in a module that returns the logits alone."
        )
    graph.prune()
    _infer_batch_axes(graph, batch_symbol is not None)
    if batch_symbol is not None and graph.output.batch != g.BatchAxis():
        raise UnsupportedModelError(
            f"the model must return logits of shape [batch, classes]; the samples of its {list(graph.output.shape)} "
            f"are in axis {graph.output.batch.axis}, {graph.output.batch.inner} rows each"
        )
    return graph


def _leave_out_final_softmax(graph: Graph) -> None:
    """Class scores are explained, not the probabilities or log-probabilities that a model makes of them.

    No log-probability is positive, and a probability is about all classes at once.
    """
    while True:
        last = graph.output
        scores = last.operands[0] if last.operands else last
        per_class = last.kind in (g.SOFTMAX, g.SHIFT) and last.params["dim"] % max(len(last.shape), 1) == 1
        logarithm = last.kind == g.ACTIVATION and last.params["function"] == "log" and scores.kind == g.SOFTMAX
        if len(last.shape) != 2 or not (per_class or logarithm):
            return
        graph.output = scores


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


def _export(model: torch.nn.Module, image_shape: tuple[int, int, int]) -> tuple[torch.export.ExportedProgram, bool]:
    """The exported program, and whether it holds for the present weights only."""
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = torch.device("cpu") if parameter is None else parameter.device

    def export(batch: int) -> torch.export.ExportedProgram:
        example = torch.zeros(batch, *image_shape, dtype=dtype, device=device)
        shapes = ({0: torch.export.Dim.AUTO},) if batch > 1 else None
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)

    known = KnownValues(model)
    with torch.no_grad(), _quiet(), _attributes_restored(model), known:
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
            sample = next(n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
            if isinstance(sample.meta["val"].shape[0], int):
                # The exporter gave up on the batch silently: one image at a time is always right.
                program = export(1)
    return program, known.read


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
        self.values: dict[Node, Any] = {}  # the exporter's own, without contents
        self.position = {node: i for i, node in enumerate(_flattened(program.graph_module))}
        self.inlined: dict[fx.Node, list[Any]] = {}
        self.names: dict[str, int] = {}

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
        return tuple(s if isinstance(s, int) else str(s).replace(str(self.batch_symbol), "batch") for s in value.shape)

    def example(self, value: Any) -> tuple[int, ...]:
        """Sizes at the example batch; for a size itself, its value."""
        if isinstance(value, torch.Tensor):
            return tuple(self.example(s)[0] for s in value.shape)
        if isinstance(value, torch.SymInt):
            return (int(value.node.expr.subs(self.batch_symbol.node.expr, EXAMPLE_BATCH)),)
        return (value,) if isinstance(value, (bool, int)) else ()

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            self.output = self.env[node.args[0][0]]  # type: ignore[index]
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "get_attr" and isinstance(_submodule(node), fx.GraphModule):
            return  # the body of a region, inlined where it is called
        elif node.op == "get_attr" and isinstance(value := _submodule(node), torch.Tensor):
            leaf = Node(node.name, g.CONST, lambda: value, shape=tuple(value.shape), example=tuple(value.shape))
            leaf.params["floating"], leaf.dtype = value.is_floating_point(), value.dtype
            self.values[self.emit(leaf, node)] = value
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
            leaf.params["floating"], leaf.dtype = value.is_floating_point(), value.dtype
            self.values[self.emit(leaf, node)] = value
            return
        if not isinstance(value, torch.Tensor):
            self.emit(Node(node.name, g.CONST, _no_call), node)
            return
        batch: Any = value.shape[0]
        if not isinstance(batch, int):
            self.batch_symbol = batch
        leaf = Node(node.name, g.INPUT, _no_call, shape=self.shape(value), example=self.example(value))
        self.input = self.emit(leaf, node)
        self.values[leaf] = value

    def _call(self, node: fx.Node) -> None:
        name = _short_name(node.target)
        if name.startswith(_GUARDS):
            return
        if _body(node) is not None:
            self._inline(node)
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._unsupported(node, f"{name} (write it with plain operations)")
            self.emit(Node(node.name, g.GENERIC, node.target), node)
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
        out.dtype = value.dtype if isinstance(value, torch.Tensor) else None
        variable = any(not ref.constant for ref in out.references())
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            out.kind = g.INT
        elif not variable or self._shape_only(out, name):
            out.kind = g.CONST
            out.params["floating"] = isinstance(value, torch.Tensor) and value.is_floating_point()
            if _draws(out):
                self._unsupported(node, f"{name}, which draws random numbers (maps would change from call to call)")
        else:
            replacement = self._lookup(out, name, node)
            if replacement is not None:
                self.env[node] = replacement
                self._track(node, mutated)
                return
            if node in self.inlined:
                return
        carriers = [n for n in out.references() if not n.constant]
        out.decided = out.kind == g.DECISION or (bool(carriers) and all(n.decided for n in carriers))
        self.emit(out, node)
        self.values[out] = value
        self._track(node, mutated)

    @staticmethod
    def _shape_only(out: Node, name: str) -> bool:
        plain = name.split(".")[0]
        if plain in _SHAPE_ONLY:
            return all(n.constant for n in g.nodes_in((out.args[1:], out.kwargs)))
        second = plain in _SHAPE_OF_SECOND or name == "to.other"
        if plain == "copy":
            return bool(out.args[1].constant)
        return second and isinstance(out.args[0], Node) and out.args[0].constant

    def _in_steps(self, steps: InSteps, origin: fx.Node) -> Node | None:
        """Operations that say the same take the place of ``origin``: the function is traced, its nodes are visited."""
        references = list(dict.fromkeys(g.nodes_in((steps.args, steps.kwargs))))
        if any(n.kind == g.INT or n not in self.values for n in references):
            raise Unsupported(f"{_short_name(origin.target)} with sizes of the batch")
        values = [self.values[n] for n in references]

        def run(*tensors: Any) -> Any:
            place = dict(zip(references, tensors, strict=True)).__getitem__
            return steps.function(*g.map_nodes(place, steps.args), **g.map_nodes(place, steps.kwargs))

        mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
        try:
            with mode, _quiet():
                traced = make_fx(run, pre_dispatch=steps.pre_dispatch)(*values)
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(f"{_short_name(origin.target)}: {_first_line(error)}") from error
        if isinstance(self.batch_symbol, torch.SymInt) and self.batch_symbol.node.maybe_as_int() is not None:
            raise Unsupported(f"{_short_name(origin.target)}, which PyTorch composes for one size of the batch")
        arguments = iter(references)
        for inner in traced.graph.nodes:
            self.position[inner] = self.position.get(origin, 0)
            inner.meta["nn_module_stack"] = origin.meta.get("nn_module_stack")
            if inner.op == "placeholder":
                self.env[inner] = next(arguments)
                outer = next((n for n in origin.all_input_nodes if self.env[n] is self.env[inner]), inner)
                self.root[inner] = self.root.get(outer, outer)
            elif inner.op == "output":
                results = inner.args[0]
                if isinstance(results, (tuple, list)):
                    self.inlined[origin] = list(results)
                    return None
                return self.env[results]
            else:
                self.visit(inner)
        raise AssertionError("a traced function ends with its output")

    def _lookup(self, out: Node, name: str, origin: fx.Node) -> Node | None:
        """Fill in ``out``'s kind; return another node where the operation does nothing."""
        if out.target is operator.getitem:
            source = out.args[0]
            if source.kind == g.GENERIC:  # refused already
                out.kind = g.GENERIC
                return None
            if source.kind != g.PARTS:  # one of several results, of which the first is the value
                if out.args[1] != 0:
                    if origin.users:
                        self._unsupported(origin, f"a secondary result of {source.target}")
                    return source  # type: ignore[no-any-return]
                source.shape, source.example = out.shape, out.example
                self.values[source] = origin.meta.get("val")
                return source  # type: ignore[no-any-return]
            out.kind, out.operands = g.PART, [source]
            out.params = {"index": out.args[1]}
            return None
        handler = VOCABULARY.get(name)
        try:
            bound = bind(out.target, out.args, out.kwargs)
            found = composite(out) if handler is None else handler(out, bound)
            return self._in_steps(found, origin) if isinstance(found, InSteps) else found
        except (Unsupported, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            what = str(error)
            if not isinstance(error, Unsupported):  # a use that the handler does not know
                what = f"{name} as it is used here ({type(error).__name__}: {_first_line(error)})"
            if not self.strict and self._generic(out, origin):
                warnings.warn(
                    f"{name} in {out.module or 'the model'} is outside the vocabulary: the rule's generic "
                    "definition is applied through autograd",
                    stacklevel=2,
                )
                return None
            self._unsupported(origin, what)
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
            return
        operation = isinstance(node.target, torch._ops.OpOverload) and _is_view(node.target)
        part = node.target is operator.getitem  # one of several views
        if node.all_input_nodes and (operation or part):
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


def _draws(node: Node) -> bool:
    """Whether the operation's result is random."""
    random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return random and not ("dropout" in str(node.target) and False in node.args)


def _no_call() -> None:
    raise RuntimeError("a leaf of the graph is never called")


def _short_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.")
    return getattr(target, "__name__", str(target))


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


# Numbers of the example's samples; 0 stands for values that belong to none (constants, zero padding).
_SAMPLES = torch.arange(1, EXAMPLE_BATCH + 1, dtype=torch.int16)


def _infer_batch_axes(graph: Graph, symbolic: bool) -> None:
    """Find where the samples of every tensor live.

    Sample numbers are pushed through the graph: the real operation for those that only move values, the
    number of the operand's position for all others. Strided views keep this nearly free.
    """
    if not symbolic:
        for node in graph.nodes:
            if not node.constant and node.shape:
                node.batch = g.BatchAxis(0, 1, node.shape[0] if isinstance(node.shape[0], int) else 1)
        return
    count = EXAMPLE_BATCH
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.kind == g.INT:
            values[node] = node.example[0]
        elif node.constant:
            values[node] = _constant_ids(node)
        elif node.kind == g.INPUT:
            ids = _SAMPLES.view(count, *[1] * (len(node.example) - 1))
            values[node] = ids.expand(node.example)
        elif node.kind == g.MOVE and node.params["how"] == "vjp":
            values[node] = _moved(node, values)
        elif node.kind in (g.MOVE, g.PARTS, g.PART):
            values[node] = _run(node, values)
        else:
            values[node] = _positionwise(node, values)
        if not node.constant and isinstance(values[node], torch.Tensor):
            node.batch = _locate(values[node], count, node)


def _constant_ids(node: Node) -> Any:
    """A constant belongs to no sample, or, expanded along the batch, to one sample each.

    Integers may be indices and stay what they are.
    """
    batched = [i for i, s in enumerate(node.shape) if s == "batch"]
    if node.params.get("floating", True) and len(batched) == 1:
        return _SAMPLES.view(*[-1 if i == batched[0] else 1 for i in range(len(node.shape))]).expand(node.example)
    if node.params.get("floating", True):
        return torch.zeros((1,) * len(node.example), dtype=torch.int16).expand(node.example)
    known: dict[Node, Any] = {}

    def value(n: Node) -> Any:
        if n not in known:
            if not n.constant:  # whose shape alone matters
                known[n] = torch.zeros((1,)).expand(n.example)
            elif n.kind == g.PARAM:
                known[n] = n.params["tensor"]
            elif n.kind == g.INT:
                known[n] = n.example[0]
            else:
                known[n] = n.target(*g.map_nodes(value, n.args), **g.map_nodes(value, n.kwargs))
        return known[n]

    return value(node)


def _run(node: Node, values: dict[Node, Any]) -> Any:
    args = g.map_nodes(values.__getitem__, node.args)
    kwargs = g.map_nodes(values.__getitem__, node.kwargs)
    return node.target(*args, **kwargs)


def _moved(node: Node, values: dict[Node, Any]) -> torch.Tensor:
    """Sample numbers moved by an operation that knows floating tensors only; padding belongs to no sample."""
    source = node.operands[0]
    if node.params.get("masks"):
        return values[source].expand(node.example)  # type: ignore[no-any-return]
    args = g.map_nodes(lambda n: values[n].float() if n is source else values[n], node.args)
    if node.params.get("pads"):
        args = (args[0], args[1])
    moved: torch.Tensor = node.target(*args, **g.map_nodes(values.__getitem__, node.kwargs))
    return moved.to(torch.int16)


def _contracted(node: Node, values: dict[Node, Any]) -> torch.Tensor:
    """Sample numbers of an einsum: those of its first operand that has any, axis by axis."""
    labels, result = node.params["labels"]
    at, source = next((i, n) for i, n in enumerate(node.operands) if not n.constant)
    own = labels[at]
    gone = [i for i, label in enumerate(own) if label not in result]
    ids: torch.Tensor = values[source]
    ids = ids.amax(gone) if gone else ids
    left = [label for label in own if label in result]
    order = [left.index(label) for label in result if label in left]
    ids = ids.permute(order)
    shape = iter(ids.shape)
    return ids.reshape([next(shape) if label in left else 1 for label in result]).expand(node.example)


def _positionwise(node: Node, values: dict[Node, Any]) -> torch.Tensor:
    """Sample numbers of an operation that computes: the operand's, with contracted axes collapsed."""
    shape = node.example
    if "labels" in node.params:
        return _contracted(node, values)
    source: torch.Tensor = max((values[n] for n in node.sources), key=lambda v: v.dim() * 10**9 + v.numel())
    if source.shape != shape:
        try:
            source.expand(shape)
        except RuntimeError:
            if node.kind in (g.LINEAR, g.MATMUL, g.ATTENTION) or node.params.get("contracts"):
                axes = -1 if source.shape[:-1] == shape[:-1] else (-2, -1)
                source = source.amax(axes, keepdim=True)
            else:  # convolutions, pools and reductions: the batch leads
                source = source.reshape(source.shape[0], -1).amax(1)
                source = source.view(-1, *[1] * (len(shape) - 1))
    return source.expand(shape)


def _locate(ids: torch.Tensor, count: int, node: Node) -> g.BatchAxis:
    if not ids.numel():  # empty slices: nothing is there to be mixed
        return g.BatchAxis(next((i for i, s in enumerate(node.shape) if isinstance(s, str)), 0))
    for axis in range(ids.dim()):
        length = ids.shape[axis]
        if length % count:
            continue
        index: list[Any] = [0] * ids.dim()
        index[axis] = slice(None)
        line = ids[tuple(index)]
        # Values that belong to no sample say nothing: look at the whole slice.
        if bool((line == 0).any()):
            line = ids.movedim(axis, 0).reshape(length, -1).amax(1)
        change = (line != line[0]).nonzero()
        if not len(change):
            continue
        inner = int(change[0])
        if length % (count * inner):
            continue
        outer = length // (count * inner)
        expected = _SAMPLES.repeat_interleave(inner).repeat(outer)
        shaped = expected.view(*[-1 if i == axis else 1 for i in range(ids.dim())])
        if torch.equal(line, expected) and bool(((ids == shaped) | (ids == 0)).all()):
            return g.BatchAxis(axis, outer, inner)
    raise UnsupportedModelError(
        f"{node.kind} in {node.module or 'the model'} mixes the samples of a batch ({node.name}, shape {node.shape})"
    )
