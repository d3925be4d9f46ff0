"""Compile every Triton kernel ahead of time, without a GPU.

``compile_triton.py 80 90`` compiles one configuration per kernel for these compute capabilities and prints a JSON
object for each, or with ``--table`` a table for bench/LOG.md instead; with ``--all`` every configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ramp_fast.kernels import (
    activation,
    attention,
    common,
    junction,
    linear,
    masses,
    max_pool,
    product,
    scaling,
    softmax,
)
from ramp_fast.kernels.common import offered
from ramp_fast.kernels.norm import norm_gradient_kernel, norm_pullback_kernel
from ramp_fast.ops.activation import FUNCTIONS, SHARES

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Source:
    """A kernel as ViT-B/16 with contrast launches it."""

    name: str
    kernel: Any
    types: dict[str, str]  # of pointers and numbers
    constants: dict[str, Any]
    configs: Callable[[int], tuple[triton.Config, ...]]  # for a compute capability
    products: bool = False  # on tensor cores
    wgmma: bool = False  # by the instruction of sm_90 for tiles of 64 rows and more


def one_config(warps: int) -> Callable[[int], tuple[triton.Config, ...]]:
    return lambda capability: (triton.Config({}, num_warps=warps),)


def _sources() -> Iterator[Source]:
    yield Source(
        "sum_partials",
        common.sum_kernel,
        {"partials_ptr": "*fp32", "out_ptr": "*fp32"},
        {"COUNT": 197 * 12, "BLOCK": common.SUM_BLOCK},
        one_config(4),
    )
    yield Source(
        "prepare attention",
        attention.prepare_kernel,
        {"x_ptr": "*fp32", "gate_ptr": "*fp32", "whole_ptr": "*fp16", "powers_ptr": "*fp32"}
        | {"halves_ptr": "*bf16"}
        | dict.fromkeys(("x_t", "x_b", "x_h", "x_n", "gate_b", "gate_h", "gate_n", "batch", "num_maps"), "i32"),
        {"HEADS": 12, "COUNT": 197, "WIDTH": 64, "FACTOR": 1, "GATE": True, "WHOLE": 2, "HALVES": 3}
        | {"BOTH": True, "BLOCK_D": 64, "BLOCK": 64, "BLOCKS": 4},
        one_config(8),
    )
    for name, kernel, maps in (("norm_pullback", norm_pullback_kernel, 2), ("norm_gradient", norm_gradient_kernel, 1)):
        yield Source(
            name,
            kernel,
            {"c_ptr": "*bf16", "x_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16", "rows": "i32"},
            {"NUM_MAPS": maps, "WIDTH": 768, "EPS": 1e-6, "HAS_WEIGHT": True, "COMPUTE": tl.float32, "BLOCK": 1024},
            one_config(4),
        )
    for merge in (False, True):
        yield Source(
            "merge_junction" if merge else "junction",
            junction.junction_kernel,
            dict.fromkeys(("c_ptr", "c_scale_ptr", "second_ptr", "second_scale_ptr", "a_ptr", "b_ptr"), "*fp32")
            | {"c_a_ptr": "*fp32", "c_b_ptr": "*bf16", "masses_ptr": "*fp32", "batch": "i32", "inner": "i32"},
            PAIR | {"MERGE": merge, "RELU": True, "BLOCK": junction.BLOCK},
            one_config(junction.WARPS),
        )
    yield Source(
        "merge",
        scaling.merge_kernel,
        dict.fromkeys(("first_ptr", "first_scale_ptr", "second_ptr", "second_scale_ptr", "out_ptr"), "*fp32")
        | {"batch": "i32", "inner": "i32"},
        PAIR | {"SECOND": True, "BLOCK": scaling.BLOCK},
        one_config(scaling.WARPS),
    )
    yield Source(
        "mass",
        scaling.mass_kernel,
        {"x_ptr": "*fp32", "c_ptr": "*bf16", "masses_ptr": "*fp32", "batch": "i32", "inner": "i32"},
        PAIR | {"BLOCK": scaling.BLOCK},
        one_config(scaling.WARPS),
    )
    yield Source(
        "scale_by",
        scaling.scale_by_kernel,
        {
            "c_ptr": "*bf16",
            "x_ptr": "*bf16",
            "n_scale_ptr": "*fp32",
            "out_ptr": "*bf16",
            "batch": "i32",
            "inner": "i32",
        },
        {"NUM_MAPS": 2, "GATE": False, "N_SCALED": True, "COMPUTE": tl.float32, "BLOCK": scaling.BLOCK},
        one_config(scaling.WARPS),
    )
    yield Source(
        "ratio",
        scaling.ratio_kernel,
        {"c_ptr": "*bf16", "z_ptr": "*fp32", "d_ptr": "*bf16", "out_ptr": "*bf16", "stabilizer_ptr": "*fp32"}
        | {"batch": "i32", "inner": "i32"},
        {"NUM_MAPS": 1, "SIDE": 1, "COMPUTE": tl.float32, "BLOCK": scaling.BLOCK},
        one_config(scaling.WARPS),
    )
    yield Source(
        "rescale_parts",
        scaling.rescale_parts_kernel,
        {"c_ptr": "*bf16", "scale_ptr": "*fp32", "out_ptr": "*bf16"}
        | dict.fromkeys(("batch", "inner", "parts", "width"), "i32"),
        PAIR | {"BLOCK": scaling.BLOCK},
        one_config(scaling.WARPS),
    )
    for (number, function), channels in itertools.product(enumerate(FUNCTIONS), (0, 96)):
        pointers = {
            "x_ptr": "*fp32",
            "gain_ptr": "*fp32",
            "shift_ptr": "*fp32",
            "y_ptr": "*fp32",
            "factor_ptr": "*bf16",
        }
        yield Source(
            f"activation_factor, {function}{', gain' * bool(channels)}",
            activation.activation_factor_kernel,
            pointers | {"elements": "i32"},
            {"FUNCTION": number, "FACTOR": True, "CHANNELS": channels, "BLOCK": activation.BLOCK},
            one_config(activation.WARPS),
        )
    for number, function in enumerate(SHARES):
        yield Source(
            f"activation_share, {function}",
            activation.activation_share_kernel,
            {"x_ptr": "*fp32", "y_ptr": "*fp32", "factor_ptr": "*bf16", "elements": "i32"},
            {"FUNCTION": number, "BLOCK": activation.BLOCK},
            one_config(activation.WARPS),
        )
    yield Source(
        "affine_factor",
        activation.affine_factor_kernel,
        {"x_ptr": "*fp32", "gain_ptr": "*fp32", "shift_ptr": "*fp32", "y_ptr": "*fp32", "factor_ptr": "*bf16"}
        | {"elements": "i32", "cap": "fp32"},
        {"CHANNELS": 256, "INNER": 56 * 56, "RELU": True, "BLOCK": activation.BLOCK},
        one_config(activation.WARPS),
    )
    yield Source(
        "max_pool_pullback",  # VGG-16's first
        max_pool.max_pool_pullback_kernel,
        {"c_ptr": "*bf16", "x_ptr": "*fp32", "out_ptr": "*bf16", "batch": "i32"},
        {"NUM_MAPS": 2, "HEIGHT": 224, "WIDTH": 224, "CHANNELS": 64, "KERNEL_HEIGHT": 2, "KERNEL_WIDTH": 2}
        | {"DIVIDED": False, "COMPUTE": tl.float32, "BLOCK": max_pool.BLOCK},
        one_config(max_pool.WARPS),
    )
    yield Source(
        "softmax_pullback",
        softmax.softmax_pullback_kernel,
        {"scores_ptr": "*fp32", "c_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32"},
        {"NUM_MAPS": 2, "WIDTH": 197, "COMPUTE": tl.float32, "BLOCK": 256},
        one_config(4),
    )
    yield Source(
        "split",
        product.split_kernel,
        {"x_ptr": "*fp32", "parts_ptr": "*fp16", "scale_ptr": "*fp32", "rows": "i32"},
        {"DEPTH": 3072, "BLOCK": product.SPLIT_BLOCK},
        one_config(product.SPLIT_WARPS),
    )
    yield Source(
        "centring",
        scaling.centring_kernel,
        {"c_ptr": "*bf16", "x_ptr": "*fp32", "gain_ptr": "*fp32", "shift_ptr": "*fp32", "out_ptr": "*fp32"}
        | dict.fromkeys(("to_d", "batch", "inner", "step"), "i32"),
        {"COUNT": 2048, "RUN": 32, "CHANNELS": 256, "WEIGHTED": True, "AFFINE": True, "GATE": True, "BLOCK": 2048},
        one_config(scaling.WARPS),
    )
    yield Source(
        "share",
        masses.share_kernel,
        dict.fromkeys(("target_ptr", "first_ptr", "second_ptr", "third_ptr", "out_ptr"), "*fp32") | {"elements": "i32"},
        {"THREE": True, "BLOCK": masses.BLOCK},
        one_config(masses.WARPS),
    )
    yield Source(
        "scale_to",
        masses.scale_to_kernel,
        dict.fromkeys(("target_ptr", "actual_ptr", "scale_ptr", "mass_ptr"), "*fp32") | {"elements": "i32"},
        {"BLOCK": masses.BLOCK},
        one_config(masses.WARPS),
    )
    yield Source(
        "row_statistics",
        linear.statistics_kernel,
        {"x_ptr": "*fp32", "statistics_ptr": "*fp32"},
        {"WIDTH": 768, "EPS": 1e-6, "BLOCK": 1024},
        one_config(4),
    )
    for dtype, norm in itertools.product((torch.bfloat16, torch.float32), (True, False)):
        element = POINTERS[dtype]
        optional = dict.fromkeys(("statistics_ptr", "weight_ptr", "bias_ptr", "masses_ptr"), "*fp32")
        yield Source(
            f"linear_{'norm_' * norm}pullback, {NAMES[dtype]}",
            linear.linear_pullback_kernel,
            {"c_ptr": element, "halves_ptr": element, "x_ptr": "*fp32", "out_ptr": "*fp32" if norm else element}
            | optional
            | {"rows": "i32"},
            {"GROUPS": 1 if norm else 2, "GROUP_MAPS": 2 if norm else 1, "DEPTH": 3072, "WIDTH": 768, "NORM": norm}
            | {"HAS_WEIGHT": norm, "HAS_BIAS": norm, "PRECISION": linear.PRECISION[dtype], "FEW": False},
            lambda capability, dtype=dtype: tuple(
                offered(linear.CONFIGS[dtype], capability // 10, 3072 * dtype.itemsize)
            ),
            products=True,
            wgmma=True,
        )
    for dtype, parts in ((torch.bfloat16, 1), (torch.float32, 2)):
        yield Source(
            f"product, {NAMES[dtype]}",
            product.product_kernel,
            dict.fromkeys(("x_ptr", "w_ptr"), "*bf16" if parts == 1 else "*fp16")
            | dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32")
            | dict.fromkeys(("bias_ptr", "out_ptr"), POINTERS[dtype])
            | {"rows": "i32"},
            {"DEPTH": 768, "WIDTH": 3072, "PARTS": parts, "HAS_BIAS": True, "FEW": False},
            lambda capability, dtype=dtype: tuple(
                offered(product.configs(dtype, capability // 10), capability // 10, 768 * 2)
            ),
            products=True,
            wgmma=True,
        )

    for dtype, width, gated in itertools.product((torch.bfloat16, torch.float32), (64, 128), (True, False)):
        yield from _attention(dtype, torch.float32, width, gated)
    yield from _attention(torch.bfloat16, torch.bfloat16, 64, True)
    for dtype, width in itertools.product((torch.bfloat16, torch.float32), (64, 128)):
        yield from _attention_gradient(dtype, torch.float32, width)
    yield from _attention_gradient(torch.bfloat16, torch.bfloat16, 64)


PAIR = {"NUM_MAPS": 2, "CONTRAST": True, "COMPUTE": tl.float32}


def _attention(dtype: torch.dtype, scores: torch.dtype, width: int, gated: bool) -> Iterator[Source]:
    """197 tokens and 12 heads, q, k and v of the dtype ``scores``, coefficients of ``dtype``."""
    name = f"{NAMES[dtype]}, {width} columns{', gated' * gated}{', bf16 scores' * (scores == torch.bfloat16)}"
    parts = 1 if dtype == torch.bfloat16 else 3
    score_parts = 1 if scores == torch.bfloat16 else 2
    constants = {"NUM_MAPS": 2, "HEADS": 12, "QUERIES": 197, "KEYS": 197, "WIDTH": width, "QUERY_ROWS": 256}
    constants |= {"KEY_ROWS": 256, "GATED": gated, "CONTRAST": attention.paired(width, parts)}
    constants |= {"SCORE_PARTS": score_parts, "PARTS": parts, "BLOCK_D": attention.padded(width)}

    def config(capability: int) -> tuple[triton.Config, ...]:
        return attention.configs(capability, width, parts, gated)

    for kernel in (attention.queries_kernel, attention.keys_kernel):
        types = {n: "i32" for n in kernel.arg_names if n not in (*constants, "OWN", "OTHER", "APART")}
        types["scale"] = "fp32"
        types |= {n: "*bf16" for n in types if n.endswith("_ptr")}
        if score_parts == 2:
            types |= {"q_ptr": "*fp16", "k_ptr": "*fp16"}
        types |= dict.fromkeys({"x_ptr", "k_raw_ptr", "v_raw_ptr"} & types.keys(), POINTERS[scores])
        wide = {"q_powers_ptr", "k_powers_ptr", "statistics_ptr", "masses_ptr"} & types.keys()
        outputs = {"out_ptr", "c_k_ptr", "c_v_ptr"} & types.keys()
        types |= dict.fromkeys(wide, "*fp32") | dict.fromkeys(outputs, POINTERS[dtype])
        by = "queries" if kernel is attention.queries_kernel else "keys"
        # Tiles of less than 64 rows, all that fits for the last of these, are not for wgmma.
        wgmma = parts == 1 or width <= 64
        yield Source(f"attention by {by}, {name}", kernel, types, constants, config, True, wgmma)


def _attention_gradient(dtype: torch.dtype, scores: torch.dtype, width: int) -> Iterator[Source]:
    """The same of one map."""
    name = f"{NAMES[dtype]}, {width} columns{', bf16 scores' * (scores == torch.bfloat16)}"
    parts = 1 if dtype == torch.bfloat16 else 3
    score_parts = 1 if scores == torch.bfloat16 else 2
    constants: dict[str, Any] = {
        "NUM_MAPS": 1,
        "HEADS": 12,
        "QUERIES": 197,
        "KEYS": 197,
        "WIDTH": width,
        "QUERY_ROWS": 256,
    }
    constants |= {"KEY_ROWS": 256, "SCORE_PARTS": score_parts, "PARTS": parts, "BLOCK_D": attention.padded(width)}

    def config(capability: int) -> tuple[triton.Config, ...]:
        return attention.configs(capability, width, parts, True)

    for kernel in (attention.gradient_queries_kernel, attention.gradient_keys_kernel):
        types = {n: "i32" for n in kernel.arg_names if n not in (*constants, "OWN", "OTHER", "APART")}
        types |= dict.fromkeys({"scale", "share", "value_share"} & types.keys(), "fp32")
        types |= {n: "*bf16" for n in types if n.endswith("_ptr")}
        if score_parts == 2:
            types |= {"q_ptr": "*fp16", "k_ptr": "*fp16"}
        types |= dict.fromkeys(("q_powers_ptr", "k_powers_ptr", "norms_ptr", "means_ptr"), "*fp32")
        types |= dict.fromkeys({"out_ptr", "c_k_ptr", "c_v_ptr"} & types.keys(), POINTERS[dtype])
        by = "queries" if kernel is attention.gradient_queries_kernel else "keys"
        wgmma = parts == 1 or width <= 64
        yield Source(f"gradient of attention by {by}, {name}", kernel, types, constants, config, True, wgmma)


POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
NAMES = {torch.bfloat16: "bf16", torch.float32: "float32"}
SOURCES = list(_sources())
# Of attention, what is compiled without --all.
TYPICAL = {f"attention by {by}, bf16, 64 columns, gated" for by in ("queries", "keys")}
TYPICAL |= {f"gradient of attention by {by}, bf16, 64 columns" for by in ("queries", "keys")}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes."""

    kernel: str
    config: str
    capability: int
    target: bool  # compiled for this capability
    products: bool
    wgmma: bool
    wgmma_wanted: bool
    warps: int
    registers: int  # of a thread
    stack: int  # bytes of a thread, where registers spill
    shared: int  # bytes
    tensor_memory: int  # columns; sm_100 and later
    traps: bool  # what the compiler gives up on may become an instruction that ends the kernel, without an error

    def occupancy(self) -> float:
        """Resident warps over those an SM can hold (64 in all three), as far as the kernel's resources decide."""
        per_sm = {80: 164, 90: 228, 100: 228}[self.capability] * 1024
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = per_sm // (self.shared + 1024)  # one KB of each block is the system's
        return min(by_registers, by_shared, 32, 64 // self.warps) * self.warps / 64


def compile_kernel(source: Source, config: triton.Config, capability: int, ones: bool = False) -> Report:
    """Compile for one capability; with ``ones`` as a launch does where every integer is 1: it makes them constants."""
    constants = source.constants | config.kwargs
    if ones:
        exempt = source.kernel.do_not_specialize
        constants |= {n: 1 for n, t in source.types.items() if t == "i32" and n not in exempt}
    types = source.types | dict.fromkeys(constants, "constexpr")
    names = source.kernel.arg_names
    # What a launch finds out about its arguments: tensors begin at multiples of 16 bytes, strides (x_t) are such.
    aligned = [n for n, t in types.items() if t.startswith("*") or (t == "i32" and n[-2:-1] == "_")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    compiled = triton.compile(
        ASTSource(fn=source.kernel, signature=types, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    resources = _resources(compiled.asm["cubin"])
    numbers = [str(size) for size in config.kwargs.values() if not isinstance(size, bool)]
    sizes = ["x".join(numbers)] if numbers else []
    flags = [name.lower() for name, value in config.kwargs.items() if value is True]
    return Report(
        source.name,
        ", ".join([*sizes, f"{config.num_warps} warps", *([f"{config.num_stages} stages"] if sizes else []), *flags]),
        capability,
        f".target sm_{capability}" in compiled.asm["ptx"],
        source.products,
        "wgmma" in compiled.asm["ptx"],
        source.wgmma and capability == 90,
        config.num_warps,
        resources["REG"],
        resources["STACK"],
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        re.search(r"^\s*trap;", compiled.asm["ptx"], re.MULTILINE) is not None,
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK (spills) and SHARED of a cubin, from the cuobjdump in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}


def _table(reports: list[Report]) -> Iterator[str]:
    capabilities = sorted({r.capability for r in reports})
    yield "| kernel | tile, warps, stages | " + " | ".join(f"sm_{c}" for c in capabilities) + " |"
    yield "|---" * (2 + len(capabilities)) + "|"
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for r in reports:
        cell = f"{r.registers}, {r.shared / 1024:.0f} KB, {r.occupancy():.0%}"
        rows.setdefault((r.kernel, r.config), {})[r.capability] = cell
    for (kernel, config), cells in rows.items():
        yield f"| {kernel} | {config} | " + " | ".join(cells.get(c, "") for c in capabilities) + " |"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration, not one per kernel")
    parser.add_argument("--ones", action="store_true", help="with every integer argument 1")
    parser.add_argument("--table", action="store_true", help="a table: registers, shared memory, occupancy")
    parser.add_argument("capabilities", type=int, nargs="+")
    options = parser.parse_args()
    reports = []
    for source in SOURCES:
        if not options.all and "attention by" in source.name and source.name not in TYPICAL:
            continue
        for capability in options.capabilities:
            configs = source.configs(capability)
            for config in configs if options.all else configs[:1]:
                reports.append(compile_kernel(source, config, capability, options.ones))
                if not options.table:
                    print(json.dumps(vars(reports[-1])), flush=True)
    if options.table:
        print("\n".join(_table(reports)))


if __name__ == "__main__":
    main()
