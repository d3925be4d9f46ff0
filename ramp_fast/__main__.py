"""``python -m ramp_fast``: versions, devices, and for each backend whether it runs or why not."""

from __future__ import annotations

import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

from ramp_fast.errors import RampFastError

_PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "pillow", "safetensors")


def report() -> str:
    """Describe this installation, a line for each fact."""
    lines = [f"ramp_fast {_version('ramp-fast')}", f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    lines += ["", "devices", *_indented(_devices()), "", "backends", *_indented(_backends())]
    return "\n".join(lines)


def _indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    lines = [f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "this torch is built without CUDA" if built is None else f"built for CUDA {built}, no usable device"
        lines.append(f"cuda: unavailable ({reason})")
    return lines


def _backends() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing extension is reported below
        from ramp_fast import ops
        from ramp_fast.ops import _registry

    lines = []
    for backend in ops.BACKENDS:
        reason = ops.unavailable(backend)
        detail = f"unavailable ({reason})" if reason else "available"
        if backend == "cpu" and _registry.extension is not None:
            pool = (
                f"threads of {_registry.openmp_pool}" if _registry.openmp_pool else "one thread: no OpenMP pool found"
            )
            isas = ", ".join(ops.cpu_isas())
            detail += f" ({_registry.extension.active_isa()} of {isas}; {pool})"
        lines.append(f"{backend}: {detail}")
    lines.append(f"forced: {ops.forced_backend() or 'none'} ({_registry.BACKEND_VARIABLE})")
    return lines


if __name__ == "__main__":
    try:
        print(report())
    except (RampFastError, ImportError) as error:
        print(f"ramp_fast: {error}", file=sys.stderr)
        sys.exit(2)
