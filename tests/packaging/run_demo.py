"""Runs the demonstration from an installed wheel where no compiler is on the path.

    python tests/packaging/run_demo.py

cibuildwheel runs this in every wheel (pyproject.toml).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PHOTOS = 4


def main() -> None:
    """Check where the package comes from and that its kernels run, then attribute the photographs."""
    scripts = Path(sys.executable).parent
    os.environ["PATH"] = str(scripts)
    os.environ["RAMP_FAST_REQUIRE_EXTENSION"] = "1"
    for compiler in ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc"):
        assert shutil.which(compiler) is None, f"{compiler} is on the path {scripts}"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        about = subprocess.run([sys.executable, "-m", "ramp_fast"], check=True, capture_output=True, text=True).stdout
        print(about)
        assert "  cpu: available" in about
        where = [sys.executable, "-c", "import ramp_fast; print(ramp_fast.__file__)"]
        package = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
        assert "site-packages" in package.parts, f"ramp_fast comes from {package}"
        program = shutil.which("ramp-fast")
        assert program is not None
        subprocess.run([program, "attribute", "--out", "results"], check=True)
        assert len(list(Path("results").glob("*.npz"))) == PHOTOS
        assert (Path("results") / "contact_sheet.png").is_file()


if __name__ == "__main__":
    main()
