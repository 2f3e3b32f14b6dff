"""cluster/README.md names files and commands that there are."""

from __future__ import annotations

import re
import shlex

import pytest

from metadist.cli import main
from metadist.config import load_config
from tests.conftest import ROOT

GUIDE = (ROOT / "cluster" / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
WORDS = [shlex.split(line, comments=True) for line in LINES]
OURS = [words for words in WORDS if words[:1] == ["metadist"]]


def test_every_way_has_its_heading() -> None:
    headings = re.findall(r"^## (.+)$", GUIDE, re.MULTILINE)
    assert headings == ["The image", "KubeRay", "Slurm", "AWS and Google Cloud", "Watching it", "By hand"]


def test_every_file_of_the_folder_is_named_and_every_file_named_is_there() -> None:
    named = {w for words in WORDS for w in words if re.match(r"(cluster|configs)/", w)}
    named |= {f"cluster/{w}" for w in re.findall(r"^\| .*?\| `([\w./]+)` \|", GUIDE, re.MULTILINE)}
    named |= set(re.findall(r"`(cluster/grafana/[\w.]+)`", GUIDE))
    manifests = set(re.findall(r"`([\w-]+\.yaml)`", GUIDE)) - {"aws.yaml", "gcp.yaml"}
    named |= {f"cluster/kuberay/{w}" for w in manifests}
    assert all((ROOT / name).exists() for name in named), {n for n in named if not (ROOT / n).exists()}
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "cluster").rglob("*") if p.is_file()}
    assert there - named == {"cluster/README.md", "cluster/Dockerfile.dockerignore"}


@pytest.mark.parametrize("words", OURS, ids=lambda w: " ".join(w[:3]))
def test_a_command_s_config_and_overrides_are_taken(words: list[str]) -> None:
    configs = [w for w in words if w.startswith("configs/")]
    overrides = [w for w in words if re.match(r"[a-z]\w*\.[\w.]+=", w)]
    for config in configs:
        load_config(ROOT / config, overrides)
    assert configs or not overrides


def test_the_guide_submits_jobs() -> None:
    assert len([w for w in OURS if w[1] == "submit" and "--address" in w]) >= 3
    assert "submit" in main.commands
