"""Compile the kernels ahead of time, without a GPU, and read what each program needs.

    python -m tests.kernels.compile_all [--only REGEX] [--json]

compiles every row of the tile table and prints registers, spilled bytes, shared memory and WGMMA counts.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stochca_kernels.backward import _attn_bwd_dkdv_kernel, _attn_bwd_dq_kernel
from stochca_kernels.forward import _attn_fwd_kernel
from stochca_kernels.tiles import TilePlan, Tiles, plans, tail_size

KERNELS = {"fwd": _attn_fwd_kernel, "dq": _attn_bwd_dq_kernel, "dkdv": _attn_bwd_dkdv_kernel}

# Shared memory of one program, in bytes.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
HEAD_DIMS = (32, 64, 80, 128)


class Case(NamedTuple):
    kernel: str
    gpu: str
    dtype: str
    length: int
    head_dim: int
    selector: str = "none"
    has_source_q: bool = False
    precision: str = "ieee"

    def __str__(self):
        flags = f"-{self.selector}" * (self.selector != "none") + ("-source_q" * self.has_source_q)
        precision = f"-{self.precision}" if self.dtype == "fp32" else ""
        return f"{self.kernel}-{self.gpu}-{self.dtype}{precision}-N{self.length}-D{self.head_dim}{flags}"


def compile_case(case: Case, tiles: Tiles | None = None) -> dict[str, Any]:
    """Compile one kernel as its launcher would for queries and keys of the same length."""
    kernel = KERNELS[case.kernel]
    if tiles is None:
        arithmetic = case.precision if case.dtype == "fp32" else "half"
        tiles = plans(case.kernel, case.gpu, arithmetic, case.head_dim, case.length)[0]
    constexprs: dict[str, Any] = {
        "HEAD_DIM": case.head_dim,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": triton.next_power_of_2(case.head_dim),
        "TAIL_N": tail_size(tiles.block_n, case.length),
        "TAIL_M": tail_size(tiles.block_m, case.length),
        "PARTS": TilePlan(case.length, tiles.block_n).parts,
        "WHOLE_ROW": tiles.whole_row,
        "SELECTOR": case.selector,
        "HAS_SELECTOR": case.selector != "none",
        "HAS_SOURCE_KV": case.selector == "pair",
        "HAS_SOURCE_Q": case.has_source_q,
        "HAS_LSE": True,
        "HAS_DELTA": True,
        "PRECISION": case.precision,
    }
    signature, attrs, used = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name], used[name] = "constexpr", constexprs[name]
        elif name == "use_source_ptr":
            signature[name] = "*i1"
        elif name in ("lse_ptr", "delta_ptr"):
            signature[name], attrs[(i,)] = "*fp32", [["tt.divisibility", 16]]
        elif name.endswith("_ptr"):
            signature[name], attrs[(i,)] = f"*{case.dtype}", [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name], attrs[(i,)] = "i32", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    amd = case.gpu.startswith("gfx")
    target = GPUTarget("hip", case.gpu, 64) if amd else GPUTarget("cuda", int(case.gpu[3:]), 32)
    compiled = triton.compile(
        ASTSource(kernel, signature, used, attrs),
        target=target,
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
    usage = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])
    vector_loads = len(re.findall(r"(?:ld\.global\S*\.v[24]|cp\.async)", compiled.asm.get("ptx", "")))
    return {
        "case": str(case),
        "tiles": list(tiles),
        **usage,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[case.gpu],
        "wgmma": compiled.asm.get("ptx", "").count("wgmma.mma_async"),
        "vector_loads": vector_loads,
    }


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    # Spills live on the stack, and nothing else of ours does.
    return {
        "registers": int(re.findall(r"REG:(\d+)", text)[0]),
        "spills": int(re.findall(r"STACK:(\d+)", text)[0]),
    }


def _amd_usage(assembly: str) -> dict[str, int]:
    return {
        "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0]),
        "spills": int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)[0]),
    }


def all_cases() -> list[Case]:
    """Every row of the tile table, with and without tails, head sizes of both columns, all variants."""
    cases = []
    for kernel, gpu, length, head_dim in itertools.product(KERNELS, SHARED_LIMIT, (197, 255), HEAD_DIMS):
        for dtype, precision in (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
            if precision == "tf32" and gpu == "gfx942":
                continue
            for has_selector, has_source_q in ((False, False), (True, kernel == "fwd")):
                cases.append(
                    Case(kernel, gpu, dtype, length, head_dim, has_selector, has_source_q, precision)
                )
    return cases


def is_within_budget(report: dict[str, Any]) -> bool:
    return report["spills"] == 0 and report["shared"] <= report["shared_limit"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression on the names of the cases")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args()
    for case in all_cases():
        if re.search(options.only, str(case)):
            report = compile_case(case)
            figures = (f"{name} {report[name]}" for name in ("registers", "spills", "shared", "wgmma"))
            line = " ".join(("ok  " if is_within_budget(report) else "OVER", report["case"], *figures))
            sys.stdout.write((json.dumps(report) if options.json else line) + "\n")
            sys.stdout.flush()
