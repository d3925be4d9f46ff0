"""Registration of ``ramp_fast::*`` operators and the choice of their backend.

Every operator has a schema, a fake and a reference, and may have a CPU kernel and a CUDA kernel (csrc) and a Triton
kernel (kernels). They are registered with ``torch.library.Library.impl``, whose call costs a few microseconds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ramp_fast import _native
from ramp_fast.errors import BackendError

BACKEND_VARIABLE = "RAMP_FAST_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")
# What runs where no backend is forced: the first that an operator has a kernel for, otherwise the reference.
_DEFAULTS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_DEVICE_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}

Implementation = Callable[..., Any]

extension: ModuleType | None
extension, extension_reason, openmp_pool = _native.load()

KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.int32})  # int32 counts steps

_library = torch.library.Library("ramp_fast", "DEF")
_operators: dict[str, Operator] = {}
_forced: str | None = None


def _missing(backend: str) -> str:
    """What a backend lacks that no tensor's device could make up for; empty if nothing. Does not initialise CUDA."""
    if backend == "cpu" and extension is None:
        return f"the C++ extension is missing: {extension_reason}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it exists for Linux on x86_64 and aarch64)"
    if backend == "cuda" and (extension is None or not extension.has_cuda):
        return extension_reason or "the extension was built without CUDA kernels (RAMP_FAST_CUDA=on needs nvcc)"
    return ""


@functools.cache
def _cuda_problem(device: int) -> str:
    """Why the CUDA C++ kernels cannot run on a device, whose CUDA context exists; empty if they can."""
    problem = str(extension.cuda_problem(device)) if extension is not None else extension_reason
    if problem:
        warnings.warn(f"ramp_fast's CUDA kernels cannot run on cuda:{device}: {problem}", RuntimeWarning, stacklevel=2)
    return problem


def unavailable(backend: str) -> str:
    """Why a backend cannot run on this machine; an empty string if it can."""
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; supported: {', '.join(BACKENDS)}")
    reason = _missing(backend)
    if not reason and backend == "triton" and not torch.cuda.is_available() and not _triton_interprets():
        reason = "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    if not reason and backend == "cuda":
        if not torch.cuda.is_available():
            reason = "torch sees no CUDA device"
        else:
            reason = _cuda_problem(torch.cuda.current_device())
    return reason


def forced_backend() -> str | None:
    """The backend named by ``RAMP_FAST_BACKEND`` or :func:`set_backend`, None if each device has its default."""
    return _forced


def set_backend(backend: str | None) -> None:
    """Force a backend for every operator, or return to the defaults with None.

    A forced backend never falls back: what it cannot run raises BackendError.
    """
    global _forced
    if backend is not None:
        reason = unavailable(backend)
        if reason:
            raise BackendError(f"backend {backend!r} cannot run here: {reason}")
    _forced = backend
    for operator in _operators.values():
        operator.resolve()


def backends_for(device: str) -> tuple[str, ...]:
    """The backends whose kernels run on tensors of this type of device, the preferred one first."""
    if _forced is not None:
        return (_forced,)
    return tuple(backend for backend in _DEFAULTS.get(device, ()) if not _missing(backend))


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Operator:
    """One operator with its implementations by backend and the one chosen for each device."""

    def __init__(self, name: str, reference: Implementation, kernels: dict[str, Implementation]) -> None:
        self.name = name
        self.reference = reference
        self._kernels = kernels
        self.chosen: dict[str, Implementation] = {}
        self.resolve()

    def resolve(self) -> None:
        """Choose an implementation for each type of device."""
        self.chosen = {device: self._choose(device) for device in _DEVICE_KEYS}

    def _choose(self, device: str) -> Implementation:
        if _forced is None:
            for backend in backends_for(device):
                kernel = self._kernels.get(backend)
                if kernel is not None:
                    return self._with_fallback(kernel, backend)
            return self.reference
        if _forced == "reference":
            return self.reference
        runs_on_device = (_forced == "cpu") == (device == "cpu") or (_forced == "triton" and _triton_interprets())
        if not runs_on_device or (_forced == "cuda" and device != "cuda"):
            return self._refusal(f"does not run on {device} tensors")
        kernel = self._kernels.get(_forced)
        return self._refusal("has no kernel for it") if kernel is None else self._without_fallback(kernel)

    def _with_fallback(self, kernel: Implementation, backend: str) -> Implementation:
        reference = self.reference

        def call(*args: Any) -> Any:
            return kernel(*args) if _takes(args) else reference(*args)

        def call_cuda(*args: Any) -> Any:
            device = next(arg.device.index for arg in args if isinstance(arg, Tensor))
            return kernel(*args) if _takes(args) and not _cuda_problem(device) else reference(*args)

        return call_cuda if backend == "cuda" else call

    def _without_fallback(self, kernel: Implementation) -> Implementation:
        def call(*args: Any) -> Any:
            if not _takes(args):
                self._refusal(f"does not take {', '.join(str(a.dtype) for a in args if isinstance(a, Tensor))}")()
            return kernel(*args)

        return call

    def _refusal(self, problem: str) -> Implementation:
        message = (
            f"ramp_fast::{self.name}: the backend {_forced!r} was asked for ({BACKEND_VARIABLE} or set_backend) and "
            f"{problem}; unset {BACKEND_VARIABLE} or choose 'reference', which runs everything"
        )

        def refuse(*args: Any) -> Any:
            raise BackendError(message)

        return refuse


def _takes(args: tuple[Any, ...]) -> bool:
    """Whether the kernels take tensors of these dtypes."""
    return all(arg.dtype in KERNEL_DTYPES for arg in args if isinstance(arg, Tensor))


def register(
    schema: str,
    *,
    reference: Implementation,
    fake: Implementation,
    cpu: Implementation | None = None,
    triton: str | None = None,
    cuda: Implementation | None = None,
) -> Any:
    """Define ``ramp_fast::<schema>`` and return the callable operator.

    Parameters
    ----------
    schema : str
        The schema without the namespace.
    reference, fake : callable
        The equation in plain torch, and the contract on shapes and dtypes.
    cpu : callable, optional
        Runs the kernel of the C++ extension.
    triton : str, optional
        ``"module:function"`` below ``ramp_fast.kernels``, imported at the first call.
    cuda : callable, optional
        Runs the CUDA kernel of the C++ extension.
    """
    name = schema.partition("(")[0]
    kernels: dict[str, Implementation] = {}
    if cpu is not None:
        kernels["cpu"] = cpu
    if triton is not None:
        kernels["triton"] = _lazily(triton)
    if cuda is not None:
        kernels["cuda"] = cuda
    operator = _operators[name] = Operator(name, reference, kernels)

    _library.define(schema)
    torch.library.register_fake(f"ramp_fast::{name}", fake, lib=_library)
    for device, key in _DEVICE_KEYS.items():
        _library.impl(name, _dispatcher(operator, device), key)
    return getattr(torch.ops.ramp_fast, name).default


def _dispatcher(operator: Operator, device: str) -> Implementation:
    def call(*args: Any) -> Any:
        return operator.chosen[device](*args)

    return call


def _lazily(target: str) -> Implementation:
    module, _, function = target.partition(":")
    loaded: list[Implementation] = []

    def call(*args: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(f"ramp_fast.kernels.{module}"), function))
        return loaded[0](*args)

    return call


def force_from_environment() -> None:
    """Apply ``RAMP_FAST_BACKEND``."""
    backend = os.environ.get(BACKEND_VARIABLE)
    if backend:
        try:
            set_backend(backend)
        except BackendError as error:
            raise BackendError(f"{BACKEND_VARIABLE}={backend}: {error}") from None
