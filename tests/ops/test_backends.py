"""Choice of backend and instruction set, loading of the extension, and its DLPack boundary."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch

from ramp_fast import BackendError, _native, ops
from ramp_fast.ops import _registry

needs_extension = pytest.mark.skipif(_registry.extension is None, reason="tests the C++ extension itself")


def python(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAMP_FAST_")} | environment
    # not in the checkout, which would hide an installed package behind its sources
    cwd = folder or os.path.abspath(os.sep)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, check=False)


# Makes `ramp_fast._C` impossible to find, as in an installation that was built without a compiler.
WITHOUT_EXTENSION = """
import importlib.machinery, importlib.util, warnings
importlib.machinery.EXTENSION_SUFFIXES = []  # an editable installation keeps it in another folder
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "ramp_fast._C" else find_spec(name, package)
"""


def test_without_the_extension_there_is_one_warning_and_the_reference_runs() -> None:
    # nor may choosing backends ask for CUDA devices, which would spoil later forks
    result = python(
        WITHOUT_EXTENSION
        + """
import torch
torch.cuda.is_available = lambda: 1 / 0
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ramp_fast
    from ramp_fast import ops
    assert ops.mass(torch.ones(1, 3), torch.ones(1, 1, 3), False).item() == 3
ours = [w for w in caught if "ramp_fast" in str(w.message)]
assert len(ours) == 1 and "without its C++ extension" in str(ours[0].message), ours
assert "C++" in ops.unavailable("cpu")
try:
    ops.set_backend("cpu")
except ramp_fast.BackendError as error:
    print(error)
"""
    )
    assert result.returncode == 0, result.stderr
    assert "extension is missing" in result.stdout


def test_a_required_extension_that_is_missing_is_an_error() -> None:
    result = python(WITHOUT_EXTENSION + "import ramp_fast", RAMP_FAST_REQUIRE_EXTENSION="1")
    assert "ImportError: ramp_fast is installed without its C++ extension" in result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the package's Python files alone, as at the root of a clone."""
    for name in ("__init__.py", "_native.py", "errors.py"):
        target = tmp_path / "clone" / "ramp_fast" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(_native.__file__).with_name(name), target)
    return tmp_path / "clone"


# Nothing of what is installed can be imported, by its files or by the hook of an editable installation.
NOTHING_INSTALLED = """
import os, sys
sys.path[:] = [p for p in sys.path if not (p and os.path.isdir(os.path.join(p, "ramp_fast")))]
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
"""


