"""Packing CLINC150 (Larson et al., EMNLP 2019): what people ask an assistant, 150 intents of 10 domains.

Few-shot learning holds out whole domains, so that what is new is new in kind; and the questions that belong to no
intent are a class and a split of their own, ``oos``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from metadist.data import decode
from metadist.data.manifest import Manifest
from metadist.data.pack import BLOCK_EXAMPLES
from metadist.data.sources import Progress, downloaded
from metadist.data.splits import Membership, StrPath, choose
from metadist.data.texts import pack_texts
from metadist.data.writer import SHARD_BYTES, refuse_existing
from metadist.errors import DataError

HOME = "https://raw.githubusercontent.com/clinc/oos-eval/master/data"
FILES = ("data_full.json", "domains.json")
LICENCE = "CC BY 3.0, Larson et al. 2019"
OUT_OF_SCOPE = "oos"
# Banking and credit cards stay together: what is asked of them is much alike.
DOMAINS = {
    "train": ("banking", "credit_cards", "home", "kitchen_and_dining", "meta", "utility"),
    "validation": ("auto_and_commute", "small_talk"),
    "test": ("travel", "work"),
}
_PARTS = ("train", "val", "test")
_AGAIN = "download the file again"


def pack_clinc150(
    source: StrPath | None,
    out: StrPath,
    *,
    splits: StrPath | None = None,
    block_examples: int = BLOCK_EXAMPLES,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Packs CLINC150: an intent is a class, its utterances of all three parts are its examples.

    Args:
        source: directory of ``data_full.json`` and ``domains.json``; downloaded from the authors' repository if none.
        out: directory to make; it must not exist.
        splits: JSON file of lists of domains, ``{"train": [...], ...}``; :data:`DOMAINS` if none.
        block_examples, shard_bytes, progress: as for :func:`~metadist.data.pack.pack_classes`.

    Raises:
        DataError: as :func:`~metadist.data.pack.pack_classes`, or if a file is missing or is not of this data set, or a
            download fails.
    """
    refuse_existing(Path(out))
    with ExitStack() as stack:
        urls = [f"{HOME}/{name}" for name in FILES]
        root = Path(source) if source is not None else stack.enter_context(downloaded(urls, progress))
        utterances, domains = _utterances(root / FILES[0]), _domains(root / FILES[1])
        if missing := sorted(set(utterances) - set(domains) - {OUT_OF_SCOPE}):
            raise DataError(root / FILES[1], f"intent {missing[0]!r} is in no domain", _AGAIN)

        def splits_of(names: list[str]) -> Mapping[str, Sequence[str]]:
            intents = [name for name in names if name != OUT_OF_SCOPE]
            if splits is not None:
                chosen: dict[str, list[str]] = choose(intents, groups=domains, listed=splits)
            else:
                chosen = {s: [n for n in intents if domains[n] in members] for s, members in DOMAINS.items()}
            return chosen | ({OUT_OF_SCOPE: [OUT_OF_SCOPE]} if OUT_OF_SCOPE in names else {})

        return pack_texts(
            out,
            {name: len(texts) for name, texts in utterances.items()},
            utterances.__getitem__,
            splits_of,
            where=str(root),
            least=2,
            skips=False,
            notes={"domains": {name: domains[name] for name in sorted(utterances) if name in domains}},
            name="clinc150",
            licence=LICENCE,
            source="https://github.com/clinc/oos-eval",
            block_examples=block_examples,
            shard_bytes=shard_bytes,
            progress=progress,
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        return decode.json_object(path.read_bytes(), str(path))
    except OSError as e:
        mend = f"give the directory with {' and '.join(FILES)}, or no --source to download them"
        raise DataError(path, f"cannot be read ({e.strerror})", mend) from None


def _utterances(path: Path) -> dict[str, list[bytes]]:
    """The texts of each intent, and those of ``oos``, UTF-8."""
    body = _json(path)
    found: dict[str, list[bytes]] = {}
    for part in (*_PARTS, *(f"oos_{part}" for part in _PARTS)):
        entries = body.get(part)
        if not isinstance(entries, list):
            raise DataError(f"{path}: {part}", "is missing, or no list", _AGAIN)
        for number, entry in enumerate(entries):
            if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) and e for e in entry):
                raise DataError(f"{path}: {part}[{number}]", "is not a pair of an utterance and an intent", _AGAIN)
            text, intent = entry
            if (intent == OUT_OF_SCOPE) != part.startswith("oos_"):
                raise DataError(f"{path}: {part}[{number}]", f"has intent {intent!r}", _AGAIN)
            found.setdefault(intent, []).append(text.encode())
    return found


def _domains(path: Path) -> dict[str, str]:
    """The domain of each intent."""
    members = Membership("domain")
    for domain, intents in _json(path).items():
        if not isinstance(intents, list):
            raise DataError(f"{path}: {domain}", "is not a list of intents", _AGAIN)
        for intent in intents:
            members.add(str(intent), domain, f"{path}: {domain}")
    return members.of
