"""The tables of the scaling model: each workload on 1 to 1024 GPUs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.scaling.cluster import Cluster
from bench.scaling.stages import one_gpu
from bench.scaling.timeline import STRATEGIES, Messages, states_bytes
from bench.scaling.waiting import equal_coins, independent_coins, simulate
from bench.sizes import title
from bench.step.workloads import Workload

GPUS = tuple(2**k for k in range(11))
# Draws of coins that a simulation plays, over all ranks; it plays no fewer steps than `MIN_TRIALS`.
SIMULATED_DRAWS, MIN_TRIALS = 2**15, 64


def cases(
    workloads: Iterable[Workload],
    probabilities: Sequence[float],
    measured: Mapping[str, Any] | None = None,
    gpus: Sequence[int] = GPUS,
    cluster: Cluster | None = None,
) -> list[dict[str, Any]]:
    """Expected steps of each workload, p and strategy, with equal and with independent coins.

    Args:
        workloads: Models, and images for each GPU.
        probabilities: That a block reads the source.
        measured: The result of `bench.step` to take the time of one GPU from, where it has it.
        gpus: How many, powers of two.
        cluster: What joins them; None for the default.
    """
    cluster = cluster or Cluster()
    found = []
    for workload in workloads:
        for p in probabilities:
            one = one_gpu(workload, p, measured)
            for name, strategy in STRATEGIES.items():
                rows = []
                for count in gpus:
                    messages = Messages.of(one.stage_parameters(), count, cluster)
                    trials = max(MIN_TRIALS, SIMULATED_DRAWS // count)
                    simulated, error = simulate(one, strategy, messages, count, trials)
                    equal = equal_coins(one, strategy, messages)
                    independent = independent_coins(one, strategy, messages, count)
                    rows.append(
                        {
                            "gpus": count,
                            "equal_ms": 1e3 * equal,
                            "independent_ms": 1e3 * independent,
                            "simulated_ms": 1e3 * simulated,
                            "simulated_error_ms": 1e3 * error,
                            "equal_efficiency": one.mean / equal,
                            "independent_efficiency": one.mean / independent,
                            "images_per_s": count * workload.batch / equal,
                            "states_gib": states_bytes(name, one.size.parameters, count) / 2**30,
                        }
                    )
                found.append(
                    {
                        "workload": workload.name,
                        "title": title(workload),
                        "p": p,
                        "strategy": name,
                        "one_gpu_ms": 1e3 * one.mean,
                        "one_gpu": one.origin,
                        "rows": rows,
                    }
                )
    return found
