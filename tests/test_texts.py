"""Learning from sentences: the encoders, runs from a config, and the answer "none of these"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metadist.algorithms.base import OUTSIDERS
from metadist.algorithms.losses import accuracy, outsiders_auroc
from metadist.cli import main
from metadist.config import validate
from metadist.data.manifest import Field
from metadist.data.pack import pack_classes
from metadist.episode import PADDING
from metadist.errors import ConfigError
from metadist.experiment import Experiment
from metadist.finished import evaluate
from metadist.models import TextBag, TextConv, TextTransformer
from metadist.tasks.outsiders import OUTSIDE
from metadist.training import train

ENCODERS = {
    "text_bag": {"embedding": 32},
    "text_conv": {"embedding": 24, "filters": 24},
    "text_transformer": {"embedding": 8, "layers": 1, "heads": 2},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of sentences told apart by a word; outsiders have a word that no class has."""
    out = tmp_path_factory.mktemp("texts") / "set"
    rng = np.random.default_rng(0)
    fillers = [f"filler{i}" for i in range(20)]

    def sentences(word: str) -> list[bytes]:
        return [" ".join(rng.permutation([word, word, *rng.choice(fillers, 2)])).encode() for _ in range(12)]

    classes = [(f"k{c}", lambda c=c: sentences(f"word{c}")) for c in range(14)]
    strangers = ("oos", lambda: [f"stranger{i} {fillers[i % 20]}".encode() for i in range(40)])
    splits = {"train": list(range(8)), "validation": [8, 9, 10], "test": [11, 12, 13], "oos": [14]}
    pack_classes(out, [*classes, strangers], splits, Field("utf-8", ()), name="texts")
    return out


def sections(packed: Path, model: str = "text_conv", **others: Any) -> dict[str, Any]:
    return {
        "tasks": {"type": "texts", "path": str(packed), "ways": 3, "length": 6, "vocabulary": 512,
                  "outsiders_from": "oos"},
        "model": {"type": model, **ENCODERS[model]},
        "algorithm": {"type": "protonet"},
        "outer": {"lr": 1e-2, "steps": 3, "meta_batch_size": 4, "tasks_per_microbatch": 2},
        "runtime": {"type": "local"},
        "evaluation": {"episodes": 20, "outsiders": 4},
        "tracking": {"wandb": {"mode": "disabled"}},
        **others,
    }  # fmt: skip


# --------------------------------------------------------------------------- encoders


def encoder(name: str, outputs: int | None = 3, length: int = 7) -> torch.nn.Module:
    torch.manual_seed(0)
    options = ENCODERS[name]
    if name == "text_transformer":
        return TextTransformer(50, length, outputs, **options).double()
    return (TextBag if name == "text_bag" else TextConv)(50, outputs, **options).double()


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_says_nothing_and_order_and_every_token_do(name: str) -> None:
    made = encoder(name)
    x = torch.tensor([[4, 9, 9, 2, PADDING, PADDING, PADDING]])
    before = made(x)
    with torch.no_grad():
        made.embed.weight[PADDING] += 1
    torch.testing.assert_close(made(x), before, rtol=0, atol=0)
    for other in ([9, 4, 9, 2], [4, 9, 9, 3], [4, 9, 9, 2, 2]):
        padded = torch.tensor([other + [PADDING] * (7 - len(other))])
        same = name == "text_bag" and sorted(other) == [2, 4, 9, 9]
        assert torch.allclose(made(padded), before) == same, other
    both = made(torch.cat([x, torch.randint(0, 50, (3, 7))]))
    torch.testing.assert_close(both[:1], before)
    assert made(torch.zeros(2, 7, dtype=torch.long)).isfinite().all(), "a sentence without tokens"
    assert encoder(name, None)(x).dim() == 2


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("algorithm", ["maml", "protonet"])
def test_every_strategy_gives_the_meta_gradient_of_plain_differentiation(
    packed: Path, name: str, algorithm: str
) -> None:
    inner = {"inner_lr": 0.1, "inner_steps": 2} if algorithm == "maml" else {}
    found = {}
    for strategy, compile in (("loop", False), ("vectorised", False), ("vectorised", "trace"), ("adjoint", False)):
        config = sections(packed, name, algorithm={"type": algorithm, **inner})
        config["engine"] = {"strategy": strategy, "compile": compile, "precision": "float64"}
        experiment = Experiment(validate(config, "the test"))
        learner = experiment.learner()
        params = learner.initial_meta_params()
        found[strategy, compile] = learner.meta_gradient(params, experiment.first_tasks(2)).gradient
    wanted = found.pop(("loop", False))
    assert sum(float(v.norm()) for v in wanted.values()) > 1e-3
    for gradient in found.values():
        for k, v in wanted.items():
            torch.testing.assert_close(gradient[k], v, rtol=1e-8, atol=1e-11)


