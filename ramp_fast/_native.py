"""Loading of the C++ extension ``ramp_fast._C``, which may be absent."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

REQUIRE_VARIABLE = "RAMP_FAST_REQUIRE_EXTENSION"
ISA_VARIABLE = "RAMP_FAST_CPU_ISA"

_ADVICE = (
    "The reference operators are used instead: same results, slower. To build the extension install a C++17 "
    "compiler and run `pip install --force-reinstall --no-deps ramp-fast`"
)


def _is_required() -> bool:
    return os.environ.get(REQUIRE_VARIABLE, "").lower() in ("1", "true", "yes", "on")


def _is_waived() -> bool:
    return os.environ.get(REQUIRE_VARIABLE, "").lower() in ("0", "false", "no", "off")


def _report(reason: str, *, stacklevel: int) -> None:
    """Warn that the extension is missing; an ImportError where it is required."""
    if _is_required():
        raise ImportError(f"{reason}, and {REQUIRE_VARIABLE} is set")
    warnings.warn(f"{reason}. {_ADVICE}.", RuntimeWarning, stacklevel=stacklevel + 1)


def _shadowed() -> Path | None:
    """Another ``ramp_fast`` on ``sys.path``, with an extension for this Python, that this one hides."""
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        folder = Path(entry or os.curdir, "ramp_fast").absolute()
        if any(Path(folder, f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES) and folder.resolve() != here:
            return folder
    return None


def check_installed() -> None:
    """Report at ``import ramp_fast`` that the extension was not built, without loading it or torch.

    Raises
    ------
    ImportError
        The extension is missing and required, or there is an installed package that has one: then the sources of a
        checkout were imported in its place, by ``python -m`` at the checkout's root or by ``PYTHONPATH``.
    """
    if importlib.util.find_spec("ramp_fast._C") is not None:
        return
    other = None if _is_waived() else _shadowed()
    if other is not None:
        raise ImportError(
            f"ramp_fast was imported from {Path(__file__).parent}, which has no C++ extension, in place of the "
            f"installed package in {other}, which has one. Run from another folder (`pytest` instead of `python -m "
            f"pytest`), install the checkout with `pip install -e .`, or set {REQUIRE_VARIABLE}=0 to run it with the "
            "slower reference operators"
        )
    _report("ramp_fast is installed without its C++ extension", stacklevel=3)


def load() -> tuple[ModuleType | None, str, str]:
    """Import the extension and attach it to PyTorch's OpenMP pool.

    Returns
    -------
    extension : module or None
    reason : str
        Why there is no extension; empty if there is.
    pool : str
        The library whose thread pool the kernels run on; empty if they run on one thread.

    Raises
    ------
    ImportError
        The extension cannot be loaded and ``RAMP_FAST_REQUIRE_EXTENSION`` is set.
    BackendError
        ``RAMP_FAST_CPU_ISA`` names an instruction set that cannot run here.
    """
    import torch  # before the extension: its OpenMP pool must exist by then

    if importlib.util.find_spec("ramp_fast._C") is None:
        return None, "it was not built (no C++ compiler was found when ramp_fast was installed)", ""
    try:
        from ramp_fast import _C
    except ImportError as error:
        reason = f"it cannot be loaded: {error}"
        _report(f"ramp_fast's C++ extension is installed, but {reason}", stacklevel=2)
        return None, reason, ""

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    pool = _C.bind_openmp(str(library) if library.exists() else "libtorch_cpu.so")
    isa = os.environ.get(ISA_VARIABLE)
    if isa:
        from ramp_fast.errors import BackendError

        try:
            _C.set_isa(isa)
        except ValueError as error:
            raise BackendError(f"{ISA_VARIABLE}: {error}") from None
    return _C, "", pool
