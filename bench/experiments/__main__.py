"""`python -m bench.experiments`: time the experiments on a Hopper GPU; without one, only compile them.

Each is checked against the definition before it is timed, and takes turns with the streamed kernel.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

import torch
import triton
from torch import Tensor

from bench.experiments import descriptors, gluon_hopper, specialized, streamed
from bench.experiments.request import Request
from bench.kernels.floors import measure_ceilings
from bench.kernels.inputs import split
from bench.kernels.measure import Case, Settings, measure
from bench.kernels.paths import SELF, Run
from bench.kernels.providers import OURS, Provider
from bench.kernels.report import case_lines
from bench.kernels.shapes import DINOV2_B, VIT_B_448, Shape
from bench.tune.uses import MetaDraw
from stochca_kernels.tiles import Tiles

SHAPES = (VIT_B_448, DINOV2_B)
TILES = tuple(
    Tiles(*sizes, "experiment")
    for sizes in ((64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2))
)
ROUNDS = 100


class Experiment(NamedTuple):
    """One kernel: its name, how it is launched, and for which GPUs it compiles."""

    name: str
    request: Callable[[Tensor, Tensor, Tensor, Tiles], Request]
    gpus: tuple[str, ...] = ("sm_90",)

    def run_with(self, tiles: Tiles) -> Run:
        """From inputs to the output."""
        return lambda t: (self.request(t["q"], t["k"], t["v"], tiles).run(),)


EXPERIMENTS = (
    Experiment("streamed", streamed.request),
    Experiment("TMA", descriptors.request),
    Experiment("specialized", specialized.request, ("sm_90", "sm_100")),
    Experiment("Gluon", gluon_hopper.request),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; arguments are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="experiments whose name matches")
    parser.add_argument("--compile", action="store_true", help="time nothing, even on a GPU")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: what is interpreted is not compiled")
    chosen = [experiment for experiment in EXPERIMENTS if re.search(args.only, experiment.name)]
    if not chosen:
        parser.error(f"--only {args.only}: no experiment has such a name")
    for shape in SHAPES:
        for experiment in chosen:
            for tiles in TILES:
                for gpu in experiment.gpus:
                    print(
                        _label(experiment, tiles), shape.name, gpu, _compiled(experiment, shape, tiles, gpu)
                    )
    if torch.cuda.is_available() and not args.compile:
        triton.set_allocator(descriptors.allocate)
        with torch.cuda.stream(torch.cuda.Stream()):
            _time(chosen)


def _time(chosen: Sequence[Experiment]) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    settings = Settings(device, dtype, ROUNDS, measure_ceilings(dtype, ROUNDS, device))
    # The operator as it is, then every kernel with every tile: who fails is reported, and not timed.
    competitors = [Provider(OURS, SELF.ours_with("triton"))]
    for experiment in dict.fromkeys((EXPERIMENTS[0], *chosen)):
        competitors += [Provider(_label(experiment, t), experiment.run_with(t)) for t in TILES]
    for shape in SHAPES:
        with _captured():
            case = measure(Case(SELF, "forward", shape), competitors, settings)
        print("", *case_lines(case), sep="\n")
        timed = {n: e["p50_us"] for n, e in case.get("providers", {}).items() if "p50_us" in e}
        for name in sorted(timed, key=timed.__getitem__):
            print(f"    {name:<32} {timed[name]:.1f} us")


def _label(experiment: Experiment, tiles: Tiles) -> str:
    m, n, warps, stages = tiles[:4]
    return f"{experiment.name} {m}x{n}, {warps} warps, {stages} stages"


def _compiled(experiment: Experiment, shape: Shape, tiles: Tiles, gpu: str) -> str:
    """Its figures, or what the compiler says."""
    q, k, v = split(MetaDraw(shape, torch.bfloat16).packed())
    with _captured() as errors:
        try:
            figures = experiment.request(q, k, v, tiles).figures(gpu)
        except Exception as error:  # whatever a compiler raises is what was found
            errors.seek(0)
            failed = re.findall(r"Assertion .*|(?<=error: ).*", errors.read())
            return " ".join(["does not compile:", *failed[:1], f"({type(error).__name__}: {error})"])[:300]
    return ", ".join(f"{name} {value}" for name, value in figures.items())


@contextmanager
def _captured() -> Iterator[IO[str]]:
    """What the compiler writes to standard error: where it fails, thousands of lines."""
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


if __name__ == "__main__":
    main()
