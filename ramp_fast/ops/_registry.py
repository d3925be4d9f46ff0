"""Declaration of ``ramp_fast::*`` operators and the choice of their backend.

An operator is one declaration, :func:`operator`: a typed function whose annotations are the schema and whose body is
the reference, an allocator of the outputs, which is also the fake, and kernels: of the C++ extension for CPUs and GPUs
(csrc), of Triton (kernels). They are registered with ``torch.library.Library.impl``, whose call costs a few
microseconds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, get_num_threads

from ramp_fast import _native
from ramp_fast.errors import BackendError
from ramp_fast.ops._layout import alike

BACKEND_VARIABLE = "RAMP_FAST_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")
# What runs where no backend is forced: the first that an operator has a kernel for, otherwise the reference.
_DEFAULTS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_DEVICE_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}

Implementation = Callable[..., Any]
Function = TypeVar("Function", bound=Implementation)

extension: ModuleType | None
extension, extension_reason, openmp_pool = _native.load()

KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.int32})  # int32 counts steps

_library = torch.library.Library("ramp_fast", "DEF")
_operators: dict[str, Operator] = {}
_forced: str | None = None


def _missing(backend: str) -> str:
    """What a backend lacks on this machine, whatever the device of a tensor; empty if nothing. Starts no CUDA."""
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
    for declared in _operators.values():
        declared.resolve()


def backends_for(device: str) -> tuple[str, ...]:
    """The backends whose kernels run on tensors of this type of device, the preferred one first."""
    if _forced is not None:
        return (_forced,)
    return tuple(backend for backend in _DEFAULTS.get(device, ()) if not _missing(backend))


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Operator:
    """One operator with its implementations by backend and the one chosen for each device.

    Parameters
    ----------
    name : str
    reference : callable
    kernels : dict of callables
        By backend.
    tensors : tuple of int
        Which arguments are tensors or None: kernels take those of ``KERNEL_DTYPES``.
    float64 : bool
        Whether kernels take float64; otherwise the reference does in their place, also where they are forced.
    """

    def __init__(
        self,
        name: str,
        reference: Implementation,
        kernels: dict[str, Implementation],
        tensors: tuple[int, ...],
        float64: bool = True,
    ) -> None:
        self.name = name
        self.reference = reference
        self._kernels = kernels
        self._tensors = tensors
        self._dtypes = KERNEL_DTYPES if float64 else KERNEL_DTYPES - {torch.float64}
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
                    return self._checked(self._on_cuda(kernel) if backend == "cuda" else kernel, self.reference)
            return self.reference
        if _forced == "reference":
            return self.reference
        runs_on_device = (_forced == "cpu") == (device == "cpu") or (_forced == "triton" and _triton_interprets())
        if not runs_on_device or (_forced == "cuda" and device != "cuda"):
            return self._refusal(f"does not run on {device} tensors")
        kernel = self._kernels.get(_forced)
        if kernel is None:
            return self._refusal("has no kernel for it")
        return self._checked(kernel, self._refuse_dtypes)

    def _checked(self, kernel: Implementation, otherwise: Implementation) -> Implementation:
        """``kernel`` for tensors of the dtypes it takes, ``otherwise`` for others."""
        tensors, dtypes = self._tensors, self._dtypes

        def call(*args: Any) -> Any:
            for i in tensors:
                tensor = args[i]
                if tensor is not None and tensor.dtype not in dtypes:
                    return otherwise(*args)
            return kernel(*args)

        return call

    def _on_cuda(self, kernel: Implementation) -> Implementation:
        def call(*args: Any) -> Any:
            device = next(arg.device.index for arg in args if isinstance(arg, Tensor))
            return self.reference(*args) if _cuda_problem(device) else kernel(*args)

        return call

    def _refuse_dtypes(self, *args: Any) -> Any:
        dtypes = [arg.dtype for arg in args if isinstance(arg, Tensor)]
        if KERNEL_DTYPES.issuperset(dtypes):  # float64
            return self.reference(*args)
        return self._refusal(f"does not take {', '.join(map(str, dtypes))}")()

    def _refusal(self, problem: str) -> Implementation:
        message = (
            f"ramp_fast::{self.name}: the backend {_forced!r} was asked for ({BACKEND_VARIABLE} or set_backend) and "
            f"{problem}; unset {BACKEND_VARIABLE} or choose 'reference', which runs everything"
        )

        def refuse(*args: Any) -> Any:
            raise BackendError(message)

        return refuse


class _Arguments:
    """The arguments of an operator as its annotations describe them, and what kernels of the extension want of them.

    Coefficients [T, B, ...] and samples [B, ...] keep a memory layout that they have in common; every other tensor is
    made contiguous.
    """

    def __init__(self, function: Implementation, coefficients: tuple[str, ...], samples: tuple[str, ...]) -> None:
        types = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
        names = list(types)

        def places(*kinds: Any) -> tuple[int, ...]:
            return tuple(i for i, kind in enumerate(types.values()) if kind in kinds)

        self.count, self.defaults = len(names), function.__defaults__ or ()
        self.tensors = places(Tensor, Tensor | None)
        dtypes = places(torch.dtype, torch.dtype | None)
        # What kernels are given: all but dtypes, which the outputs have. None: all.
        self.passed = [i for i in range(len(names)) if i not in dtypes] if dtypes else None
        self._coefficients, self._together = len(coefficients), [names.index(n) for n in coefficients + samples]
        self._others = tuple(i for i in self.tensors if i not in self._together)
        self._lists = places(list[Tensor], Sequence[Tensor])

    def all_of(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """With the defaults of trailing arguments, which the dispatcher leaves out."""
        missing = self.count - len(args)
        return args + self.defaults[-missing:] if missing else args

    def laid_out(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with tensors in memory layouts that kernels take."""
        for i in self.tensors:
            tensor = args[i]
            if tensor is not None and not tensor.is_contiguous():
                break
        else:
            if all(tensor.is_contiguous() for i in self._lists for tensor in args[i]):
                return args
        copied = self.tensors
        if self._together and alike(tuple([args[i] for i in self._together]), self._coefficients):
            copied = self._others
        own = list(args)
        for i in copied:
            if own[i] is not None:
                own[i] = own[i].contiguous()
        for i in self._lists:
            own[i] = [tensor.contiguous() for tensor in own[i]]
        return tuple(own)


