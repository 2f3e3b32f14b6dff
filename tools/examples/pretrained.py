"""A learner of your own in one file: joint training, the baseline of Finn et al. (2017, section 5.1).

One network is trained on all tasks at once and never adapts while it learns. At evaluation it is
fine-tuned on the few examples of a new task. What meta-learning gains over this is what it is worth.

README.md beside this file walks through it. In short, a learner is a subclass of ``metadist.Algorithm``:

- its constructor takes the hyper-parameters, which a config gives as ``args``;
- ``adapt`` turns what is learned, a dict of named tensors, into what fits one task. It alone is enough;
- ``meta_gradient`` says in which direction to improve, where that is not the slope of the query loss.

Before either is called the learner has ``self.model``, ``self.objective`` (the task's loss and metric) and
``self.engine`` (which runs it over many tasks).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import metadist as md

Tensors = dict[str, Tensor]


class Pretrained(md.Algorithm):
    """Trains on the tasks as they come, and takes gradient steps only once it is in use.

    ``meta_gradient`` is not defined here: by default it is the derivative of the query loss after ``adapt``.
    As ``adapt`` does nothing while learning, that is the plain gradient of the query examples of all tasks.

    Args:
        inner_lr: step size of the fine-tuning.
        inner_steps: its steps.
        loss: ``auto`` or as of ``metadist.MAML``; likewise ``metric``.
    """

    def __init__(self, inner_lr: float = 0.01, inner_steps: int = 1, loss: str = "auto", metric: str = "auto") -> None:
        # A ValueError here is shown to the user as one line that names the config's algorithm.args.
        if not inner_lr > 0 or inner_steps < 1:
            raise ValueError(f"inner_lr must be positive and inner_steps at least 1, not {inner_lr} and {inner_steps}")
        self.inner_lr, self.inner_steps = inner_lr, inner_steps
        self.loss, self.metric = loss, metric

    def adapt(self, meta_params: Tensors, support: md.Examples, *, evaluation: bool = False) -> Tensors:
        """The network's parameters for one task.

        Args:
            meta_params: what is learned, by name; here the network's parameters.
            support: the task's examples, ``x [S, ...]`` and ``y [S, ...]``, without a dimension for tasks.
            evaluation: False while learning, True in use.

        Returns:
            New tensors of the same names; those passed in stay as they are.
        """
        if not evaluation:
            return meta_params

        def support_loss(params: Tensors) -> Tensor:
            return self.objective.loss(self.model(params, support.x, evaluation=True), support.y)

        params = meta_params
        for _ in range(self.inner_steps):
            # Not loss.backward(): md.gradients works however the engine runs the tasks.
            gradient = md.gradients(support_loss, params)
            params = {k: v - self.inner_lr * gradient[k] for k, v in params.items()}
        return params


class PretrainedOnAll(Pretrained):
    """The same, trained on support and query examples alike: nothing is held back from joint training.

    No derivative of the query loss gives that, so this one says itself in which direction to improve.
    """

    exact = False
    """Its meta-gradient does not claim to be the derivative of the query loss after adaptation."""

    def meta_gradient(self, meta_params: Tensors, batch: md.EpisodeBatch) -> md.TaskResults:
        """The gradient of the loss on all examples.

        Args:
            meta_params: what is learned.
            batch: T tasks, ``x [T, S, ...]`` and ``[T, Q, ...]``.

        Returns:
            The *sum* of the gradient over the T tasks (not their mean: the server divides by the whole
            meta-batch), and metrics of each task, ``[T]``.
        """
        (support_x, support_y), (query_x, query_y) = batch.support, batch.query
        everything = md.Examples(torch.cat([support_x, query_x], 1), torch.cat([support_y, query_y], 1))
        gradient = super().meta_gradient(meta_params, md.EpisodeBatch(batch.support, everything)).gradient
        return md.TaskResults(gradient, self.training_metrics(meta_params, batch))

    def training_metrics(self, meta_params: Tensors, batch: md.EpisodeBatch) -> Tensors:
        """Loss and metric on the query set, ``[T]`` each; before and after adaptation are one here."""
        before = self.before_adaptation(meta_params, batch)
        return {**{k.removeprefix("pre_adaptation_"): v for k, v in before.items()}, **before}


# ------------------------------------------------------------------ how to check it


def query_loss(learner: md.Algorithm, meta_params: Tensors, episode: md.Episode) -> Tensor:
    """What a learner with ``adapt`` alone goes down: the loss on the query set after adaptation."""
    adapted = learner.adapt(meta_params, episode.support)
    output = learner.predict(adapted, episode.support, episode.query.x)
    return learner.objective.loss(output, episode.query.y)


def loss_on_all(learner: md.Algorithm, meta_params: Tensors, episode: md.Episode) -> Tensor:
    """What :class:`PretrainedOnAll` goes down."""
    x, y = (torch.cat(pair) for pair in zip(episode.support, episode.query, strict=True))
    return learner.objective.loss(learner.predict(meta_params, episode.support, x), y)


def gradient_error(
    learner: md.Algorithm,
    meta_params: Tensors,
    batch: md.EpisodeBatch,
    objective: Callable[[md.Algorithm, Tensors, md.Episode], Tensor] = query_loss,
    eps: float = 1e-6,
) -> float:
    """How far ``meta_gradient`` is from the slope of ``objective``, measured by central differences.

    Args:
        learner: bound to its model, in float64: a learner of a finished run is.
        meta_params: where to measure, float64.
        batch: a few tasks, float64.
        objective: of one episode; the sum over the batch is what the gradient should be the derivative of.
        eps: how far to go to either side.

    Returns:
        The relative difference along a random direction; 1e-6 and less if the gradient is right.
    """
    generator = torch.Generator().manual_seed(0)
    along = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in meta_params.items()}

    def total(t: float) -> float:
        moved = {k: v + t * along[k] for k, v in meta_params.items()}
        return sum(float(objective(learner, moved, episode)) for episode in batch)

    difference = (total(eps) - total(-eps)) / (2 * eps)
    gradient = learner.meta_gradient(meta_params, batch).gradient
    slope = sum(float((gradient[k] * along[k]).sum()) for k in along)
    return abs(difference - slope) / max(abs(slope), 1e-12)


def main() -> None:
    """Trains both for a moment and checks their gradients where they ended up."""
    tasks = md.SinusoidTasks(shots=10)
    batch = tasks.episodes(seed=1, stream="check", numbers=range(3)).to("cpu", torch.float64)
    for learner, objective in ((Pretrained(), query_loss), (PretrainedOnAll(), loss_on_all)):
        run = md.train(
            model=lambda: torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1)),
            tasks=tasks,
            algorithm=learner,
            outer=md.Outer(steps=20, meta_batch_size=8),
            evaluation={"episodes": 100},
            tracking={"console": False, "wandb": {"mode": "disabled"}},
            precision="float64",
        )
        error = gradient_error(run.learner.algorithm, run.learner.meta_params, batch, objective)
        print(f"{type(learner).__name__}: the gradient is off by {error:.1e}; the run is in {run.run_dir}")


if __name__ == "__main__":
    main()
