"""Episodes per second of the input pipeline, beside the ways in which few-shot episodes are usually read.

``omniglot``: 5-way 1-shot, 1 query picture, 28 x 28, every quarter turn of a character a class of its own.
``jpeg``: 5-way 5-shot, 15 query pictures, colour JPEGs of 84 x 84, made up.
``step``: the share of a training step spent waiting for episodes, in a short run of the Omniglot config.

All sides draw from the same classes and pictures. Before a side is timed its episodes are checked: as many classes and
examples as asked for, and pixels that are, bit for bit, distinct pictures of one class. Then all sides of a workload
take turns in this process, one thread, files in the system's cache; a rate is the median of its turns, and the ratio
to the folder the median of the ratios within each round of turns.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageDraw, ImageOps

from metadist.data import Field, ShardSet, UniformSampler, WindowSampler, pack_omniglot
from metadist.data.pack import pack_classes
from metadist.data.stream import EpisodeStream
from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.tasks.shards import ShardTasks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools.bench, from wherever this is run

from tools.bench._tables import keep_rows, show_table  # noqa: E402

CONFIG = ROOT / "configs" / "omniglot_5way1shot_maml.yaml"
PARTS = ("images_background", "images_evaluation")
FOLDER = "folder of files"
TOGETHER = 32
SETTLED_STEP = 5
WORKLOADS = ("omniglot", "jpeg", "step")

Picture = tuple[int, Path, int]
"""A picture of the folder: its class, its file, and the quarter turns that class is turned by."""
Pictures = dict[bytes, set[tuple[int, Path]]]
Served = Episode | EpisodeBatch
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is made and measured; ``characters`` are those made up where the real ones are not given."""

    characters: int = 1623
    jpeg_classes: int = 100
    jpeg_pictures: int = 100
    blocks: tuple[int, int] = (300, 60)
    checked: int = 40
    rounds: int = 9
    turn_s: float = 1.0
    steps: int = 60


QUICK = Size(rounds=5, turn_s=0.4, steps=20)
TINY = Size(characters=16, jpeg_classes=8, jpeg_pictures=20, blocks=(20, 10), checked=2, rounds=1, turn_s=0.01, steps=8)


@dataclass(frozen=True)
class Workload:
    """What every side of a workload serves: episodes of ``ways`` classes out of ``pictures``."""

    name: str
    ways: int
    shots: int
    query_shots: int
    load: Callable[[Path, int], np.ndarray]
    pictures: Sequence[Picture]

    @property
    def per_class(self) -> int:
        return self.shots + self.query_shots


# ------------------------------------------------------------------ data


def draw_characters(root: Path, characters: int) -> None:
    """Made-up characters in the folders of Omniglot: 20 shaky copies each of a few strokes, 105 x 105, 1 bit."""
    rng = np.random.default_rng(0)
    for c in range(characters):
        folder = root / PARTS[c % 2] / f"Made_up{c % 10}" / f"character{c // 10 + 1:02d}"
        folder.mkdir(parents=True)
        strokes = rng.uniform(15, 90, (3, 4, 2))
        for d in range(20):
            page = Image.new("1", (105, 105), 1)
            for stroke in strokes + rng.normal(0, 3, strokes.shape):
                ImageDraw.Draw(page).line([tuple(p) for p in stroke], fill=0, width=3)
            page.save(folder / f"{c:04d}_{d + 1:02d}.png")


def omniglot_folder(root: Path, size: Size) -> tuple[Path, Path | None, str]:
    """A folder of PNG files, where the lists of its splits are, and what it is."""
    given = os.environ.get("METADIST_DATA")
    if not given or size is TINY:
        draw_characters(root, size.characters)
        return root, None, "made-up characters; METADIST_DATA names the directory of the real ones"
    for part in PARTS:
        with zipfile.ZipFile(Path(given) / "omniglot" / f"{part}.zip") as archive:
            archive.extractall(root)
    return root, Path(given) / "omniglot-splits", "Omniglot"


def load_drawing(path: Path, turn: int) -> np.ndarray:
    """A drawing as it is usually read, uint8 ``[28, 28]``: ink white, reduced, turned."""
    with Image.open(path) as file:
        ink = ImageOps.invert(file.convert("L")).resize((28, 28), Image.Resampling.LANCZOS)
    return np.rot90(np.asarray(ink), turn)