def operator(
    *,
    outputs: Implementation,
    coefficients: tuple[str, ...] = (),
    samples: tuple[str, ...] = (),
    float64: bool = True,
    mutates: tuple[str, ...] = (),
    cpu: Implementation | None = None,
    triton: str | None = None,
    cuda: Implementation | None = None,
) -> Callable[[Function], Function]:
    """Declare the operator ``ramp_fast::<name>`` by its reference: a function of that name, or of ``_<name>``.

    The function's annotations are the schema, its body is the equation in plain torch, correct in float64 and on every
    device. What comes back has its signature and docstring and calls the operator.

    Parameters
    ----------
    outputs : callable
        Takes all arguments and allocates the outputs: shapes, dtypes and strides. It is also the fake. Unless ``cpu``
        is given, tensors come to it in the layout that the kernel gets them in.
    coefficients, samples : tuple of str
        Arguments [T, B, ...] and [B, ...] of a kernel that takes any memory layout that these have in common.
        Every other tensor is made contiguous for the kernel of the extension.
    float64 : bool
        Whether the kernels compute in float64; otherwise the reference stands in for them where a tensor is float64.
    mutates : tuple of str
        Arguments that are written to.
    cpu : callable, optional
        Takes the arguments as they are and returns the outputs. By default the binding of the operator's name in
        csrc/bind, if there is one, is called with the arguments, allocated outputs and the number of threads.
    triton : str, optional
        ``"module:function"`` below ``ramp_fast.kernels``, imported at the first call.
    cuda : callable, optional
        Runs the CUDA kernel of the C++ extension; takes the arguments as they are.
    """

    def declare(function: Function) -> Function:
        name = function.__name__.lstrip("_")
        function.__annotations__ = inspect.get_annotations(function, eval_str=True)  # types, not strings
        arguments = _Arguments(function, coefficients, samples)
        laid_out, passed = arguments.laid_out, arguments.passed

        def fake(*args: Any) -> Any:
            args = arguments.all_of(args)
            return outputs(*(laid_out(args) if cpu is None else args))

        def extension_kernel(*args: Any) -> Any:
            args = laid_out(args)
            out = outputs(*args)
            each = out if isinstance(out, tuple) else (out,)
            given = args if passed is None else [args[i] for i in passed]
            getattr(extension, name)(*given, *each, get_num_threads())
            return out

        kernels: dict[str, Implementation] = {}
        if cpu is not None or hasattr(extension, name):
            kernels["cpu"] = cpu or extension_kernel
        if triton is not None:
            kernels["triton"] = _lazily(triton)
        if cuda is not None:
            kernels["cuda"] = cuda
        declared = _operators[name] = Operator(name, function, kernels, arguments.tensors, float64)

        _library.define(torch.library.infer_schema(function, mutates_args=mutates, op_name=name))
        torch.library.register_fake(f"ramp_fast::{name}", fake, lib=_library)
        for device, key in _DEVICE_KEYS.items():
            _library.impl(name, _dispatcher(declared, arguments, device), key)
        overload = getattr(torch.ops.ramp_fast, name).default

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return overload(*args, **kwargs)

        return cast("Function", call)

    return declare


def equation(name: str) -> Implementation:
    """The reference of an operator as a plain function, whatever backend is chosen."""
    return _operators[name].reference


def _dispatcher(declared: Operator, arguments: _Arguments, device: str) -> Implementation:
    count, all_of = arguments.count, arguments.all_of

    def call(*args: Any) -> Any:
        return declared.chosen[device](*(args if len(args) == count else all_of(args)))

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
