"""Fast relative absolute magnitude LRP (absLRP) attributions for PyTorch image models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ramp_fast import _native
from ramp_fast.errors import BackendError, InputError, RampFastError, UnsupportedModelError

if TYPE_CHECKING:
    from ramp_fast import rules
    from ramp_fast.engine import Engine
    from ramp_fast.explainer import Attribution

__all__ = [
    "Attribution",
    "BackendError",
    "Engine",
    "InputError",
    "RampFastError",
    "UnsupportedModelError",
    "__version__",
    "rules",
]

_LAZY = {"Engine": "ramp_fast.engine", "Attribution": "ramp_fast.explainer", "rules": "ramp_fast.rules"}

_native.check_installed()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("ramp-fast")
    elif name in _LAZY:
        module = importlib.import_module(_LAZY[name])
        value = module if name == "rules" else getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
