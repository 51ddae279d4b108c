"""Two processes that train together, and what becomes of one when the other is killed."""

import functools
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.digest import ROOT
from tests.scorecard.children import Child, Fault, arguments_of, forked, workspace
from tests.scorecard.faults import before, full_disk
from tests.scorecard.row import Case, Figures
from tests.scorecard.same_run import check_same_run

STEPS, LOOKED_AT = 50, (1, 10, 25, 50)

MODELS: dict[str, dict[str, Any]] = {
    "fused qkv": {},
    "norms of queries and keys": {"qk_norm": True},
    "split q, k and v": {"name": "eva02_base_patch14_224"},
}

# 18 images, two in each of two processes: 4 steps to an epoch, each of which is saved.
RUN = {"steps": 6, "batch_size": 2, "grad_accum_steps": 1}
STOPS_AT, DIES_AT = 2, 4
# How long the other may take to notice.
BOUND = 30.0


def cases(long: bool) -> Iterable[Case]:
    for name, kwargs in MODELS.items():
        if long or name == "norms of queries and keys":
            yield Case(
                f"{name}: two processes as one", functools.partial(as_one, kwargs, STEPS if long else 3)
            )
    for dying in (0, 1) if long else (1,):
        yield Case(f"process {dying} of two is stopped, then killed", functools.partial(one_ends, dying))
    if long:
        yield Case("the first of two cannot write", first_cannot_write)
        yield Case("torchrun restarts two of which one was killed", torchrun_restarts)


def as_one(kwargs: dict[str, Any], steps: int) -> Figures:
    """Compare the weights of both processes, and those of one process with the joined batch."""
    import torch

    port = free_port()
    ranks = [forked(train_rank, rank, port, kwargs, steps) for rank in range(2)]
    alone = {step: weights for step, weights, _ in train(kwargs, steps)}
    for _, receiver in ranks:
        assert receiver.poll(120), "a process sends nothing"
    both = [receiver.recv() for _, receiver in ranks]
    for process, _ in ranks:
        process.join(60)
        assert process.exitcode == 0, f"a process ended with {process.exitcode}"
    furthest = 0.0
    for step, (weights, sha) in both[0].items():
        assert sha == both[1][step][1], f"other weights on each process after step {step}"
        for name, expected in alone[step].items():
            furthest = max(furthest, (torch.from_numpy(weights[name]) - expected).abs().max().item())
    assert furthest <= 1e-6, f"{furthest:.1e} from the weights of one process"
    return {"difference_of_weights": furthest}


def train(kwargs: dict[str, Any], steps: int, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Any, str]]:
    """Train as one of several processes; weights and their digest after some steps."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from tests.models import make_images, make_model

    model = make_model(**kwargs)
    model.coins.spread(rank, size)
    module: nn.Module = model if size == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.target.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, steps + 1):
        images = make_images(4, size=model.target.patch_embed.img_size[0], seed=step).chunk(size)[rank]
        labels = (torch.arange(4) + step).chunk(size)[rank] % 5
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in LOOKED_AT or step == steps:
            weights = {name: tensor.clone() for name, tensor in model.target.state_dict().items()}
            sha = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values()))
            yield step, weights, sha.hexdigest()


def train_rank(rank: int, port: int, kwargs: dict[str, Any], steps: int, sender: Any) -> None:
    import gc

    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sender.send(
        {
            step: ({name: tensor.numpy() for name, tensor in weights.items()}, sha)
            for step, weights, sha in train(kwargs, steps, rank, 2)
        }
    )
    dist.barrier()
    gc.collect()  # the module before the process group, or its threads may wait for each other
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(rank: int, port: int, fault: Fault | None, events: Any) -> None:
    """Make a child one of two processes, in which something may go wrong."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    if fault is not None:
        fault(events)


def signal_in_step(signum: int, step: int, _events: Any = None) -> None:
    from stochca.train import Trainer

    def act(trainer: Trainer, *_: Any) -> None:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signum)

    before(Trainer, "_train_step", act)


def pair(arguments: list[str], log: Path, faults: dict[int, Fault] | None = None) -> list[Child]:
    """Start a run in two processes, in which something may go wrong."""
    port = free_port()
    return [
        Child(
            arguments,
            log.with_suffix(f".{rank}.log"),
            functools.partial(as_rank, rank, port, (faults or {}).get(rank)),
        )
        for rank in range(2)
    ]


@functools.cache
def undisturbed() -> Path:
    output = workspace() / "two-processes"
    for child in pair(arguments_of(output, **RUN), output):
        assert child.end() == 0, child.said()
    return output


def one_ends(ending: int) -> Figures:
    """A signal to one stops both; without one the other ends by itself; they go on to the same weights."""
    from stochca.checkpoint import STATE, load_state

    output = workspace() / f"process-{ending}-ends"
    stop = functools.partial(signal_in_step, signal.SIGTERM, STOPS_AT)
    die = functools.partial(signal_in_step, signal.SIGKILL, DIES_AT)
    for child in pair(arguments_of(output, **RUN), output, {ending: stop}):
        code = child.end()
        assert code == 128 + signal.SIGTERM, f"ended with {code}: {child.said()}"
    assert load_state(output / STATE)["step"] == STOPS_AT
    resume = ["finetune", "--resume", str(output)]
    children = pair(resume, output, {ending: die})
    assert children[ending].end() == -signal.SIGKILL, children[ending].said()
    seconds = seconds_until_it_fails(children[1 - ending])
    assert load_state(output / STATE)["step"] == DIES_AT - 1
    for child in pair(resume, output):
        assert child.end() == 0, child.said()
    check_same_run(output, undisturbed())
    return {"seconds_until_the_other_ended": seconds}


def first_cannot_write() -> Figures:
    """The disk is full for the process that writes: it says so, and the other does not wait for it."""
    output = workspace() / "two-on-a-full-disk"
    full = functools.partial(full_disk, DIES_AT, "trainer_state.pt")
    first, second = pair(arguments_of(output, **RUN), output, {0: full})
    assert first.end(BOUND) == 2, first.said()
    assert f"that of step {DIES_AT - 1} is whole" in first.said(), first.said()
    seconds = seconds_until_it_fails(second)
    for child in pair(["finetune", "--resume", str(output)], output):
        assert child.end() == 0, child.said()
    check_same_run(output, undisturbed())
    return {"seconds_until_the_other_ended": seconds}


def seconds_until_it_fails(child: Child) -> float:
    start = time.monotonic()
    code = child.end(BOUND)
    assert code > 0, f"the other ended with {code}: {child.said()}"
    return time.monotonic() - start


def torchrun_restarts() -> None:
    """`--max-restarts` goes on from the last state, with the same command."""
    output = workspace() / "restarted"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "--max-restarts", "1", "-m", "tests.scorecard.ranks", *arguments_of(output, **RUN),
    ]  # fmt: skip
    # The processes that are started again would read addresses of those before them from a store that
    # torchrun shares: github.com/pytorch/pytorch/issues/135712.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert output.with_suffix(".yaml.restarted").exists(), "nobody was started again"
    check_same_run(output, undisturbed())


def main() -> int:
    """One of the processes that `torchrun` starts: the second of them dies, but not again after a restart."""
    from stochca.cli import main as command

    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        Path(f"{sys.argv[-1]}.restarted").touch()
    elif os.environ["RANK"] == "1":
        signal_in_step(signal.SIGKILL, DIES_AT)
    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
