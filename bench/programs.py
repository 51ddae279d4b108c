"""What every kernel needs on every GPU, read from programs compiled ahead of time, without a GPU.

`python -m bench.programs --output bench/results/programs.json` compiles each row of the tile table as its
launcher would, and records registers, spilled bytes, shared memory and the number of Hopper's own matrix
instructions. Run it without `TRITON_INTERPRET`.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.environment import environment
from stochca_kernels import backward, backward_joint, forward, ops, projected, tiles, tokens
from stochca_kernels.projection import unpack
from stochca_kernels.tiles import Tiles

# Shared memory that one program may have, in bytes.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
MODULES = (forward, backward, backward_joint, projected, tokens)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32, "tf32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
}
# Between them they reach every row of the table, each with a ragged tail.
LENGTHS = (50, 100, 197, 241, 257, 785)
HEAD_DIMS = (64, 72, 128)
CHANNELS = (768, 1280)


class Program(NamedTuple):
    """One kernel as a launcher asked for it."""

    kernel: str
    gpu: str
    arithmetic: str
    shape: str
    row: Tiles
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """Kernel, GPU, arithmetic, tiles, and the shape that asked."""
        row = f"{self.row.block_m}x{self.row.block_n}" if self.row.block_n else f"{self.row.block_m}xall"
        streams = "-streamed" if self.constants.get("STREAMS") else ""
        return f"{self.kernel}-{self.gpu}-{self.arithmetic}-{row}-{self.shape}{streams}"


def requested(gpu: str, arithmetic: str, shape: str, call: Callable[[], None]) -> list[Program]:
    """The programs that `call` launches, one for each row of the table that its launchers may choose."""
    found: list[Program] = []
    current: list[Tiles] = [Tiles(0, 0, 4, 1, "none")]

    class Recorder:
        def __init__(self, name: str):
            self.name = name.removeprefix("_").removesuffix("_kernel")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*arguments: Any, **constants: Any) -> None:
                found.append(Program(self.name, gpu, arithmetic, shape, current[0], arguments, constants))

            return run

    def launch_every(kernel: Any, q: Tensor, rows: Sequence[Tiles], launch: Any) -> None:
        for row in rows:
            current[0] = row
            launch(row)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(tiles, "gpu_of", return_value=gpu))
        precision = "tf32" if arithmetic == "tf32" else "ieee"
        for module in (tiles, *MODULES):
            stack.enter_context(mock.patch.object(module, "dot_precision", return_value=precision))
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "launch_largest", launch_every))
            for name in kernels_of(module):
                stack.enter_context(mock.patch.object(module, name, Recorder(name)))
        call()
    return found


def kernels_of(module: Any) -> list[str]:
    """Names of the kernels that a module launches."""
    return [name for name in vars(module) if name.endswith("_kernel")]


def calls(dtype: torch.dtype, length: int, head_dim: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a training step asks of the operator, on tensors without memory."""
    batch, heads, channels = 4, 12, 12 * head_dim

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = unpack(empty(batch, length, 3, heads, head_dim))
    lse, coins = empty(batch, heads, length, dtype=torch.float32), empty(batch, dtype=torch.bool)
    rstd = empty(batch, length, dtype=torch.float32)
    source = (empty(batch, length, channels), empty(2 * channels, channels), empty(2 * channels), rstd)
    asking = (None, empty(channels, channels), empty(channels))

    def attention(source: tuple[Tensor | None, Tensor | None], coin: Tensor | None, needs_dkdv: bool) -> None:
        forward.attention_forward(q, k, v, source[0], source[1], coin, q, 0.125, True)
        pair = (None, None) if coin is None else source
        backward.attention_backward(q, q, k, v, pair[0], pair[1], coin, q, lse, 0.125, needs_dkdv)

    yield "self", lambda: attention((k, v), None, True)
    yield "cross", lambda: attention((None, None), None, False)
    yield "mixed", lambda: attention((k, v), coins, True)

    def projected_mixed() -> None:
        ops.projected_attention_forward(q, k, v, *source, coins, *asking, 0.125, True)
        ops.projected_attention_backward(q, q, k, v, *source, coins, q, lse, 0.125, True)

    yield "projected", projected_mixed

    def split() -> None:
        with mock.patch.object(backward, "has_joint_backward", return_value=False):
            attention((k, v), coins, True)

    yield "split", split