def omniglot(root: Path, size: Size) -> tuple[Workload, Path, str]:
    """The workload over the characters of the training split, its packed set, and what the data is."""
    source, lists, what = omniglot_folder(root / "png", size)
    split = "random" if lists is None else "vinyals"
    manifest = pack_omniglot(source, root / "omniglot", split=split, splits_dir=lists)
    folders = {f"{f.parent.name}/{f.name}": f for part in PARTS for f in (source / part).glob("*/*")}
    names = [manifest.classes[c] for c in manifest.splits["train"]]
    pictures = [
        (4 * c + turn, file, turn)
        for c, name in enumerate(names) for turn in range(4) for file in sorted(folders[name].iterdir())
    ]  # fmt: skip
    return Workload("omniglot 5-way 1-shot", 5, 1, 1, load_drawing, pictures), root / "omniglot", what


def draw_jpegs(root: Path, classes: int, pictures: int) -> None:
    """Colour pictures of 84 x 84: a cloud of colours for each class, another and some grain for each picture."""
    rng = np.random.default_rng(0)

    def cloud(cells: int) -> np.ndarray:
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        return np.asarray(small.resize((84, 84), Image.Resampling.BICUBIC), dtype=np.int16)

    for c in range(classes):
        folder, base = root / f"class{c:03d}", cloud(4)
        folder.mkdir(parents=True)
        for i in range(pictures):
            mixed = (base + 2 * cloud(12)) // 3 + rng.integers(-8, 9, (84, 84, 3))
            Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=85)


def load_jpeg(path: Path, _turn: int) -> np.ndarray:
    """A picture as it is usually read, uint8 ``[84, 84, 3]``."""
    with Image.open(path) as file:
        colour = file.convert("RGB")
        return np.asarray(colour if colour.size == (84, 84) else colour.resize((84, 84)))


