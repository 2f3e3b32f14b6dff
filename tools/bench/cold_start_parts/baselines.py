"""What a meta-learner is compared with: means, matrix factorisation (Surprise), and a network that is fine-tuned."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from metadist import Examples
from metadist.models import RatingModel
from tools.bench.cold_start_parts.users import User, errors

Answers = list[torch.Tensor]


def mean_of_all(train: Examples, users: Sequence[User]) -> Answers:
    """The mean of the training ratings, for every item."""
    return [torch.full_like(user.later.y, float(train.y.mean())) for user in users]


def mean_of_user(train: Examples, users: Sequence[User], shots: int, weight: float = 5.0) -> Answers:
    """The mean of what a user has given, drawn towards that of all by as many ratings as ``weight``."""
    overall = float(train.y.mean())
    told = [(float(user.first(shots).y.sum()) + weight * overall) / (shots + weight) for user in users]
    return [torch.full_like(user.later.y, value) for user, value in zip(users, told, strict=True)]


# --------------------------------------------------------------------------- matrix factorisation

FACTORS = [{"n_factors": f, "n_epochs": e, "reg_all": r} for f in (10, 50) for e in (20, 40) for r in (0.02, 0.1)]


def factorised(
    raw: list[tuple[str, int, float]],
    users: Sequence[User],
    shots: int,
    scale: tuple[float, float],
    method: str,
    **options: float,
) -> Answers:
    """Answers of Surprise's ``SVD`` or ``BaselineOnly``, of the training ratings and what is known of each user.

    Args:
        raw: (user, item, rating) of the training users.
        users: of whom the first ``shots`` ratings are known.
        scale: least and most rating.
        method: ``SVD`` (Koren et al. 2009) or ``BaselineOnly`` (means of items and users, shrunk).
        options: of the method.
    """
    import surprise

    known = [
        (f"new {user.name}", int(row[0]), float(y))
        for user in users
        for row, y in zip(user.first(shots).x, user.first(shots).y, strict=True)
    ]
    reader = surprise.Reader(line_format="user item rating", sep="\t", rating_scale=scale)
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        file.writelines(f"{user}\t{item}\t{rating}\n" for user, item, rating in raw + known)
        file.flush()
        data = surprise.Dataset.load_from_file(file.name, reader).build_full_trainset()
    seeded = {"random_state": 0} if method == "SVD" else {"verbose": False}
    model = getattr(surprise, method)(**options, **seeded).fit(data)
    return [
        torch.tensor([[model.predict(f"new {user.name}", str(int(row[0])), clip=False).est] for row in user.later.x])
        for user in users
    ]


def best_factors(
    raw: list[tuple[str, int, float]], users: Sequence[User], shots: int, scale: tuple[float, float]
) -> dict[str, float]:
    """The options that do best on validation users."""

    def off(options: dict[str, float]) -> float:
        return float(errors(list(users), factorised(raw, users, shots, scale, "SVD", **options), scale)[0].mean())

    return min(FACTORS, key=off)


# --------------------------------------------------------------------------- fine-tuning

RATES, STEPS = (0.003, 0.01, 0.03, 0.1), (1, 5, 20)
_BATCH, _EPOCHS = 512, 15


def pretrained(train: Examples, judge: Callable[[RatingModel], float], make: Callable[[], RatingModel]) -> RatingModel:
    """The meta-learner's network trained on all training users' ratings, for the epochs that ``judge`` likes best."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    best, kept = float("inf"), model
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(train.x)).split(_BATCH):
            optimizer.zero_grad()
            F.mse_loss(model(train.x[rows]), train.y[rows]).backward()
            optimizer.step()
        if (found := judge(model)) < best:
            best, kept = found, copy.deepcopy(model)
    return kept


def fine_tuned(model: RatingModel, users: Sequence[User], shots: int, rate: float, steps: int) -> Answers:
    """The network after some steps on what is known of each user, of the parameters that the meta-learner adapts."""
    answers = []
    for user in users:
        own, known = copy.deepcopy(model), user.first(shots)
        optimizer = torch.optim.SGD([*own.decide.parameters(), own.mean], lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(own(known.x), known.y).backward()
            optimizer.step()
        with torch.no_grad():
            answers.append(own(user.later.x))
    return answers


def best_descent(
    model: RatingModel, users: Sequence[User], shots: int, scale: tuple[float, float]
) -> tuple[float, int]:
    """The rate and the steps that do best on validation users."""

    def off(choice: tuple[float, int]) -> float:
        return float(errors(list(users), fine_tuned(model, users, shots, *choice), scale)[0].mean())

    return min(itertools.product(RATES, STEPS), key=off)
