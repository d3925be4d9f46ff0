"""The C++ extension under AddressSanitizer and UndefinedBehaviorSanitizer: ``pytest -m sanitize``, a few minutes.

A sanitized copy of the package is built into an environment of its own, and the operators' other tests run on it.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(sys.platform != "linux", reason="loads the sanitizers with LD_PRELOAD"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="compiles the extension"),
]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAMP_FAST_", "CMAKE_", "SKBUILD_"))}
    env |= {"RAMP_FAST_REQUIRE_EXTENSION": "1"} | environment
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, **output, check=False)
    assert result.returncode == 0, result.stdout
    return result.stdout


def environment_with_sanitizers(folder: Path) -> tuple[Path, Path]:
    """Interpreter of a new environment that sees this one's packages and a sanitized ramp_fast; its extension."""
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # Folders named in a .pth file are searched, but their own .pth files, an editable ramp_fast's among them, are not.
    outer = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    (packages / "outer.pth").write_text("\n".join(outer))
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    settings = ["cmake.define.RAMP_FAST_SANITIZE=ON", "install.strip=false", f"build-dir={folder / 'build'}"]
    run(*pip, "--target", packages, *[f"--config-settings={s}" for s in settings], ROOT, cwd=folder)
    (extension,) = (packages / "ramp_fast").glob("_C*.so")
    return folder / "bin" / "python", extension


def test_no_reports(tmp_path: Path) -> None:
    python, extension = environment_with_sanitizers(tmp_path)
    linked = dict(re.findall(r"lib(\S+?)\.so\S* => (/\S+)", run("ldd", extension, cwd=tmp_path)))
    sanitizer = next(path for name, path in linked.items() if "asan" in name)
    compiling = [f"--ignore={HERE / name}" for name in ("test_triton.py", "test_cuda.py", "test_cuda_on_host.py")]
    run(
        *(python, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--capture=sys"),  # reports go to file descriptor 2
        *("-c", ROOT / "pyproject.toml", HERE, *compiling),
        cwd=tmp_path,
        # AddressSanitizer intercepts exceptions and has to find libstdc++ when it starts.
        LD_PRELOAD=f"{sanitizer}:{linked['stdc++']}",
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter never frees all of its memory
        UBSAN_OPTIONS="print_stacktrace=1",
    )
