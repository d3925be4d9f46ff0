"""An exported program becomes a :class:`~ramp_fast.graph.Graph` of the vocabulary's operations.

Everything that the vocabulary lacks is collected and reported at once.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from ramp_fast import graph as g
from ramp_fast.capture.batch_axes import EXAMPLE_BATCH
from ramp_fast.capture.exporter import first_line, known_size, quiet
from ramp_fast.capture.vocabulary import VOCABULARY, InSteps, Unsupported, bind, composite
from ramp_fast.errors import UnsupportedModelError
from ramp_fast.graph import Graph, Node
from ramp_fast.params import Leaf, SplitOutput

# Nodes that compute nothing: shape and dtype guards left by export.
_GUARDS = ("_assert", "sym_constrain", "_guards_fn")
# The result depends on the shape of the first operand only.
_SHAPE_ONLY = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "fill", "zero"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
}
# The values are the first operand's; the second one says only what shape or dtype they get.
_SHAPE_OF_SECOND = {"expand_as", "view_as", "reshape_as", "type_as"}


class NeedsFunctionalForm(Exception):
    """An in-place operation writes through a view that is read later."""


class _UnknownSize(Exception):
    """A size is neither a number nor does it follow from that of the batch."""


class SizesFromValues(Exception):
    """The exporter has lost track of a size on its way through a tensor; says where."""


def translate(program: torch.export.ExportedProgram, strict: bool) -> tuple[Graph, Any]:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        names = list(signature.buffers_to_mutate.values()) + list(signature.user_inputs_to_mutate.values())
        raise UnsupportedModelError(f"the model writes to its own state in the forward pass: {', '.join(names)}")
    if len(signature.user_inputs) != 1:
        raise UnsupportedModelError("the model must take exactly one input, the images")
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
    if translator.output.constant:
        raise UnsupportedModelError("the model's logits do not depend on the images")
    return Graph(translator.nodes, translator.input, translator.output), translator.batch_symbol


class _Translator:
    """Walks the exported graph once and emits nodes of the vocabulary."""

    def __init__(self, program: torch.export.ExportedProgram, leaves: dict[str, str], strict: bool) -> None:
        self.leaves = leaves
        self.tensors: dict[str, torch.Tensor] = {**dict(program.state_dict), **program.constants}
        self.strict = strict
        self.nodes: list[Node] = []
        self.env: dict[fx.Node, Node] = {}
        self.storages = _Storages(program)
        self.unsupported: list[tuple[str, str]] = []
        self.input: Node | None = None
        self.output: Node | None = None
        self.batch_symbol: Any = None
        self.values: dict[Node, Any] = {}  # the exporter's own, without contents
        self.inlined: dict[fx.Node, list[Any]] = {}
        self.names: dict[str, int] = {}
        self.sizes: dict[Any, tuple[int | str, Any, Any]] = {}

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
            return self.env[value] if value in self.env else _submodule(value)  # the body of a region
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

    def example(self, value: Any) -> tuple[Any, ...]:
        """Sizes at the example batch; for a size itself, its value."""
        if isinstance(value, torch.Tensor):
            return tuple(self.example(s)[0] for s in value.shape)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return (self.size(value)[1],)
        return (value,) if isinstance(value, (bool, int, float)) else ()

    def size(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> tuple[int | str, Any, Any]:
        """A size for people ("batch", "4*batch", ...); its value for the example, and for one image more."""
        expression = value.node.expr
        if expression not in self.sizes:
            symbol = self.batch_symbol.node.expr if self.batch_symbol is not None else None
            if expression.free_symbols - {symbol}:
                raise _UnknownSize
            kind = int if isinstance(value, torch.SymInt) else float if isinstance(value, torch.SymFloat) else bool
            here, more = (kind(expression.subs(symbol, n)) for n in (EXAMPLE_BATCH, EXAMPLE_BATCH + 1))
            name: int | str = str(value).replace(str(symbol), "batch")
            each = here // EXAMPLE_BATCH
            if not expression.free_symbols:
                name = int(here)
            elif (here, more) == (each * EXAMPLE_BATCH, each * (EXAMPLE_BATCH + 1)):
                name = "batch" if each == 1 else f"{each}*batch"
            self.sizes[expression] = name, here, more
        return self.sizes[expression]

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            self.output = next(self.env[n] for n in node.all_input_nodes)
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "get_attr" and isinstance(_submodule(node), fx.GraphModule):
            return  # the body of a region, inlined where it is called
        elif node.op == "get_attr" and isinstance(value := _submodule(node), torch.Tensor):
            leaf = Node(node.name, g.CONST, lambda: value, shape=tuple(value.shape), example=tuple(value.shape))
            leaf.params, leaf.dtype = Leaf(floating=value.is_floating_point()), value.dtype
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
                self.storages.share(inner, outer)
            elif inner.op == "output":
                results = inner.args[0]
                self.inlined[node] = list(results) if isinstance(results, (tuple, list)) else [results]
            else:
                self.visit(inner)

    def _placeholder(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if node.name in self.leaves:
            fqn = self.leaves[node.name]
            leaf = Node(node.name, g.PARAM, no_call, params=Leaf(self.tensors[fqn], fqn, value.is_floating_point()))
            leaf.shape, leaf.example = self.shape(value), self.example(value)
            leaf.dtype = value.dtype
            self.values[self.emit(leaf, node)] = value
            return
        if not isinstance(value, torch.Tensor):
            self.emit(Node(node.name, g.CONST, no_call), node)
            return
        batch: Any = value.shape[0]
        if known_size(batch) is None:
            self.batch_symbol = batch
        leaf = Node(node.name, g.INPUT, no_call, shape=self.shape(value), example=self.example(value))
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
            results: list[Any] = self.inlined[node.args[0]]  # type: ignore[index]
            if node.args[1] >= len(results):  # type: ignore[operator]  # a number
                if node.users:
                    self._unsupported(node, f"a secondary result of {node.args[0].target}")  # type: ignore[union-attr]
                    self.emit(Node(node.name, g.GENERIC, node.target), node)
                return
            inner = results[node.args[1]]  # type: ignore[index]
            self.env[node] = self.env[inner]
            self.storages.share(node, inner)
            return
        value = node.meta.get("val")
        args, kwargs = self.resolve(node.args), self.resolve(node.kwargs)
        target: Any = node.target
        mutated: fx.Node | None = None
        if isinstance(target, torch._ops.OpOverload) and _is_inplace(target):
            (mutated, *_) = node.all_input_nodes
            self.storages.check_write(node, mutated, self.env)
            target = _functional(target)
            name = _short_name(target)
        module = _module_name(node)
        out = Node(node.name, "", target, tuple(args), dict(kwargs), module=module)
        try:
            out.shape, out.example = self.shape(value), self.example(value)
        except _UnknownSize:
            raise SizesFromValues(
                f"{name} in {module or 'the model'} takes a size from the values of a tensor: "
                "use integers, such as those of x.shape"
            ) from None
        out.dtype = value.dtype if isinstance(value, torch.Tensor) else None
        variable = any(not ref.constant for ref in out.references())
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            out.kind = g.INT
            out.params = Leaf(more=value if isinstance(value, (int, float, bool)) else self.size(value)[2])
        elif not variable or self._shape_only(out, name):
            out.kind = g.CONST
            out.params = Leaf(floating=isinstance(value, torch.Tensor) and value.is_floating_point())
            if _draws(out):
                self._unsupported(node, f"{name}, which draws random numbers (maps would change from call to call)")
        else:
            replacement = self._lookup(out, name, node)
            if replacement is not None:
                self.env[node] = replacement
                self._written(node, mutated)
                return
            if node in self.inlined:
                return
        carriers = [n for n in out.references() if not n.constant]
        out.decided = out.kind == g.DECISION or (bool(carriers) and all(n.decided for n in carriers))
        self.emit(out, node)
        self.values[out] = value
        self._written(node, mutated)

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
            with mode, quiet():
                traced = make_fx(run, pre_dispatch=steps.pre_dispatch)(*values)
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(f"{_short_name(origin.target)}: {first_line(error)}") from error
        if isinstance(self.batch_symbol, torch.SymInt) and self.batch_symbol.node.maybe_as_int() is not None:
            raise Unsupported(f"{_short_name(origin.target)}, which PyTorch composes for one size of the batch")
        arguments = iter(references)
        for inner in traced.graph.nodes:
            self.storages.place(inner, origin)
            inner.meta["nn_module_stack"] = origin.meta.get("nn_module_stack")
            if inner.op == "placeholder":
                self.env[inner] = next(arguments)
                outer = next((n for n in origin.all_input_nodes if self.env[n] is self.env[inner]), inner)
                self.storages.share(inner, outer)
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
            if source.kind != g.SPLIT:  # one of several results, of which the first is the value
                if out.args[1] != 0:
                    if origin.users:
                        self._unsupported(origin, f"a secondary result of {source.target}")
                    return source  # type: ignore[no-any-return]
                source.shape, source.example = out.shape, out.example
                self.values[source] = origin.meta.get("val")
                return source  # type: ignore[no-any-return]
            out.kind, out.operands = g.SPLIT_OUTPUT, [source]
            out.params = SplitOutput(out.args[1])
            return None
        handler = VOCABULARY.get(name)
        try:
            bound = bind(out.target, out.args, out.kwargs)
            found = composite(out) if handler is None else handler(out, bound)
            return self._in_steps(found, origin) if isinstance(found, InSteps) else found
        except (Unsupported, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            what = str(error)
            if not isinstance(error, Unsupported):  # a use that the handler does not know
                what = f"{name} as it is used here ({type(error).__name__}: {first_line(error)})"
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

    def _written(self, node: fx.Node, mutated: fx.Node | None) -> None:
        """Let every name of what an in-place operation wrote to stand for its result."""
        if mutated is None:
            self.storages.track(node)
            return
        before = self.env[mutated]
        for alias in self.storages.names(mutated):
            if self.env.get(alias) is before:
                self.env[alias] = self.env[node]
        self.storages.share(node, mutated)


class _Storages:
    """Which nodes share memory, so that an in-place operation shows under every name of what it writes to."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._owner: dict[fx.Node, fx.Node] = {}
        self._position = {node: i for i, node in enumerate(_flattened(program.graph_module))}

    def share(self, node: fx.Node, source: fx.Node) -> None:
        """Say that ``node`` is, or may be, a view of ``source``."""
        self._owner[node] = self._owner.get(source, source)

    def place(self, node: fx.Node, origin: fx.Node) -> None:
        """Say that ``node``, which is not in the program, is computed where ``origin`` is."""
        self._position[node] = self._position.get(origin, 0)

    def names(self, node: fx.Node) -> list[fx.Node]:
        """Every name of the storage that ``node`` is, or may be, a view of; itself included."""
        owner = self._owner.get(node, node)
        return [owner, *(n for n, o in self._owner.items() if o is owner and n is not owner)]

    def track(self, node: fx.Node) -> None:
        """Notice that ``node`` is a view of its first argument, if it is."""
        operation = isinstance(node.target, torch._ops.OpOverload) and _is_view(node.target)
        part = node.target is operator.getitem  # one of several views
        if node.all_input_nodes and (operation or part):
            self.share(node, node.all_input_nodes[0])

    def check_write(self, node: fx.Node, mutated: fx.Node, env: dict[fx.Node, Node]) -> None:
        """Raise where ``node`` writes to what is read later under a name that stands for other values."""
        here = self._position[node]
        names = self.names(mutated)
        plain = not any(_may_copy(n) for n in names)
        for other in names:
            if other is mutated or (plain and env.get(other) is env[mutated]):
                continue
            if any(self._position[user] > here for user in other.users):
                raise NeedsFunctionalForm


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
    if "scaled_dot_product_attention" in str(node.target):
        return bool(bind(node.target, node.args, node.kwargs)["dropout_p"])
    return random and not ("dropout" in str(node.target) and False in node.args)


def no_call() -> None:
    """What leaves of a graph have for a target."""
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
