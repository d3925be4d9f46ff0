"""Run by test_triton.py: compile every Triton kernel ahead of time, without a GPU."""

from __future__ import annotations

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ramp_fast.kernels.junction import junction_kernel
from ramp_fast.kernels.norm import norm_pullback_kernel

NORM = {"RHS": 2, "WIDTH": 768, "EPS": 1e-6, "HAS_WEIGHT": True, "COMPUTE": tl.float32, "BLOCK": 1024}
JUNCTION = {"RHS": 2, "CONTRAST": True, "COMPUTE": tl.float32, "BLOCK": 2048}
SOURCES = {
    "norm_pullback": (
        norm_pullback_kernel,
        {"c_ptr": "*bf16", "x_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16"} | {"rows": "i32"},
        NORM,
    ),
    "junction": (
        junction_kernel,
        {"c_ptr": "*fp32", "a_ptr": "*fp32", "b_ptr": "*fp32", "c_a_ptr": "*fp32", "c_b_ptr": "*bf16"}
        | {"masses_ptr": "*fp32", "batch": "i32", "inner": "i32"},
        JUNCTION,
    ),
}


def main() -> None:
    capability = int(sys.argv[1])
    report = {}
    for name, (kernel, signature, constants) in SOURCES.items():
        source = ASTSource(
            fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=dict(constants)
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        report[name] = {
            "target": f".target sm_{capability}" in compiled.asm["ptx"],
            "cubin": len(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
            "spilled": ".local" in compiled.asm["ptx"],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