def token_calls(dtype: torch.dtype, length: int, channels: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What the blocks of class rows ask, self- and cross-attention mixed."""
    batch, rows = 4, channels // 64

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, queries = empty(batch, length, channels), empty(batch, rows, channels)
    rstd, lse = empty(batch, length, dtype=torch.float32), empty(batch, rows, dtype=torch.float32)
    coins = empty(batch, dtype=torch.bool)

    def mixed() -> None:
        tokens.tokens_forward(queries, x, None, x, rstd, coins, 0.125)
        tokens.tokens_backward(queries, queries, x, None, x, rstd, coins, queries, lse, 0.125, True)

    yield "tokens", mixed


def all_programs(gpus: Iterable[str] = SHARED_LIMIT, arithmetics: Iterable[str] = DTYPES) -> list[Program]:
    """Every kernel on every GPU, at every row of the table, for all shapes that reach it."""
    programs = []
    for gpu in gpus:
        for arithmetic in arithmetics:
            if gpu == "gfx942" and arithmetic == "tf32":
                continue
            dtype = DTYPES[arithmetic]
            for length in LENGTHS:
                for size in HEAD_DIMS:
                    for name, call in calls(dtype, length, size):
                        programs += requested(gpu, arithmetic, f"{name}-N{length}-D{size}", call)
                if arithmetic in ("ieee", "tf32") and gpu != "gfx942":
                    continue  # there few rows of float32 queries take the kernels of full rows
                for size in CHANNELS:
                    for name, call in token_calls(dtype, length, size):
                        programs += requested(gpu, arithmetic, f"{name}-N{length}-C{size}", call)
    return programs


def one_per_row(programs: Iterable[Program]) -> list[Program]:
    """Of all programs the last, and so the most demanding, for each row of the table."""
    rows = {(p.kernel, p.gpu, p.arithmetic, p.constants.get("HEAD_DIM"), p.row): p for p in programs}
    return list(rows.values())


def compile_program(program: Program) -> dict[str, Any]:
    """Compile one program as Triton does for its arguments.

    Returns:
        Its figures: registers of a thread, spilled bytes of a thread, shared memory of a program, `wgmma`
        instructions, and whether it is within the limits of its GPU.
    """
    kernel = next(
        getattr(m, f"_{program.kernel}_kernel") for m in MODULES if hasattr(m, f"_{program.kernel}_kernel")
    )
    options = {name: program.constants[name] for name in ("num_warps", "num_stages")}
    values = {**dict(zip(kernel.arg_names, program.arguments, strict=False)), **program.constants}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    amd = program.gpu.startswith("gfx")
    target = GPUTarget("hip", program.gpu, 64) if amd else GPUTarget("cuda", int(program.gpu[3:]), 32)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=options
    )
    usage = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])
    text = compiled.asm.get("ptx", "")
    return {
        "name": program.name,
        "warps": program.row.num_warps,
        "stages": program.row.num_stages,
        "origin": program.row.origin,
        **usage,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[program.gpu],
        "wgmma": text.count("wgmma.mma_async"),
        "vector_loads": len(re.findall(r"(?:ld\.global\S*\.v[24]|cp\.async)", text)),
    }


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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


def main() -> None:
    """Compile, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression on the names of the programs")
    parser.add_argument("--all", action="store_true", help="all shapes, not one for each row of the table")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    machine = environment(("stochca_kernels", "bench/programs.py"))
    programs = all_programs()
    programs = programs if options.all else one_per_row(programs)
    reports = []
    for program in programs:
        if re.search(options.only, program.name):
            report = compile_program(program)
            over = report["spills"] > 0 or report["shared"] > report["shared_limit"]
            figures = (f"{key} {report[key]}" for key in ("registers", "spills", "shared", "wgmma"))
            print("OVER" if over else "ok  ", report["name"], *figures, flush=True)
            reports.append(report)
    if options.output:
        lines = ",\n".join(json.dumps(report) for report in reports)
        head = json.dumps(machine, indent=1).removesuffix("\n}")
        options.output.write_text(f'{head},\n "programs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
