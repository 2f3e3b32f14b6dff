"""The worker: computes leased microbatches. A plain class; a runtime decides where it lives."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from metadist.algorithms import Algorithm, TaskResults
from metadist.device import gpu_state, make_repeatable
from metadist.episode import EpisodeBatch
from metadist.experiment import DTYPES, Experiment
from metadist.inner.memory import LARGE, hand_back_what_is_freed, resident_growth
from metadist.outer.gradient import HOLD_OF_LEASE, Block, Layout, TreeSum
from metadist.outer.vectors import Room, all_finite
from metadist.outer.wire import ErrorFeedback
from metadist.rounds import Lease, Moment, Report, Round
from metadist.seeding import Rng


def training_round(experiment: Experiment, version: int, held: int = 1) -> Round:
    """The meta-batch from which a synchronous run makes ``version + 1``.

    Args:
        experiment: the run's.
        version: of the meta-parameters.
        held: see :class:`Round`.
    """
    outer, split = experiment.config.outer, experiment.train_split
    tasks = outer.meta_batch_size
    return Round("train", version, split, split, version * tasks, tasks, int(outer.tasks_per_microbatch), held=held)


class LeaseWorker(Protocol):
    """What computes leases in a worker's process: :class:`MetaWorker`, or what stands in for it."""

    def compute(
        self, lease: Lease, weights: Sequence[np.ndarray], room: Room | None = None
    ) -> tuple[Report, dict[Block, np.ndarray]]:
        """See :meth:`metadist.worker.MetaWorker.compute`."""