# --------------------------------------------------------------------------- none of these


def test_confidence_tells_outsiders_from_the_others() -> None:
    logits = torch.tensor([[3.0, 0], [0, 2], [0.5, 0], [1, 0], [0, 0.2]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, OUTSIDE, OUTSIDE])
    assert float(accuracy(logits, y)) == pytest.approx(1 / 3), "outsiders are neither right nor wrong"
    # 3 and 2 are surer than both, 0.5 than one of the two.
    assert float(outsiders_auroc(logits, y)) == pytest.approx(5 / 6)
    sure = torch.tensor([[9.0, 0], [0, 9], [0.1, 0], [0.1, 0]])
    for sign, wanted in ((1, 1.0), (-1, 1.0)):
        assert float(outsiders_auroc(sign * sure, torch.tensor([0, 1, OUTSIDE, OUTSIDE]))) == wanted


@pytest.mark.parametrize("name", ENCODERS)
def test_a_run_learns_and_reports_how_outsiders_are_told_apart(packed: Path, name: str, tmp_path: Path) -> None:
    config = sections(packed, name)
    config["outer"]["steps"], config["tasks"]["renamed"] = 100, 0.5
    run = train(Experiment(validate(config, "the test")), tmp_path / "run")
    told = json.loads((run.path / "summary.json").read_text())["evaluation"]
    assert told["mean"] > 0.6, "chance is a third"
    least = 0.6 if name == "text_bag" else 0
    assert least < told["outsiders"]["mean"] <= 1 and told["outsiders"]["ci95"] > 0
    again = evaluate(run.path)
    assert again["mean"] == told["mean"] and again["outsiders"] == told["outsiders"]


def test_the_loss_and_accuracy_are_those_without_outsiders(packed: Path) -> None:
    config = sections(packed)
    learner = Experiment(validate(config, "the test")).learner()
    params, metrics = learner.initial_meta_params(), {}
    for outsiders in (0, 4):
        config["evaluation"]["outsiders"] = outsiders
        experiment = Experiment(validate(config, "the test"))
        batch = experiment.source("test", experiment.evaluation_size).episodes(0, "e", range(5))
        metrics[outsiders] = learner.evaluate_in_full(params, batch)
    assert OUTSIDERS not in metrics[0] and metrics[4][OUTSIDERS].shape == (5,)
    for k, v in metrics[0].items():
        torch.testing.assert_close(metrics[4][k], v, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"type": "conv4"}}, r"model.type: conv4 takes numbers, and the inputs are tokens; use text_bag"),
        ({"model": {"type": "mlp"}}, r"model.type: mlp takes numbers"),
        ({"tasks": {"type": "glyphs"}}, r"model.type: text_conv takes tokens.* tasks.type glyphs are none"),
        ({"algorithm": {"type": "mann"}, "model": {"type": "text_conv"}}, "evaluation.outsiders: mann reads"),
    ],
)
def test_what_does_not_go_together_is_told(packed: Path, change: dict[str, Any], told: str) -> None:
    config = sections(packed) | change
    if config["algorithm"]["type"] == "mann":
        config["tasks"]["order"] = "shuffled"
    with pytest.raises(ConfigError, match=told):
        Experiment(validate(config, "the test")).learner()


def test_sources_without_outsiders_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("{tasks: {type: glyphs}, model: {type: conv4}, algorithm: {type: protonet}}")
    changes = ["evaluation.outsiders=3", "runtime.type=local"]
    words = ["train", str(tmp_path / "c.yaml"), *changes, "--run-dir", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "evaluation.outsiders: tasks of type glyphs have no outsiders" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
