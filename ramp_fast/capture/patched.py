"""Other libraries that have changed what a model's modules do, and for whom nobody has put them back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

# What takes the libraries' changes back.
_REMEDIES = {
    "lxt": "lxt's patches last as long as the process: make the engine before monkey_patch, or in a process without it",
    "zennit": "end the composite's context, or call composite.remove(), before the engine is made",
    "captum": "remove the hooks: captum's methods do so when attribute returns",
}


def warn_of_patches(model: nn.Module) -> None:
    """One warning for each library that has replaced methods or functions of a model's modules, or hooks into them.

    A captured model is what its modules compute at that moment. A replacement that keeps the logits can be written in
    other operations, whose relevance is another.
    """
    found: dict[str, dict[str, None]] = {}
    for module in model.modules():
        for library, what in _changes(module):
            found.setdefault(library, {})[what] = None
    for library, changes in found.items():
        named = ", ".join(list(changes)[:4]) + (f" and {len(changes) - 4} more" if len(changes) > 4 else "")
        warnings.warn(
            f"{library} has replaced or added {named}: relevance goes through the operations that the model is made of "
            f"now, and may be another than without {library}. {_REMEDIES[library]}",
            UserWarning,
            stacklevel=4,
        )


def _changes(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Libraries, and what of a module is theirs."""
    kind = type(module)
    for owner in (module, kind):
        library = _library(vars(owner).get("forward") if owner is module else kind.forward)
        # a library's own modules are as it made them
        if library is not None and _library(kind) is None:
            yield library, f"{kind.__module__}.{kind.__qualname__}.forward"
    home = sys.modules.get(kind.__module__)
    library = _library(getattr(home, "eager_attention_forward", None))
    if library is not None:
        yield library, f"{kind.__module__}.eager_attention_forward"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    for hook in (h for kept in hooks for h in kept.values()):
        library = _library(hook)
        if library is not None:
            yield library, f"hooks on {kind.__qualname__}"


def _library(value: Any) -> str | None:
    """Which of the libraries a class, a function, a method or a partial of one is from."""
    value = getattr(value, "func", value)
    owner = getattr(value, "__self__", None)
    for thing in (value, type(owner) if owner is not None else None):
        name = (getattr(thing, "__module__", None) or "").split(".")[0]
        if name in _REMEDIES:
            return name
    return None