def jpegs(root: Path, size: Size) -> tuple[Workload, dict[int, Path]]:
    """The workload, and the same JPEG bytes packed with 20 and with 50 (or fewer) pictures a block."""
    draw_jpegs(root / "jpg", size.jpeg_classes, size.jpeg_pictures)
    folders = sorted((root / "jpg").iterdir())
    pictures = [(c, file, 0) for c, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    packed = {}
    for block in (20, 50):
        packed[block] = root / f"jpeg{block}"
        classes = [(f.name, partial(lambda f: [p.read_bytes() for p in sorted(f.iterdir())], f)) for f in folders]
        kept = Field("jpeg", (84, 84, 3))
        everything = {"train": range(len(folders))}
        pack_classes(packed[block], classes, everything, kept, name="made-up", block_examples=block)
    return Workload("jpeg 84x84 5-way 5-shot", 5, 5, 15, load_jpeg, pictures), packed


# ------------------------------------------------------------------ ours


def stream(work: Workload, path: Path, window: int | None, turned: bool) -> Iterator[Served]:
    """The WebDataset pipeline."""
    shards, size = ShardSet(path), (work.ways, work.per_class)
    pool = shards.pool("train", turned=turned)
    sampler = WindowSampler(pool, *size, window=window, reuse=0.5) if window else UniformSampler(pool, *size)
    return iter(EpisodeStream(shards, sampler, shots=work.shots, seed=0))


def batches(
    work: Workload, path: Path, window: int | None, turned: bool, together: int = TOGETHER, resident: bool = False
) -> Iterator[Served]:
    """The batches that workers ask for."""
    sampler = {"type": "window", "blocks": window, "reuse": 0.5} if window else "uniform"
    turns = "classes" if turned else "none"
    size = (work.ways, work.shots, work.query_shots)
    tasks = ShardTasks(path, *size, sampler=sampler, rotations=turns, resident=resident)
    if window:  # these sets would fit the cache whole; one that a window is for would not
        index, shape = tasks._shards.index, tasks._shards.manifest.field.shape
        tasks._shards.cache_bytes = 2 * window * int(index["n"].max() * np.prod(shape))
    for first in itertools.count(0, together):
        yield tasks.episodes(0, "train", range(first, first + together))


# ------------------------------------------------------------------ others


def tensor(pixels: np.ndarray) -> torch.Tensor:
    """What torchvision's ``ToTensor`` makes of a picture."""
    x = torch.from_numpy(np.array(pixels if pixels.ndim == 3 else pixels[..., None]))
    return x.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def folder(work: Workload) -> Iterator[Served]:
    """A folder of files, opened anew for each episode."""
    rng, groups = random.Random(0), {c: list(g) for c, g in itertools.groupby(work.pictures, lambda p: p[0])}
    classes = sorted(groups)
    labels = [torch.arange(work.ways).repeat_interleave(n) for n in (work.shots, work.query_shots)]
    while True:
        support, query = [], []
        for c in rng.sample(classes, work.ways):
            read = [tensor(work.load(file, turn)) for _, file, turn in rng.sample(groups[c], work.per_class)]
            support += read[: work.shots]
            query += read[work.shots :]
        yield Episode(Examples(torch.stack(support), labels[0]), Examples(torch.stack(query), labels[1]))


def stock_webdataset(work: Workload, path: Path) -> Iterator[Served]:
    """Stock ``webdataset`` over the same tars: shuffled class blocks, the next ``ways`` of which are an episode."""
    rng, train = np.random.default_rng(0), set(ShardSet(path).manifest.splits["train"])
    urls = [str(p) for p in sorted(path.glob("*.tar"))]

    def examples(block: dict[str, Any]) -> np.ndarray:
        x = block["x.npy"][rng.choice(len(block["x.npy"]), work.per_class, replace=False)]
        return np.rot90(x, rng.integers(4), axes=(1, 2))

    def episode(blocks: list[np.ndarray]) -> Episode:
        x = torch.from_numpy(np.stack(blocks)[:, :, None]).to(torch.float32).div(255)  # [ways, per_class, 1, H, W]
        parts = x.split([work.shots, work.query_shots], 1)
        sets = [Examples(p.flatten(0, 1), torch.arange(work.ways).repeat_interleave(p.shape[1])) for p in parts]
        return Episode(sets[0], sets[1])

    return iter(
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
        .select(lambda s: int(s["__key__"][1:6]) in train)
        .repeat()
        .shuffle(300)
        .decode()
        .map(examples)
        .batched(work.ways, collation_fn=list, partial=False)
        .map(episode)
    )


class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The folder as a map-style data set."""

    def __init__(self, work: Workload) -> None:
        self.work = work

    def __len__(self) -> int:
        return len(self.work.pictures)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        label, file, turn = self.work.pictures[i]
        return tensor(self.work.load(file, turn)), label


def learn2learn(work: Workload, peers: Path) -> Iterator[Served]:
    """learn2learn's task transforms over the folder."""
    data = learn2learn_data(peers)
    labels = {i: picture[0] for i, picture in enumerate(work.pictures)}
    pictures = data.MetaDataset(Files(work), indices_to_labels=labels)
    transforms = [
        data.transforms.NWays(pictures, work.ways),
        data.transforms.KShots(pictures, work.per_class),
        data.transforms.LoadData(pictures),
        data.transforms.RemapLabels(pictures),
        data.transforms.ConsecutiveLabels(pictures),
    ]
    random.seed(0)
    for x, y in data.Taskset(pictures, transforms):
        support, query = data.partition_task(x, y, shots=work.shots)
        yield Episode(support, query)


def learn2learn_data(peers: Path) -> Any:
    """Its package of data transforms alone: the whole of it imports gym, torchvision and more.

    Raises:
        ImportError: if it is not in ``peers``.
    """
    if not (peers / "learn2learn").is_dir():
        raise ImportError(f"learn2learn is not in {peers}")
    if str(peers) not in sys.path:
        sys.path.append(str(peers))
    if "learn2learn" not in sys.modules:
        package = types.ModuleType("learn2learn")
        package.__path__ = [str(peers / "learn2learn")]
        sys.modules["learn2learn"] = package
    import learn2learn.data  # type: ignore[import-not-found]

    return learn2learn.data


# ------------------------------------------------------------------ checking


def fingerprint(pixels: np.ndarray) -> bytes:
    """Of uint8 pixels ``[H, W]`` or ``[H, W, C]``."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=12).digest()


def known(work: Workload) -> Pictures:
    """Which classes and files show which pixels, read from the folder; a few drawings are alike or symmetric."""
    found: Pictures = defaultdict(set)
    upright = {file: work.load(file, 0) for file in {file for _, file, _ in work.pictures}}
    for label, file, turn in work.pictures:
        found[fingerprint(np.rot90(upright[file], turn))].add((label, file))
    return found


def fault(episode: Episode, work: Workload, pictures: Pictures) -> str | None:
    """Why an episode is none of this workload; None if it is one."""
    seen: dict[int, list[set[tuple[int, Path]]]] = defaultdict(list)
    for part, each in (episode.support, work.shots), (episode.query, work.query_shots):
        counts = torch.bincount(part.y, minlength=work.ways).tolist()
        if counts != [each] * work.ways:
            return f"examples of each class are {counts}, not {each} of {work.ways}"
        pixels = part.x.mul(255).round()
        within = part.x.dtype == torch.float32 and part.x.amin() >= 0 and part.x.amax() <= 1
        if not within or not torch.equal(pixels.div(255), part.x):
            return "pixels are not float32 of 0, 1/255, ..., 1"
        for label, x in zip(part.y.tolist(), pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy(), strict=True):
            seen[label].append(pictures.get(fingerprint(x.squeeze(-1) if x.shape[-1] == 1 else x), set()))
    taken: set[int] = set()
    for label, shown in seen.items():
        if not all(shown):
            return f"class {label} shows what is no picture of the folder"
        common = set.intersection(*({c for c, _ in s} for s in shown)) - taken
        if not common:
            return f"class {label} shows several classes, or one that another shows"
        fits = [c for c in common if len({file for s in shown for d, file in s if d == c}) >= len(shown)]
        if not fits:
            return f"class {label} shows a picture twice"
        taken.add(min(fits))
    return None


def check(served: Iterator[Served], side: str, work: Workload, pictures: Pictures, episodes: int) -> None:
    """Stops the benchmark if a side's first ``episodes`` are not of this workload."""
    checked = 0
    while checked < episodes:
        item = next(served)
        for episode in item if isinstance(item, EpisodeBatch) else [item]:
            if problem := fault(episode, work, pictures):
                raise SystemExit(f"pipeline: {side} gives a wrong episode: {problem}")
            checked += 1


# ------------------------------------------------------------------ timing


def turn(served: Iterator[Served], seconds: float) -> float:
    """Episodes per second of one side's turn."""
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        item = next(served)
        count += len(item) if isinstance(item, EpisodeBatch) else 1
    return count / elapsed


def compare(work: Workload, sides: dict[str, Iterator[Served]], size: Size) -> list[Row]:
    """A row for each side: checked first, then timed in turns; the first round fills caches and does not count."""
    pictures = known(work)
    for side, served in sides.items():
        check(served, side, work, pictures, size.checked)
    rounds = []
    for number in range(size.rounds + 1):
        rounds.append({side: turn(served, size.turn_s) for side, served in sides.items()})
        print(f"{work.name}: round {number} of {size.rounds}", file=sys.stderr)
    return [row(work.name, side, [r[side] for r in rounds[1:]], [r[FOLDER] for r in rounds[1:]]) for side in sides]


def row(workload: str, side: str, rates: list[float], folders: list[float], waits: Sequence[float] = ()) -> Row:
    """Medians over the turns of a side, or over the steps of a run."""
    ratios = [ours / theirs for ours, theirs in zip(rates, folders, strict=False)]
    return {
        "workload": workload,
        "implementation": side,
        "episodes_per_s": statistics.median(rates),
        "ratio_to_folder": statistics.median(ratios) if ratios else None,
        "data_wait_share": statistics.median(waits) if waits else None,
    }


def omniglot_rows(work: Workload, path: Path, size: Size, peers: Path) -> list[Row]:
    """Every way to read Omniglot."""
    window, _ = size.blocks
    sides = {
        FOLDER: folder(work),
        "stock webdataset, class blocks": stock_webdataset(work, path),
        "EpisodeStream, uniform": stream(work, path, None, True),
        "EpisodeStream, window": stream(work, path, window, True),
        "ShardTasks, uniform, resident": batches(work, path, None, True, resident=True),
        "ShardTasks, uniform, resident, 4 at a time": batches(work, path, None, True, 4, resident=True),
        "ShardTasks, uniform, indexed": batches(work, path, None, True),
        "ShardTasks, window, indexed": batches(work, path, window, True),
    }
    return compare(work, sides | peer(work, peers), size)


def jpeg_rows(root: Path, size: Size, peers: Path) -> list[Row]:
    """Pictures that are decoded once for as long as they stay in the window, and by the folder for each episode."""
    work, packed = jpegs(root, size)
    _, window = size.blocks
    sides = {
        FOLDER: folder(work),
        "EpisodeStream, window, blocks of 20": stream(work, packed[20], window, False),
        "EpisodeStream, window, blocks of 50": stream(work, packed[50], window, False),
        "ShardTasks, window, blocks of 20, 4 at a time": batches(work, packed[20], window, False, 4),
    }
    return compare(work, sides | peer(work, peers), size)


def peer(work: Workload, peers: Path) -> dict[str, Iterator[Served]]:
    """learn2learn, if it is there."""
    try:
        learn2learn_data(peers)
    except ImportError as e:
        print(f"pipeline: learn2learn is left out ({e}); --help tells how to build it", file=sys.stderr)
        return {}
    return {"learn2learn, folder of files": learn2learn(work, peers)}


def step_rows(root: Path, path: Path, what: str, size: Size) -> list[Row]:
    """Trains for a few steps in a process of its own."""
    run_dir = root / "run"
    words = [
        f"tasks.path={path}", "runtime.type=local", f"outer.steps={size.steps}", "evaluation.episodes=8",
        "tracking.wandb.mode=disabled", "tracking.console=false",
    ]  # fmt: skip
    words += ["tasks.ways=2", "model.filters=4", "engine.compile=false"] if size is TINY else []
    command = [sys.executable, "-m", "metadist.cli", "train", str(CONFIG), *words, "--run-dir", str(run_dir)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pipeline: the training run failed:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_s" in line][SETTLED_STEP:]
    rates, waits = [s["tasks_per_s"] for s in steps], [s["data_wait_s"] / s["step_s"] for s in steps]
    return [row("training step, omniglot_5way1shot_maml", f"metadist train, local, {what}", rates, [], waits)]


# ------------------------------------------------------------------ the command


def cells(found: Row) -> list[str]:
    """A row as it is shown."""
    ratio, share = found["ratio_to_folder"], found["data_wait_share"]
    rates = [f"{found['episodes_per_s']:,.0f}", f"{ratio:.1f}" if ratio else "", f"{share:.2%}" if share else ""]
    return [found["workload"], found["implementation"], *rates]


COLUMNS = ("workload", "implementation", "episodes/s", "x folder", "data wait")


def measure(chosen: Sequence[str], size: Size, peers: Path) -> tuple[list[Row], str]:
    """The rows of the chosen workloads, and what the Omniglot of them is."""
    rows: list[Row] = []
    what = ""
    with tempfile.TemporaryDirectory() as folder_name:
        root = Path(folder_name)
        if "omniglot" in chosen or "step" in chosen:
            work, path, what = omniglot(root, size)
            print(f"pipeline: the characters are {what}")
        if "omniglot" in chosen:
            rows += omniglot_rows(work, path, size, peers)
        if "jpeg" in chosen:
            rows += jpeg_rows(root, size, peers)
        if "step" in chosen:
            rows += step_rows(root, path, what.split(";")[0], size)
    return rows, what


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  METADIST_DATA=data python tools/bench/pipeline.py --quick --json pipeline.json\n\n"
        "learn2learn is compiled from its sources, without what else it would install:\n"
        "  pip download --no-deps --no-binary :all: learn2learn==0.2.0 && tar xf learn2learn-0.2.0.tar.gz\n"
        "  pip install cython && pip install --no-deps --target .peers tqdm\n"
        "  (cd learn2learn-0.2.0 && python setup.py build_ext build --build-lib ../.peers)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns: under five minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write {"rows": [...]} and how they came about')
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="[default: all]")
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", default=Path(".peers"),
        help="where learn2learn lies; without it that side is left out  [default: %(default)s]",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    size = TINY if options.tiny else QUICK if options.quick else Size()
    rows, what = measure(options.workloads, size, options.peers.resolve())
    show_table(COLUMNS, [cells(found) for found in rows], words=2)
    if options.json:
        setup = {
            "date": datetime.date.today().isoformat(),
            "cpu_cores": os.cpu_count(),
            "torch": torch.__version__,
            "webdataset": wds.__version__,
            "characters": what,
            "rounds": size.rounds,
            "seconds_a_turn": size.turn_s,
            "episodes_together": TOGETHER,
        }
        keep_rows(options.json, rows, setup)


if __name__ == "__main__":
    main()
