"""Run by test_triton.py: compile every Triton kernel ahead of time, without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ramp_fast.kernels import junction
from ramp_fast.kernels.junction import junction_kernel
from ramp_fast.kernels.norm import norm_pullback_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

NORM = {"RHS": 2, "WIDTH": 768, "EPS": 1e-6, "HAS_WEIGHT": True, "COMPUTE": tl.float32, "BLOCK": 1024}
JUNCTION = {"RHS": 2, "CONTRAST": True, "RELU": True, "COMPUTE": tl.float32, "BLOCK": junction.BLOCK}
SOURCES = {
    "norm_pullback": (
        norm_pullback_kernel,
        {"c_ptr": "*bf16", "x_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16"} | {"rows": "i32"},
        NORM,
        4,  # warps
    ),
    "junction": (
        junction_kernel,
        {"c_ptr": "*fp32", "a_ptr": "*fp32", "b_ptr": "*fp32", "c_a_ptr": "*fp32", "c_b_ptr": "*bf16"}
        | {"masses_ptr": "*fp32", "batch": "i32", "inner": "i32"},
        JUNCTION,
        junction.WARPS,
    ),
}


def main() -> None:
    """Print one JSON object per kernel and compute capability named on the command line."""
    for capability in map(int, sys.argv[1:]):
        for name, (kernel, signature, constants, warps) in SOURCES.items():
            types = signature | dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants))
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            report = {
                "kernel": name,
                "capability": capability,
                "target": f".target sm_{capability}" in compiled.asm["ptx"],
                "cubin": len(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "resources": _resources(compiled.asm["cubin"]),
            }
            print(json.dumps(report))


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK (spills) and SHARED of a cubin, from the cuobjdump in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}


if __name__ == "__main__":
    main()