def installed(tmp_path: Path, extension: bool) -> str:
    """Code that puts a folder with an installed package on the path."""
    folder = tmp_path / "installed" / "ramp_fast"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    if extension:
        (folder / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    return NOTHING_INSTALLED + f"sys.path.append({str(folder.parent)!r})\n"


def test_a_checkout_that_hides_an_installed_extension_is_an_error(checkout: Path, tmp_path: Path) -> None:
    """``python -m pytest`` at the root of a clone ran the reference operators, and a warning was all that told."""
    code = installed(tmp_path, extension=True) + "import ramp_fast; print(ramp_fast.__file__)"
    result = python(code, checkout)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: ramp_fast was imported from {checkout / 'ramp_fast'}, which has no C++")
    assert str(tmp_path / "installed" / "ramp_fast") in message
    assert "pip install -e ." in message
    result = python(code, checkout, RAMP_FAST_REQUIRE_EXTENSION="0")
    assert result.stdout.strip() == str(checkout / "ramp_fast" / "__init__.py"), result.stderr
    assert "RuntimeWarning: ramp_fast is installed without its C++ extension" in result.stderr


def test_a_checkout_alone_warns(checkout: Path, tmp_path: Path) -> None:
    code = installed(tmp_path, extension=False) + "import ramp_fast; print(ramp_fast.__file__)"
    result = python(code, checkout)
    assert result.stdout.strip() == str(checkout / "ramp_fast" / "__init__.py"), result.stderr
    assert "RuntimeWarning: ramp_fast is installed without its C++ extension" in result.stderr


def test_import_does_not_load_torch() -> None:
    result = python("import ramp_fast, sys; assert 'torch' not in sys.modules; print(ramp_fast.__version__)")
    assert result.returncode == 0, result.stderr


@needs_extension
@pytest.mark.parametrize("isa", ops.cpu_isas())
def test_instruction_set_by_environment(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMP_FAST_CPU_ISA", isa)
    extension, reason, _ = _native.load()
    assert not reason
    assert extension.active_isa() == isa


@needs_extension
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMP_FAST_CPU_ISA", "sse9")
    with pytest.raises(BackendError, match=r"RAMP_FAST_CPU_ISA.*supported here: generic"):
        _native.load()
    with pytest.raises(ValueError, match="does not run on this processor"):
        ops.set_cpu_isa("sse9")


def test_backend_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMP_FAST_BACKEND", "reference")
    _registry.force_from_environment()
    assert ops.forced_backend() == "reference"


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMP_FAST_BACKEND", "gpu")
    with pytest.raises(BackendError, match="RAMP_FAST_BACKEND=gpu: unknown backend"):
        _registry.force_from_environment()
    with pytest.raises(BackendError, match="unknown backend"):
        ops.set_backend("gpu")


def test_unavailable_backend() -> None:
    with pytest.raises(BackendError, match="cannot run here"):
        ops.set_backend("cuda")
    assert ops.forced_backend() is None


@needs_extension
def test_default_backend_is_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = _registry.extension.mass
    monkeypatch.setattr(_registry.extension, "mass", lambda *args: (calls.append("kernel"), original(*args)))
    x, c = torch.ones(1, 3), torch.ones(1, 1, 3)
    ops.mass(x, c, False)
    assert calls == ["kernel"]
    ops.set_backend("reference")
    ops.mass(x, c, False)
    assert calls == ["kernel"]


@needs_extension
def test_dtypes_without_a_kernel_fall_back_unless_the_backend_is_forced() -> None:
    x, c = torch.ones(1, 3, dtype=torch.float16), torch.ones(1, 1, 3, dtype=torch.float16)
    assert ops.mass(x, c, False).item() == 3
    ops.set_backend("cpu")
    with pytest.raises(BackendError, match=r"does not take torch\.float16"):
        ops.mass(x, c, False)


@needs_extension
def test_a_forced_cpu_backend_refuses_other_devices() -> None:
    ops.set_backend("cpu")
    with pytest.raises(BackendError, match="does not run on cuda tensors"):
        _registry._operators["mass"].chosen["cuda"]()


def test_kernels_of_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA C++ before Triton, and the reference where the driver is too old; forced, none stands in for another
    def operator(*backends: str) -> _registry.Operator:
        return _registry.Operator("some", lambda x: "reference", {b: lambda x, b=b: b for b in backends}, (0,))

    x, problems = torch.ones(1), [""]
    monkeypatch.setattr(_registry, "_missing", lambda backend: "")
    monkeypatch.setattr(_registry, "_cuda_problem", lambda device: problems[0])
    assert operator("cpu", "triton", "cuda").chosen["cuda"](x) == "cuda"
    assert operator("cpu", "triton").chosen["cuda"](x) == "triton"
    assert operator("cpu").chosen["cuda"](x) == "reference"
    assert operator("cuda").chosen["xpu"](x) == "reference"
    assert operator("cuda").chosen["cuda"](x.half()) == "reference"
    problems[0] = "its driver is too old"
    assert operator("cuda", "triton").chosen["cuda"](x) == "reference"
    monkeypatch.setattr(_registry, "_missing", lambda backend: "was not built")
    assert operator("cuda").chosen["cuda"](x) == "reference"
    monkeypatch.setattr(_registry, "_forced", "cuda")
    assert operator("cuda", "triton").chosen["cuda"](x) == "cuda"
    for device, backends, problem in [
        ("cuda", ("triton",), "has no kernel for it"),
        ("xpu", ("cuda",), "does not run on xpu"),
        ("cpu", ("cuda", "cpu"), "does not run on cpu"),
    ]:
        with pytest.raises(BackendError, match=problem):
            operator(*backends).chosen[device](x)


def multiple_for_tests(x: torch.Tensor, factor: int = 2, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The multiple."""
    return (factor * x).to(dtype or x.dtype)


def test_an_operator_is_its_reference_and_its_outputs() -> None:
    # the first step of CONTRIBUTING's recipe: no kernel yet
    call = _registry.operator(outputs=lambda x, _, dtype: torch.empty_like(x, dtype=dtype or x.dtype))(
        multiple_for_tests
    )
    declared = _registry._operators.pop("multiple_for_tests")
    overload = torch.ops.ramp_fast.multiple_for_tests.default
    assert str(overload._schema).partition("::")[2] == (
        "multiple_for_tests(Tensor x, SymInt factor=2, ScalarType? dtype=None) -> Tensor"
    )
    x = torch.arange(3.0)
    assert torch.equal(call(x), 2 * x)
    assert torch.equal(call(x, dtype=torch.float64, factor=3), 3 * x.double())
    assert call.__doc__ == "The multiple."
    assert declared.reference is _registry.Operator("same", declared.reference, {}, (0,)).chosen["cpu"]
    torch.use_deterministic_algorithms(False)  # opcheck compares freshly allocated fakes
    torch.library.opcheck(overload, (x, 3, torch.bfloat16))


def test_cuda_kernels_that_cannot_run_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = types.SimpleNamespace(cuda_problem=lambda device: f"no kernel image for device {device}")
    monkeypatch.setattr(_registry, "extension", extension)
    _registry._cuda_problem.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"cannot run on cuda:1: no kernel image for device 1") as caught:
            assert _registry._cuda_problem(1) == _registry._cuda_problem(1) == "no kernel image for device 1"
        assert len(caught) == 1
    finally:
        _registry._cuda_problem.cache_clear()


@needs_extension
def test_numpy_arrays_through_capsules() -> None:
    # not a torch tensor: the view comes from a DLPack capsule, which is consumed
    x, c, out = np.full((1, 3), 2.0, np.float32), np.ones((1, 1, 3), np.float32), np.empty((1, 1), np.float32)
    references = sys.getrefcount(x)
    for _ in range(3):
        _registry.extension.mass(x, c, False, out, 1)
    assert out.item() == 6
    assert sys.getrefcount(x) == references


@needs_extension
@pytest.mark.parametrize(
    ("x", "error", "problem"),
    [
        (torch.ones(1, 3, dtype=torch.float16), ValueError, "x must be float32, float64 or bfloat16"),
        (torch.ones(1, 3, dtype=torch.int32), ValueError, "x must be float32"),
        (torch.ones(1, 6)[:, ::2], ValueError, "same memory layout"),
        (torch.ones(1, 1, 1, 1, 1, 1, 1, 1, 3), ValueError, "at most 8"),
        ([1.0, 2.0], TypeError, "x must be a tensor"),
        (None, TypeError, "x must be a tensor"),
    ],
)
def test_views_refuse(x: object, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        _registry.extension.mass(x, torch.ones(1, 1, 3), False, torch.empty(1, 1), 1)


@needs_extension
def test_outputs_that_kernels_would_overrun_are_refused() -> None:
    extension, x, c = _registry.extension, torch.ones(1, 3), torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match="written as float32 or float64"):
        extension.mass(x, c, False, torch.empty(1, 1, dtype=torch.bfloat16), 1)
    with pytest.raises(ValueError, match="do not fit together"):
        extension.activation_factor(x, 0, None, None, torch.empty(1, 3, 0), torch.empty(1, 3), 1)
    with pytest.raises(ValueError, match="do not fit together"):
        extension.affine_factor(x, c[0, 0], c[0, 0], False, 0.0, False, torch.empty(1, 3), torch.empty(1, 3, 0), 1)


@needs_extension
def test_views_refuse_the_meta_device() -> None:
    with pytest.raises((ValueError, BufferError, RuntimeError)):
        _registry.extension.mass(torch.ones(1, 3, device="meta"), torch.ones(1, 1, 3), False, torch.empty(1, 1), 1)
