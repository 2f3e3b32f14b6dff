"""What the simulation says of a config: what its updates cost beside computing, what binds, what would be better."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from metadist.config.schema import Config, WorkersRange
from metadist.progress import counted
from metadist.simulator.cluster import BYTES_A_NUMBER, Arrangement, Cluster, Compute, Work
from metadist.simulator.presets import GPU_10G, this_machine
from metadist.simulator.run import Split, simulate, split
from metadist.simulator.sizes import numbers_of

CLEAR_GAIN = 0.9
"""Part of the present time that another arrangement may take at most to be recommended."""
NEAR_ENOUGH = 1.05
SMALL_COST = 0.05
MOST_WORKERS = 512
_SMALL_MODEL = 10e6
_SHARDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Choice:
    """An arrangement, and what its updates take.

    Args:
        arrangement: what is chosen.
        step_s: seconds of an update.
    """

    arrangement: Arrangement
    step_s: float


def arrangements(work: Work, cluster: Cluster, unordered: bool = False) -> Iterator[Arrangement]:
    """What one can choose among with the same weights at the end, the simplest first.

    Args:
        work, cluster: for which.
        unordered: plain all-reduce as well, which is not reproducible.
    """
    nodes = cluster.nodes(work.workers)
    yield Arrangement()
    if work.model_bytes >= _SMALL_MODEL:
        for shards in _SHARDS:
            for sums in (False, True):
                several = nodes > 1 and work.workers > nodes
                if (shards > 1 or sums) and shards <= max(4, nodes) and (several or not sums):
                    yield Arrangement(server_shards=shards, node_sums=sums)
    if work.workers > 1:
        yield Arrangement(topology="allreduce")
        if unordered:
            yield Arrangement(topology="allreduce_unordered")


def choices(work: Work, cluster: Cluster, unordered: bool = False, steps: int = 1, warm_up: int = 0) -> list[Choice]:
    """All of :func:`arrangements`, simulated."""
    found = arrangements(work, cluster, unordered)
    return [Choice(a, simulate(work, a, cluster, steps, warm_up).step_s) for a in found]


def best_of(found: list[Choice]) -> Choice:
    """The simplest of those that are about as fast as the fastest."""
    least = min(choice.step_s for choice in found)
    return next(choice for choice in found if choice.step_s <= NEAR_ENOUGH * least)


def cheap_from(work: Work, arrangement: Arrangement, cluster: Cluster) -> tuple[float, Split]:
    """Seconds of a microbatch from which all but computing takes less than 5 % of a step; and such a step's parts."""
    seconds, found = 0.01, None
    for _ in range(3):
        at = replace(work, compute=replace(work.compute, seconds=seconds))
        found = split(at, arrangement, cluster, 1, 0)
        stretch = found.seconds["compute"] / seconds
        seconds = max(1e-4, found.layer_s * (1 - SMALL_COST) / SMALL_COST / stretch)
    assert found is not None
    return seconds, found


def of_config(config: Config, microbatch_s: float | None = None, model_bytes: float | None = None) -> list[str]:
    """Lines of advice for a config whose ``runtime`` is Ray.

    Args:
        config: the resolved config.
        microbatch_s: seconds in which a worker computes a microbatch, if that is known.
        model_bytes: of the meta-parameters; None: as the config's model has.
    """
    runtime = config.runtime
    here = runtime.address is None
    workers = _workers(config)
    if workers is None:
        return ["no advice: runtime.workers is auto on a cluster; write how many for a simulation of their updates"]
    if workers > MOST_WORKERS:
        return [f"no advice for {workers} workers, which take too long here; tools/bench/simulate.py simulates them"]
    numbers = numbers_of(config) if model_bytes is None else model_bytes / BYTES_A_NUMBER
    if numbers is None:
        return ["no advice: the model's size is known only once it is built; give --model-mb"]
    cluster = this_machine() if here else GPU_10G
    count = -(-config.outer.meta_batch_size // int(config.outer.tasks_per_microbatch))
    compute = Compute(microbatch_s or 0.0, on_cores=here and runtime.gpus_per_worker in ("auto", 0))
    work = Work(workers, BYTES_A_NUMBER * numbers, compute, count)
    present = Arrangement(
        runtime.topology, runtime.server_shards, runtime.node_sums, 2 if runtime.wire == "bfloat16" else BYTES_A_NUMBER,
        runtime.quorum, runtime.max_staleness,
    )  # fmt: skip
    nodes = cluster.nodes(workers)
    assumed = f"{counted(nodes, 'node')} of eight GPUs at 10 Gbit/s, which is assumed"
    where = "this machine" if here else assumed
    lines = [
        f"simulated: {counted(workers, 'worker')} on {where}, a model of {_mb(work.model_bytes)}, "
        f"{count} microbatches an update"
    ]
    if count < workers and not present.max_staleness:
        lines.append(
            f"{workers - count} workers have nothing to do: an update has {count} microbatches; lower "
            "outer.tasks_per_microbatch, or raise outer.meta_batch_size"
        )
    least, parts = cheap_from(work, present, cluster)
    if microbatch_s is None:
        work = replace(work, compute=replace(compute, seconds=least))
    else:
        parts = split(work, present, cluster, 1, 0)
        whole, layer = parts.outcome.step_s, parts.layer_s
        lines.append(f"an update takes {_ms(whole)}, of which {_ms(layer)} ({layer / whole:.0%}) are not computing")
    lines += _about(parts, least)
    return lines + _recommended(work, present, cluster)


def _about(parts: Split, least: float) -> list[str]:
    costs = [(s, name) for name, s in parts.seconds.items() if name not in ("compute", "stragglers")]
    costs.sort(reverse=True)
    told = ", ".join(f"{name} {_ms(s)}" for s, name in costs if s >= 0.05 * parts.layer_s and s > 0)
    if not told:
        return ["beside computing an update takes next to nothing"]
    return [
        f"beside computing an update takes {_ms(parts.layer_s)}: {told}",
        f"that is less than {SMALL_COST:.0%} of it where a microbatch takes {_ms(least)} or more",
    ]


def _recommended(work: Work, present: Arrangement, cluster: Cluster) -> list[str]:
    if present.max_staleness or present.quorum < 1:
        return []  # what such a run learns depends on who was how fast, which is not to be compared by time alone
    now = simulate(work, present, cluster, 1, 0).step_s
    best = best_of(choices(work, cluster))
    if best.step_s > CLEAR_GAIN * now:
        return [f"no other number of shards and no other topology is clearly faster than {words_of(present)}"]
    return [f"updates are {now / best.step_s:.1f} times as fast with {words_of(best.arrangement)}"]


def words_of(arrangement: Arrangement) -> str:
    """An arrangement as one writes it in a config's ``runtime`` section."""
    if arrangement.topology != "server":
        return f"topology: {arrangement.topology}"
    return f"server_shards: {arrangement.server_shards}" + ", node_sums: true" * arrangement.node_sums


def _workers(config: Config) -> int | None:
    """How many the run would have; None where only the cluster knows."""
    wanted = config.runtime.workers
    if isinstance(wanted, WorkersRange):
        return wanted.max
    if wanted != "auto":
        return wanted
    if config.runtime.address is not None:
        return None
    return max(1, (os.cpu_count() or 1) // config.runtime.threads_per_worker)


def _ms(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.{1 if seconds < 0.01 else 0}f} ms"


def _mb(size: float) -> str:
    return f"{size / 1e6:.2g} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"
