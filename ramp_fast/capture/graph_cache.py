"""Captured graphs on the disk: a model that was captured before, by any process, need not be exported again.

``RAMP_FAST_CACHE=FOLDER`` turns this on. A file holds one graph under its model's key, without weights and without
code. What depends on the values of weights is computed anew from the model at hand, and a graph that is read is only
used if it gives the model's own logits for a random image.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramp_fast._files import read_text, reason, write_whole
from ramp_fast.capture.batch_branches import Branch
from ramp_fast.capture.model_key import model_key
from ramp_fast.capture.stored_graph import NotStorable, decode, encode
from ramp_fast.graph import PARAM, SPLIT, Graph, map_nodes

CACHE_VARIABLE = "RAMP_FAST_CACHE"
FORMAT = 1

_complained: set[Path] = set()  # folders that cannot be written, of which the user has been told


class Agreement(enum.IntEnum):
    """How near a graph's logits come to its model's: not, but for rounding, or to the last bit."""

    NONE = 0
    CLOSE = 1
    EXACT = 2


@dataclass
class Stored:
    """What is known of a captured model.

    Attributes
    ----------
    graph : Graph
        As it was translated.
    branches : list of Branch
        Decisions by the size of the batch.
    agreement : Agreement
        Of the graph and its model, when it was captured.
    """

    graph: Graph
    branches: list[Branch]
    agreement: Agreement


class Entry:
    """The place of one model's graph in the folder."""

    def __init__(self, folder: Path, key: str, weights: dict[str, Tensor]) -> None:
        self.path, self._key, self._weights = folder / f"{key}.json", key, weights

    def read(self) -> Stored | None:
        """What the file says; None where there is no file, or one that is damaged or of another format."""
        try:
            digest, _, body = read_text(self.path).partition("\n")
            if hashlib.sha256(body.encode()).hexdigest() != digest:
                return None
            document = json.loads(body)
            if (document["format"], document["key"]) != (FORMAT, self._key):
                return None
            branches = [Branch(tuple(sizes), place) for sizes, place in document["branches"]]
            return Stored(decode(document["graph"], self._weights), branches, Agreement(document["agreement"]))
        except Exception:  # whatever a file may have in it that was put there by others
            return None

    def encoded(self, graph: Graph) -> dict[str, Any] | None:
        """The graph in the form in which it is written, None where it has none."""
        try:
            return encode(graph, self._weights)
        except NotStorable:
            return None

    def write(self, graph: dict[str, Any], branches: list[Branch], agreement: Agreement) -> None:
        """Put a graph into the folder; where that cannot be, warn once."""
        document = {
            "format": FORMAT,
            "key": self._key,
            "agreement": agreement,
            "branches": [[list(branch.sizes), branch.place] for branch in branches],
            "graph": graph,
        }
        body = json.dumps(document, separators=(",", ":"))
        try:
            write_whole(self.path, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode())
        except OSError as error:
            if self.path.parent not in _complained:
                _complained.add(self.path.parent)
                warnings.warn(
                    f"{CACHE_VARIABLE}={self.path.parent}: captured graphs cannot be kept there ({reason(error)})",
                    RuntimeWarning,
                    stacklevel=2,
                )


def entry_for(model: torch.nn.Module, image_shape: tuple[int, int, int], strict: bool) -> Entry | None:
    """Where the graph of a model is, or would be, kept; None where there is no cache or the model cannot be in one."""
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        return None
    try:
        key = model_key(model, image_shape, strict)
    except Exception:  # NotCacheable, or whatever an object does that is looked at
        return None
    weights = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return Entry(Path(folder).expanduser(), key, weights)


def logits_of(graph: Graph, images: Tensor) -> Tensor:
    """What a graph, as it was translated, computes for images in the dtype of its model."""
    last = {ref: i for i, node in enumerate(graph.nodes) for ref in node.references()}
    values: dict[Any, Any] = {graph.input: images}
    for i, node in enumerate(graph.nodes):
        if node.kind == PARAM:
            values[node] = node.params.tensor
        elif node is not graph.input:
            args, kwargs = map_nodes(values.__getitem__, (node.args, node.kwargs))
            result = node.target(*args, **kwargs)
            several = isinstance(result, (tuple, list)) and not node.constant and node.kind != SPLIT
            values[node] = result[0] if several else result  # a secondary result is no part of a graph
        for ref in dict.fromkeys(node.references()):
            if last[ref] == i and ref is not graph.output:
                del values[ref]
    logits: Tensor = values[graph.output]
    return logits