class MetaWorker:
    """Samples and adapts the tasks of its leases; sums their meta-gradients.

    Args:
        experiment: what is run, with ``engine.strategy`` decided.
        device: where the tasks are computed.

    Raises:
        MetadistError: a part of the experiment cannot be made.
    """

    def __init__(self, experiment: Experiment, device: str = "cpu") -> None:
        self.experiment, self.device = experiment, torch.device(device)
        torch.set_num_threads(experiment.config.runtime.threads_per_worker)
        make_repeatable(self.device, experiment.config.engine.precision == "tf32")
        self.dtype = DTYPES[experiment.config.engine.precision]
        self.learner: Algorithm = experiment.learner(self.device)
        self.layout = Layout.of(self.learner.initial_meta_params())
        self.learner.model.let_go_of_initial_params()
        if self.layout.nbytes >= LARGE:
            hand_back_what_is_freed()
        self._aside = torch.cuda.Stream(self.device) if self._is_gpu else None
        self._prefetch = Prefetcher(self._episodes)
        # No learner of ours writes to what it is given, which may be memory that every process of the node reads.
        self._reads_in_place = not (self._is_gpu or experiment.has_learner_of_its_own)
        self._flat: torch.Tensor | None = None
        self._held: tuple[int, dict[str, torch.Tensor]] | None = None
        self._views: dict[str, torch.Tensor] | None = None
        self._memory = resident_growth()
        runtime = experiment.config.runtime
        self._feedback = ErrorFeedback() if runtime.type == "ray" and runtime.wire == "bfloat16" else None

    def compute(
        self, lease: Lease, weights: Sequence[np.ndarray], room: Room | None = None
    ) -> tuple[Report, dict[Block, np.ndarray]]:
        """Computes a lease.

        Args:
            lease: which microbatches.
            weights: the flat meta-parameters of ``lease.round.version`` in consecutive parts; read only.
            room: gives memory for a vector from which it will be read; asked for where one partial sum is all.

        Returns:
            The report, and partial sums of the microbatches' gradients (none for an evaluation), in half their bytes
            with ``runtime.wire: bfloat16``.
        """
        params = self._params(lease.round.version, weights)
        room = None if self._feedback else room
        own_room = room if lease.stop - lease.start == 1 else None
        metrics: list[dict[str, torch.Tensor]] = []
        sums = TreeSum(lease.round.microbatches, hold=HOLD_OF_LEASE)
        bad: list[int] = []
        waited, started = 0.0, time.perf_counter()
        for m in range(lease.start, lease.stop):
            batch, wait = self._prefetch.get(lease.round, m)
            waited += wait
            if m + 1 < lease.stop:
                self._prefetch.request(lease.round, m + 1)
            elif lease.round.kind == "train":
                self._prefetch.request(_following(lease.round), lease.start)
            result = self._microbatch(lease.round, m, params, batch)
            gradient = self._flattened(result.gradient, own_room) if lease.round.kind == "train" else None
            bad += self._not_finite(lease.round, m, params, batch, result, gradient)
            metrics.append(result.metrics)
            if gradient is not None:
                sums.add(Block(0, m), gradient.numpy())
            del result
        elapsed = time.perf_counter() - started
        told = {k: torch.cat([some[k].reshape(-1) for some in metrics]).double().cpu().numpy() for k in metrics[0]}
        programs, gpu = self.learner.engine.programs, gpu_state(self.device)
        report = Report(lease, told, elapsed - waited, waited, bad, self._memory(), programs, gpu)
        blocks = sums.held(room or np.empty) if lease.round.kind == "train" else {}
        return report, blocks if self._feedback is None else self._feedback.rounded(blocks)

    def close(self) -> None:
        """Stops the prefetching thread and closes the data."""
        self._prefetch.close()
        self.experiment.close()

    def _params(self, version: int, weights: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        if self._reads_in_place and len(weights) == 1:
            return self.layout.unflatten(_never_written(weights[0]))
        if self._held is None or self._held[0] != version:
            self._held = None
            if self._flat is None:
                self._flat = torch.empty(self.layout.numel, dtype=self.layout.dtype, pin_memory=self._is_gpu)
            np.concatenate(weights, out=self._flat.numpy())
            self._held = version, self._named(self._flat)
        return self._held[1]

    def _named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The meta-parameters that the flat vector holds, on the device."""
        if self._views is not None:
            return {k: v.detach() for k, v in self._views.items()}
        if self._is_gpu:
            return self.layout.unflatten(flat.to(self.device, non_blocking=True))
        named = self.layout.unflatten(flat)
        if set(self.layout.dtypes) == {self.layout.dtype}:
            self._views = named  # they follow the vector
        return named

    @property
    def _is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _episodes(self, round: Round, microbatch: int) -> EpisodeBatch:
        """A microbatch's episodes on the device; made in a thread while the one before is computed."""
        source = self.experiment.source(round.split, round.size)
        batch = source.episodes(self.experiment.config.seed, round.stream, round.episodes(microbatch))
        if self._aside is None:
            return batch.to(self.device, self.dtype)
        # On a stream of its own, beside the kernels of the microbatch that is computed.
        with torch.cuda.stream(self._aside):
            moved = batch.pinned().to(self.device, self.dtype)
            self._aside.synchronize()
        return moved.used_by(torch.cuda.default_stream(self.device))

    def _microbatch(
        self, round: Round, microbatch: int, params: dict[str, torch.Tensor], batch: EpisodeBatch, place: int = 0
    ) -> TaskResults:
        """The results of a microbatch, or of the part of it that begins with its ``place``-th task."""
        # What torch draws by itself (dropout) is a function of the microbatch as well, and of the version also where
        # episodes are held for several: the number is that of an episode drawn anew.
        number = round.first + microbatch * round.tasks_per_microbatch
        seed = Rng(self.experiment.config.seed, f"torch/{round.stream}", number).torch_seed()
        torch.manual_seed(seed)
        self.learner.moment = Moment(round.version, microbatch, round.microbatches, seed, place)
        if round.kind == "train":
            return self.learner.meta_gradient(params, batch)
        with torch.no_grad():
            return TaskResults({}, self.learner.evaluate_in_full(params, batch))

    def _flattened(self, gradient: dict[str, torch.Tensor], room: Room | None) -> torch.Tensor:
        """A gradient as one vector in this process's memory."""
        if room is None:
            return self.layout.flatten(gradient).cpu()
        flat = torch.from_numpy(room(self.layout.numel, self.layout.numpy_dtype))
        if self._is_gpu:
            return flat.copy_(self.layout.flatten(gradient))
        return self.layout.flatten(gradient, flat)

    def _not_finite(
        self, round: Round, m: int, params: dict[str, torch.Tensor], batch: EpisodeBatch, result: TaskResults,
        gradient: torch.Tensor | None,
    ) -> list[int]:  # fmt: skip
        """Numbers of the episodes to blame for a loss or gradient that is not finite."""
        numbers = round.episodes(m)
        losses = torch.isfinite(result.metrics["loss"].reshape(-1)).tolist()
        if not all(losses):
            return [n for n, ok in zip(numbers, losses, strict=True) if not ok]
        if gradient is None or all_finite(gradient):
            return []
        alone = [self._microbatch(round, m, params, EpisodeBatch.stack([e]), place) for place, e in enumerate(batch)]
        bad = [
            n
            for n, r in zip(numbers, alone, strict=True)
            if not all(map(all_finite, r.gradient.values()))
        ]
        return bad or list(numbers)


def _following(round: Round) -> Round:
    """The round that comes next, if nothing unusual happens."""
    return replace(round, version=round.version + 1, first=round.first + round.tasks)


def _never_written(array: np.ndarray) -> torch.Tensor:
    """A tensor in an array's memory, also in memory of which torch would say that it cannot be written to."""
    there: Any = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    there._of = array  # which has to live as long
    return torch.from_numpy(np.frombuffer(there, array.dtype))


class Prefetcher:
    """Makes the episodes of the next microbatch in a thread while the present one is computed.

    A wrong guess costs nothing but the guess: what is asked for and not at hand is made at once.
    """

    def __init__(self, make: Callable[[Round, int], EpisodeBatch]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="episodes")
        self._pending: dict[tuple[str, str, range], Future[EpisodeBatch]] = {}

    def request(self, round: Round, microbatch: int) -> None:
        """Starts making a microbatch's episodes; errors come out at :meth:`get`."""
        self._pending = {self._key(round, microbatch): self._pool.submit(self._locked, round, microbatch)}

    def get(self, round: Round, microbatch: int) -> tuple[EpisodeBatch, float]:
        """A microbatch's episodes, and the seconds that were waited for them."""
        start = time.perf_counter()
        future = self._pending.pop(self._key(round, microbatch), None)
        batch = future.result() if future is not None else self._locked(round, microbatch)
        return batch, time.perf_counter() - start

    def close(self) -> None:
        """Stops the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _locked(self, round: Round, microbatch: int) -> EpisodeBatch:
        # A task source need not be safe for two threads.
        with self._lock:
            return self._make(round, microbatch)

    @staticmethod
    def _key(round: Round, microbatch: int) -> tuple[str, str, range]:
        return round.split, round.stream, round.episodes(microbatch)
