"""A captured graph as plain values (numbers, text, lists), and back.

Operations are stored by name, weights by their names in the model. Numbers of a tensor are stored only where the model
makes it of literals. What has no such form makes a graph not storable: other tensors, functions that are not in a list
of known ones. Reading calls nothing but what that list and ATen's functional operations have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_list

from ramp_fast import graph as g
from ramp_fast import params as p
from ramp_fast.capture.linear_maps import Call, Resampling
from ramp_fast.capture.translate import no_call
from ramp_fast.graph import Graph, Node

# What exported programs compute sizes with.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg")
    },
    **{f"operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not")},
    "leaf": no_call,
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_CALLS = {kind.__name__: kind for kind in (Call, Resampling)}
_PARAMS = {kind.__name__: kind for kind in (*g.PARAMS.values(), p.Params, p.Window)}
# Attributes of `torch` that stand among an operation's arguments.
_OF_TORCH = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_MOST_NUMBERS = 4096  # of a tensor
_READS_FILES = frozenset({"from_file"})

# Of a node, in the order in which they are stored. (Where the samples are is found out anew.)
_FIELDS = ("name", "kind", "args", "kwargs", "operands", "module", "shape", "example", "dtype", "decided")


class NotStorable(Exception):
    """Something has no form in text; says what."""


def encode(graph: Graph, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """A graph, as it was translated, in values that JSON has.

    Parameters
    ----------
    weights : dict of str to Tensor
        The model's parameters and buffers: they are stored by name.

    Raises
    ------
    NotStorable
    """
    if graph.weights_read:
        raise NotStorable("numbers were read off the weights")
    if graph.ending or graph.observed:
        raise NotStorable("a graph that passes have changed")
    places = {node: i for i, node in enumerate(graph.nodes)}
    nodes = []
    for node in graph.nodes:
        if node.kind == g.GENERIC:
            raise NotStorable("an operation outside the vocabulary, of which every capture warns")
        document = {name: _encoded(getattr(node, name), places) for name in _FIELDS}
        if node.kind == g.PARAM:
            params = _leaf(node.params, weights)
        else:
            params = _encoded(node.params, places)
        nodes.append(document | {"target": _target(node, places), "params": params})
    return {"nodes": nodes, "input": places[graph.input], "output": places[graph.output]}


def decode(document: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Graph:
    """The graph that :func:`encode` made ``document`` of, with these weights.

    Raises
    ------
    Exception
        Of any kind, where it is no such document.
    """
    nodes: list[Node] = []
    for stored in document["nodes"]:
        values = {name: _decoded(stored[name], nodes) for name in _FIELDS}
        node = Node(target=no_call, **values)
        if node.kind == g.PARAM:
            name, literal = stored["params"]
            node.params = _restored(name, literal, weights)
        else:
            node.params = _decoded(stored["params"], nodes)
        node.target = _function(stored["target"], node, nodes)
        nodes.append(node)
    return Graph(nodes, nodes[document["input"]], nodes[document["output"]])


def _leaf(leaf: p.Leaf, weights: Mapping[str, Tensor]) -> list[Any]:
    """A weight's name, or the name and numbers of a tensor that the model makes of literals."""
    tensor = leaf.tensor
    if weights.get(leaf.fqn) is tensor:
        return [leaf.fqn, None]
    if type(tensor) is not Tensor or not leaf.literal or tensor.is_complex() or tensor.numel() > _MOST_NUMBERS:
        raise NotStorable(f"{leaf.fqn} is a tensor and no parameter or buffer")
    kind = {"dtype": tensor.dtype, "device": tensor.device}
    return [leaf.fqn, [tensor.flatten().tolist(), list(tensor.shape), _encoded(kind, {})]]


def _restored(name: str, literal: list[Any] | None, weights: Mapping[str, Tensor]) -> p.Leaf:
    if literal is None:
        tensor = weights[name]
    else:
        numbers, shape, kind = literal
        tensor = torch.tensor(numbers, **_decoded(kind, [])).reshape(shape)
    return p.Leaf(tensor, name, tensor.is_floating_point(), literal=literal is not None)


def _target(node: Node, places: Mapping[Node, int]) -> Any:
    if type(node.target) in _CALLS.values():
        call: Any = node.target
        args, kwargs = call.filled(node.args)
        return {
            "call": type(call).__name__,
            "target": _function_name(call.target),
            "args": _encoded(args, places),
            "kwargs": _encoded(kwargs, places),
        }
    return _function_name(node.target)


def _function(stored: Any, node: Node, nodes: list[Node]) -> Callable[..., Any]:
    if isinstance(stored, str):
        return _named_function(stored)
    args, kwargs = (_decoded(stored[name], nodes) for name in ("args", "kwargs"))
    captured = Node(node.name, node.kind, _named_function(stored["target"]), args, kwargs)
    return _CALLS[stored["call"]](captured, node.operands[0])


def _function_name(function: Any) -> str:
    name = str(function) if isinstance(function, torch._ops.OpOverload) else _NAMES.get(function, "")
    try:
        known = _named_function(name) is function
    except (NotStorable, LookupError, AttributeError, ValueError):
        known = False
    if not known:
        raise NotStorable(f"the function {function}")
    return name


def _named_function(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, operation, overload = name.split(".")
    if namespace != "aten" or operation in _READS_FILES:
        raise NotStorable(f"the operation {name}")
    found = getattr(getattr(torch.ops.aten, operation), overload)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise NotStorable(f"the operation {name}")
    return found


def _encoded(value: Any, places: Mapping[Node, int]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, immutable_list):
        return [_encoded(v, places) for v in value]
    if kind in (tuple, torch.Size):
        return {"tuple": [_encoded(v, places) for v in value]}
    if kind is dict:
        return {"dict": [[_encoded(k, places), _encoded(v, places)] for k, v in value.items()]}
    if kind is Node:
        return {"node": places[value]}
    if kind is torch.device:
        return {"device": str(value)}
    for name, of_torch in _OF_TORCH.items():
        if kind is of_torch:
            return {name: str(value).removeprefix("torch.")}
    if kind in _PARAMS.values():
        return {
            "params": kind.__name__,
            "fields": {f.name: _encoded(getattr(value, f.name), places) for f in fields(value)},
        }
    raise NotStorable(f"an argument of type {kind.__name__}")


def _decoded(value: Any, nodes: list[Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    if "params" in value:
        given = {name: _decoded(v, nodes) for name, v in value["fields"].items()}
        return _PARAMS[value["params"]](**given)
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decoded(v, nodes) for v in content)
    if kind == "dict":
        return {_decoded(k, nodes): _decoded(v, nodes) for k, v in content}
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content)
    if not isinstance(found, _OF_TORCH[kind]):
        raise ValueError(f"{content} is no {kind}")
    return found
