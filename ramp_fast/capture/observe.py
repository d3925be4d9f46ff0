"""Which node of a graph is the output of a module, and how it is kept apart, so that its relevance can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ramp_fast import graph as g
from ramp_fast import params as p
from ramp_fast._checks import nearest
from ramp_fast.errors import InputError
from ramp_fast.graph import Graph, Node


def mark_outputs(graph: Graph, model: torch.nn.Module, names: Iterable[str]) -> None:
    """Remember the outputs of modules of a graph as it was captured; passes keep them up to date.

    Raises
    ------
    InputError
        A module does not exist, computes nothing, or has not one output.
    """
    users = graph.users(shapes=False)
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in modules:
            raise InputError(f"the model has no module {name!r}{nearest(name, modules)}")
        inside = [n for n in graph.nodes if n.module == name or n.module.startswith(f"{name}.")]
        within = set(inside)
        outputs = [
            n for n in inside if not n.constant and (n is graph.output or any(u not in within for u in users[n]))
        ]
        if not outputs:
            raise InputError(
                f"{name!r} computes nothing that the logits depend on for images in evaluation mode: there is no "
                "relevance of its output"
            )
        if len(outputs) > 1 or outputs[0].kind == g.SPLIT:
            raise InputError(
                f"{name!r} has several outputs (it returns more than one tensor, or is called more than once): name "
                "the module around it"
            )
        graph.observed[name] = outputs[0]


def keep_outputs(graph: Graph) -> None:
    """Put a step of its own behind every marked node, after all passes: nothing is fused across it.

    Behind the last operation nothing could be.

    Raises
    ------
    InputError
        A marked node has become a part of another operation.
    """
    present, kept = set(graph.nodes), dict[Node, Node]()
    for name, node in graph.observed.items():
        if node not in present:
            raise InputError(
                f"under this rule the output of {name!r} is computed inside another operation, so that it has no "
                "relevance of its own: name the module around it"
            )
        if node is graph.output:
            kept[node] = node
        elif node not in kept:
            kept[node] = graph.put_behind(node, "observed", g.REARRANGE, _same, p.Rearrange("same"))
    graph.observed = {name: kept[node] for name, node in graph.observed.items()}


def _same(x: Tensor) -> Tensor:
    return x


def names_by_node(graph: Graph) -> Mapping[Node, list[str]]:
    """The modules that every observed node is the output of."""
    found: dict[Node, list[str]] = {}
    for name, node in graph.observed.items():
        found.setdefault(node, []).append(name)
    return found
