"""Gradients of small functions, also where autograd's engine does not run."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # which Windows has not
    os.register_at_fork(after_in_child=_after_fork)


def gradient(out: Tensor, leaf: Tensor, side: Tensor) -> Tensor:
    """``J^T side`` of ``out``, a function of ``leaf``; may be called again for another ``side``.

    A process that was forked after autograd's engine had run (a worker of a DataLoader) cannot use that engine any
    more: there the recorded functions are called one by one.
    """
    if _forked:
        return _walk(out, leaf, side)
    return torch.autograd.grad(out, leaf, side, retain_graph=True)[0]


def _walk(out: Tensor, leaf: Tensor, side: Tensor) -> Tensor:
    if out is leaf:
        return side
    root, at = out.grad_fn, out.output_nr
    assert root is not None
    grads: dict[Any, list[Tensor | None]] = {root: _placed(root, at, side, [])}
    total = torch.zeros_like(leaf)
    for node in _ordered(root):
        given = grads.pop(node, None)
        if given is None or all(g is None for g in given):
            continue
        if hasattr(node, "variable"):  # which accumulates the gradient of a leaf
            if node.variable is leaf and given[0] is not None:
                total = total + given[0]
            continue
        with torch.no_grad():
            found = node(*given)
        for grad, (following, place) in zip(_as_tuple(found), node.next_functions, strict=True):
            if grad is not None and following is not None:
                grads[following] = _placed(following, place, grad, grads.get(following, []))
    return total


def _placed(node: Any, at: int, grad: Tensor, given: list[Tensor | None]) -> list[Tensor | None]:
    """``given`` with ``grad`` added for output ``at`` of ``node``, in that output's shape and dtype."""
    outputs = node._input_metadata
    given = given or [None] * len(outputs)
    grad = grad.sum_to_size(tuple(outputs[at].shape)).to(outputs[at].dtype)
    before = given[at]
    given[at] = grad if before is None else before + grad
    return given


def _ordered(root: Any) -> list[Any]:
    """``root`` and every function behind it, each before those that it hands gradients to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return order[::-1]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
