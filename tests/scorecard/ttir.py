"""Triton's own code of every kernel, as a launch on a GPU would compile it, without one.

`python -m tests.scorecard.ttir GPU ARITHMETIC [--every]` prints it as JSON by the name of each program: of
each row of the tile table with `--every`, else one of each kernel. Run it without `TRITON_INTERPRET`.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any
from unittest import mock

from triton._C.libtriton import ir
from triton.compiler import make_backend
from triton.runtime import driver

from bench import programs
from bench.ahead import _Absent
from bench.programs import DTYPES, Program
from stochca_kernels import tiles


def asked(gpu: str, arithmetic: str, every: bool) -> Iterable[Program]:
    """What a training step launches, on as many multiprocessors as an H100 has, which then share tokens."""
    with mock.patch.object(tiles, "_multiprocessors", return_value=132):
        if every:
            return programs.one_per_row(programs.all_programs([gpu], [arithmetic]))
        dtype = DTYPES[arithmetic]
        # On chip and streamed; one program for the backward and two.
        calls = [*programs.calls(dtype, 100, 64), *programs.calls(dtype, 785, 64)]
        calls += programs.token_calls(dtype, 785, 768)
        found = [p for name, call in calls for p in programs.requested(gpu, arithmetic, name, call)]
    return {p.kernel: p for p in found}.values()


def code_of(program: Program) -> str:
    """Triton's code of one program."""
    kernel: Any = next(
        vars(module)[f"_{program.kernel}_kernel"]
        for module in programs.MODULES
        if f"_{program.kernel}_kernel" in vars(module)
    )
    found = []

    def only_parse(source: Any, target: Any, options: dict[str, Any]) -> str:
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        module = source.make_ir(target, parsed, functions, modules, context)
        found.append(backend.make_ttir(module, {}, parsed, target.arch).str())
        return "parsed"

    kernel.device_caches.clear()
    with (
        mock.patch.object(driver, "_active", _Absent(program.gpu)),
        mock.patch("triton.compiler.compile", only_parse),
    ):
        kernel.warmup(*program.arguments, grid=(1,), **program.constants)
    kernel.device_caches.clear()
    return found[0]


if __name__ == "__main__":
    gpu, arithmetic, *rest = sys.argv[1:]
    json.dump({p.name: code_of(p) for p in asked(gpu, arithmetic, rest == ["--every"])}, sys.stdout)
