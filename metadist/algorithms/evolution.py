"""Meta-gradients from losses alone: perturb what is learned, see what becomes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from metadist.algorithms.base import TaskResults
from metadist.algorithms.losses import LossFunction
from metadist.algorithms.maml import MAML
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Tensors
from metadist.seeding import Rng


class ES(MAML):
    """Evolution strategies in place of derivatives of the inner loop (Salimans et al. 2017; Song et al. 2020).

    For each task, ``1/(2 P sigma) sum_p (L(theta + sigma eps_p) - L(theta - sigma eps_p)) eps_p`` over P pairs with
    ``eps_p ~ N(0, I)``: an unbiased estimate of the gradient of the smoothed loss ``E[L(theta + sigma eps)]``
    (Song et al. 2020, section 3.1; antithetic pairs as in Salimans et al. 2017, section 2). ``L`` is the query loss
    after adaptation. Its variance grows with the number of parameters over P and the tasks of a meta-batch.

    No derivative is taken of :meth:`adapt`, of the outputs or of the loss: a subclass may override ``adapt`` with
    anything at all. The default goes down the support loss by gradient steps, as :class:`MAML` does.
    The metrics are those of ``theta`` itself, at the cost of one evaluation beside 2 P.

    Args:
        sigma: standard deviation of the perturbations.
        pairs: P, perturbations of each task, each with both signs.
        others: as of :class:`MAML`.
    """

    exact = False

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        evaluation_inner_steps: int | None = None,
        sigma: float = 0.05,
        pairs: int = 8,
        loss: str | LossFunction = "auto",
        metric: str = "auto",
    ) -> None:
        super().__init__(inner_lr, inner_steps, evaluation_inner_steps, True, loss, metric)
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, not {sigma}")
        if pairs < 1:
            raise ValueError(f"pairs must be at least 1, not {pairs}")
        self.sigma, self.pairs = sigma, pairs
        self.exact = False  # type: ignore[misc]

    def initial_meta_params(self) -> Tensors:
        # Running statistics are those of the adapted model, of which an adapt of one's own need not show the steps.
        return {**self.model.initial_params(), **self.model.initial_statistics(1)}

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> TaskResults:
        noise = self.noise(batch, self.perturbed(meta_params))
        tasks = (batch.support, batch.query, noise)
        with torch.no_grad():
            gradient, (metrics, seen) = self.engine.sum_tasks(self._estimate, (meta_params,), tasks)
        return self.results(meta_params, batch, gradient, metrics, seen)

    def perturbed(self, meta_params: Tensors) -> Tensors:
        """What is learned by the perturbations: all that the outer optimizer moves."""
        ruled = self.update_rules()
        return {k: v for k, v in meta_params.items() if k not in ruled}

    def noise(self, batch: EpisodeBatch, like: Tensors) -> Tensor:
        """Standard normal numbers ``[T, P, D]``, a row for all of ``like`` in its order.

        Each task's are a function of the moment and of its place in the microbatch, not of the tasks beside it, and
        are drawn on the CPU: they are the same on every device.
        """
        first = next(iter(like.values()))
        count = sum(v.numel() for v in like.values())
        places = range(self.moment.place, self.moment.place + len(batch))
        generators = (Rng(self.moment.seed, "evolution", place).torch_generator() for place in places)
        drawn = [torch.randn(self.pairs, count, generator=g, dtype=first.dtype) for g in generators]
        return torch.stack(drawn).to(first.device)

    def _estimate(
        self, meta_params: Tensors, support: Examples, query: Examples, noise: Tensor
    ) -> tuple[Tensors, tuple[Tensors, Tensors]]:
        """One task's estimate from its noise ``[P, D]``; metrics and statistics without any."""
        learned = self.perturbed(meta_params)

        def judged(shift: Tensor, support: Examples, query: Examples) -> tuple[Tensor, Tensors, Tensors]:
            moved = {k: learned[k] + v for k, v in unflattened(shift, learned).items()}
            adapted = self.adapt({**meta_params, **moved}, support)
            with self.model.recording() as seen:
                loss, metrics = self.query_objective(adapted, support, query)
            return loss, metrics, seen

        shifts = self.sigma * torch.cat([noise, -noise, torch.zeros_like(noise[:1])])
        losses, metrics, seen = self.engine.map(judged, shifts, *repeated(len(shifts), support, query))
        plus, minus = losses[: self.pairs], losses[self.pairs : 2 * self.pairs]
        slope = (plus - minus) @ noise / (2 * self.pairs * self.sigma)
        at_rest, statistics = ({k: v[-1] for k, v in d.items()} for d in (metrics, seen))
        return unflattened(slope, learned), (at_rest, statistics)


def repeated(times: int, *examples: Examples) -> list[Examples]:
    """Each as ``times`` the same, without a copy.

    In a vmap within a vmap some losses of torch (mse_loss, huber_loss) want both their arguments mapped as deep.
    """
    return [Examples(*(t.expand(times, *t.shape) for t in e)) for e in examples]


def flattened(tensors: Tensors) -> Tensor:
    """The numbers of ``tensors`` in their order, ``[D]``."""
    return torch.cat([v.reshape(-1) for v in tensors.values()])


def unflattened(flat: Tensor, like: Tensors) -> Tensors:
    """The numbers ``[..., D]`` by name, with the shapes and dtypes of ``like`` behind the leading dimensions."""
    parts = torch.split(flat, [v.numel() for v in like.values()], dim=-1)
    lead = flat.shape[:-1]
    return {k: part.reshape(*lead, *v.shape).to(v.dtype) for (k, v), part in zip(like.items(), parts, strict=True)}
