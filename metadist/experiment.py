"""From a config, or from Python objects, to the parts that run: task sources, model, learner."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from metadist.algorithms import BUILT_IN, Algorithm, Plan, outputs_for, resolve_objective
from metadist.config.schema import (
    BackboneConfig,
    ClassTasks,
    Config,
    ModelSection,
    RatingModelConfig,
    RatingTasksConfig,
    TextBagConfig,
    TextConvConfig,
    TextTransformerConfig,
)
from metadist.config.section import CustomConfig
from metadist.episode import Episode, EpisodeBatch
from metadist.errors import ConfigError
from metadist.inner import Convolution, Engine, FunctionalModel
from metadist.inner.engine import Strategy
from metadist.inner.kernels import available as kernels_available
from metadist.inner.optimizers import make_optimizer
from metadist.inputs import Inputs
from metadist.models import MLP, Backbone, Conv4, Flatten, RatingModel, ResNet12, TextBag, TextConv, TextTransformer
from metadist.rounds import EpisodeSize
from metadist.seeding import Rng
from metadist.tasks.base import TaskSource

DTYPES = {name: torch.float32 for name in ("float32", "tf32", "bfloat16")} | {"float64": torch.float64}
"""Of parameters and data, by ``engine.precision``."""

PRODUCTS = {"bfloat16": torch.bfloat16}
"""What the factors of products are rounded to, where it differs."""


@dataclass(frozen=True)
class Experiment:
    """A config together with the Python objects that stand in for sections of it.

    Args:
        config: the resolved config.
        tasks: a source in place of the ``tasks`` section.
        model: a function that makes the module, in place of the ``model`` section.
        algorithm: a learner in place of the ``algorithm`` section.
        code: whether what the config names by ``import_path`` may be imported, which runs it; or the names that may be.
        known: what the tasks look like, so that a learner can be made where their data are not.

    It travels to the workers, so the objects must be picklable by value or by name.
    """

    config: Config
    tasks: TaskSource | None = None
    model: Callable[[], nn.Module] | None = None
    algorithm: Algorithm | None = None
    code: bool | frozenset[str] = False
    known: Inputs | None = None
    _sources: dict[Any, TaskSource] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Open sources stay where they are: each process opens its own.
        return {**self.__dict__, "_sources": {}}

    def source(self, split: str, size: EpisodeSize = EpisodeSize()) -> TaskSource:
        """The task source of one split; opened once.

        Args:
            split: its name.
            size: of the episodes, where it differs from the config's.
        """
        key = (split, size)
        if key not in self._sources:
            self._sources[key] = self._open_source(split, size)
        return self._sources[key]

    @property
    def evaluation_size(self) -> EpisodeSize:
        """Size of the episodes of evaluations, where it differs from training's."""
        section = self.config.evaluation
        return EpisodeSize(section.ways, section.shots, section.query_shots, section.outsiders or None)

    @property
    def has_learner_of_its_own(self) -> bool:
        """Whether model or algorithm are the user's code."""
        sections = self.config.model, self.config.algorithm
        return any(section.type in ("custom", "python") for section in sections)

    def example(self) -> Episode:
        """One training episode, for the shapes of inputs and targets."""
        if self.known is not None:
            return self.known.example()
        return self.source(self.train_split).episodes(self.config.seed, "example", [0])[0]

    def inputs(self) -> Inputs:
        """What the tasks look like."""
        if self.known is not None:
            return self.known
        return Inputs.of(self.example(), getattr(self.source(self.train_split), "vocabulary", None))

    @property
    def plan(self) -> Plan:
        """How meta-batches are cut into microbatches."""
        return Plan(self.config.outer.meta_batch_size, int(self.config.outer.tasks_per_microbatch))

    @property
    def train_split(self) -> str:
        return getattr(self.config.tasks, "train_split", "train")

    def learner(self, device: torch.device | str = "cpu") -> Algorithm:
        """The algorithm with model, objective and engine, ready to compute.

        The model's initial parameters are a function of the seed alone.
        """
        example = self.example()
        dtype = DTYPES[self.config.engine.precision]
        algorithm = self._make_algorithm()
        algorithm.plan, algorithm.also = self.plan, self.config.evaluation.also
        self._check_order(algorithm)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Rng(self.config.seed, "initialisation").torch_seed())
            module = self._make_module(example, algorithm.wants)
            with _refusals("algorithm"):
                module = algorithm.prepare(module, example)
        section = self.config.engine
        strategy: Strategy = "vectorised" if section.strategy == "auto" else section.strategy
        form = "trace" if section.compile == "auto" else section.compile
        engine = Engine(strategy, form, section.recompute, section.tasks_together)
        with _refusals("model.batchnorm"):
            model = FunctionalModel(
                module, device, dtype, self.config.model.batchnorm, self._convolution(engine, device, dtype),
                section.fused_norm is not False, PRODUCTS.get(section.precision),
            )  # fmt: skip
        objective = resolve_objective(algorithm.loss, example.query.y, algorithm.metric)
        with _refusals("algorithm"):
            bound = algorithm.bind(model, objective, engine)
        frozen = {n for pattern in self.config.outer.frozen for n in fnmatch.filter(model.initial_params(), pattern)}
        model.still = frozenset(filter(bound.reads_only, frozen))
        return bound

    def with_engine(self, **changes: Any) -> Experiment:
        """The same with other fields of ``engine``."""
        engine = self.config.engine.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"engine": engine}), _sources=self._sources)

    def with_few_steps(self, most: int) -> Experiment:
        """The same with at most so many inner steps, where the config's learner makes them one after another."""
        section = self.config.algorithm
        if self.algorithm is not None or getattr(section, "inner_steps", 0) <= most or section.type in ("es", "pes"):
            return self
        section = section.model_copy(update={"inner_steps": most})
        return replace(self, config=self.config.model_copy(update={"algorithm": section}), _sources=self._sources)

    def without_blocks(self, left_out: Sequence[str]) -> Experiment:
        """The same, with blocks of its shard set left out."""
        tasks = self.config.tasks.model_copy(update={"left_out": tuple(left_out)})
        return replace(self, config=self.config.model_copy(update={"tasks": tasks}), _sources={})

    def first_tasks(self, count: int) -> EpisodeBatch:
        """The first tasks to learn from, for trying things out; not those of any step."""
        batch = self.source(self.train_split).episodes(self.config.seed, "example", range(count))
        return batch.to("cpu", DTYPES[self.config.engine.precision])

    def _convolution(self, engine: Engine, device: torch.device | str, dtype: torch.dtype) -> Convolution:
        """How convolutions are computed: a rule over the strategy and the kind of device, never a timing."""
        wanted = self.config.engine.convolution
        if wanted != "auto":
            return wanted
        # Neither traced nor compiled, what goes around the products costs more than they save.
        if not engine.compile:
            return "direct"
        device = torch.device(device)
        if device.type == "cuda":  # where grouped convolutions are computed one group after another
            return "columns"
        if not kernels_available(device, dtype):
            return "direct"
        # Winograd's transforms need the bits that bfloat16 has not.
        return "columns" if self.config.engine.precision in PRODUCTS else "winograd"

    def close(self) -> None:
        """Closes every source that was opened."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()

    # ----------------------------------------------------------------- sections

    def _open_source(self, split: str, size: EpisodeSize) -> TaskSource:
        if self.tasks is not None:
            return self.tasks.split(split)
        section = self.config.tasks
        if section.type == "custom":
            return self._construct("tasks", section, TaskSource).split(split)
        if section.type == "python":
            raise _python_only("tasks", section.name)
        ours = {"type", "on_bad", "most_bad"} | (set() if section.type == "ratings" else {"train_split"})
        options = section.model_dump(exclude=ours)
        takes = {*options, "outsiders"} if section.type == "texts" else {*options}
        for name, value in size.given().items():
            if name not in takes:
                known = ", ".join(n for n in EpisodeSize.__dataclass_fields__ if n in takes)
                mend = f"leave it out; these tasks have {known}"
                raise ConfigError(f"evaluation.{name}", f"tasks of type {section.type} have no {name}", mend)
            options[name] = value
        if isinstance(section, ClassTasks | RatingTasksConfig):
            options["split"] = split
        if split != self.train_split:
            for augments in ("augmentation", "renamed"):
                options.pop(augments, None)
        return _task_source(section.type)(**options)

    def _construct(self, name: str, section: CustomConfig, wanted: type) -> Any:
        """What a section of type ``custom`` names, called with its ``args``."""
        path = section.import_path
        target = self._imported(f"{name}.import_path", path)
        try:
            made = target(**section.args)
        except Exception as e:
            raise ConfigError(f"{name}.args", f"{path} refused them ({type(e).__name__}: {e})") from e
        return _checked(f"{name}.import_path", made, wanted)

    def _imported(self, field_name: str, path: str) -> Any:
        """What ``package.module:Name`` names, if the experiment may run code that its config names."""
        if self.code is not True and path not in (self.code or frozenset()):
            raise ConfigError(
                field_name,
                f"is {path}, code that this would run",
                "read it, and add --allow-code (from Python, allow_code=True) if you trust it",
            )
        return import_object(field_name, path)

    def _make_module(self, example: Episode, wants: str) -> nn.Module:
        if self.model is not None:
            return _checked("model", self.model(), nn.Module)
        section = self.config.model
        if section.type == "custom":
            return self._construct("model", section, nn.Module)
        if section.type == "python":
            raise _python_only("model", section.name)
        x = example.support.x
        outputs = outputs_for(torch.cat([example.support.y, example.query.y])) if wants == "outputs" else None
        if section.type == "flatten":
            if wants == "outputs":
                raise ConfigError(
                    "model.type",
                    f"flatten has nothing to learn, which algorithm.type {self.config.algorithm.type} needs",
                    "use mlp or conv4",
                )
            return Flatten(section.size)
        if isinstance(section, TextBagConfig | TextConvConfig | TextTransformerConfig):
            return self._text_encoder(section, x, outputs)
        if section.type == "rating":
            return self._rating_model(section, example)
        if not x.is_floating_point():
            mend = "use text_bag, text_conv or text_transformer"
            raise ConfigError("model.type", f"{section.type} takes numbers, and the inputs are tokens", mend)
        if section.type == "mlp":
            return MLP(x[0].numel(), outputs, section.hidden)
        if x.dim() != 4:
            raise ConfigError(
                "model.type",
                f"{section.type} takes pictures, but the inputs of tasks.type {self.config.tasks.type} have "
                f"shape {list(x.shape[1:])}",
                "use mlp",
            )
        if isinstance(section, BackboneConfig):
            # What a finished run has learned holds the weights already.
            known = {"weights": None} if self.known is not None else {}
            return Backbone(out_features=outputs, **section.model_dump(exclude={"type", "batchnorm"}) | known)
        if section.type == "resnet12":
            smallest = 2 ** len(section.widths)
            if min(x.shape[-2:]) < smallest:
                raise ConfigError(
                    "model.widths",
                    f"halve pictures {len(section.widths)} times, and these are {x.shape[-2]}x{x.shape[-1]}",
                    f"give fewer widths, or pictures of {smallest} or more",
                )
            return ResNet12(x.shape[1], outputs, section.widths)
        return Conv4(x.shape[1], outputs, section.filters, section.downsample, tuple(x.shape[-2:]))  # type: ignore[arg-type]

    def _rating_model(self, section: RatingModelConfig, example: Episode) -> nn.Module:
        x, y = example.support
        if y.dim() != 2 or y.shape[1] != 1 or not y.is_floating_point():
            raise ConfigError("model.type", "rating says a number, but targets are none", "use tasks of ratings")
        mean = float(y.mean()) if section.mean is None else section.mean
        return RatingModel(self._vocabulary(section, x), section.embedding, section.hidden, mean)

    def _text_encoder(
        self, section: TextBagConfig | TextConvConfig | TextTransformerConfig, x: torch.Tensor, outputs: int | None
    ) -> nn.Module:
        vocabulary = self._vocabulary(section, x)
        options = section.model_dump(exclude={"type", "batchnorm"})
        if isinstance(section, TextBagConfig):
            return TextBag(vocabulary, outputs, **options)
        if isinstance(section, TextConvConfig):
            return TextConv(vocabulary, outputs, **options)
        return TextTransformer(vocabulary, x.shape[1], outputs, **options)

    def _vocabulary(self, section: ModelSection, x: torch.Tensor) -> int:
        """How many numbers the tasks' inputs are made of, for models that have a vector for each."""
        vocabulary = self.inputs().vocabulary
        if vocabulary is None or x.is_floating_point() or x.dim() != 2:
            raise ConfigError(
                "model.type",
                f"{section.type} takes tokens, and the inputs of tasks.type {self.config.tasks.type} are none",  # type: ignore[attr-defined]
                "use tasks of texts or ratings; a source of your own gives whole numbers [N, length] and has a "
                "`vocabulary`",
            )
        return int(vocabulary)

    def _check_order(self, algorithm: Algorithm) -> None:
        """Refuses an order of examples in which the learner would learn something else than the task."""
        if self.config.evaluation.outsiders and not algorithm.takes_outsiders:
            kind = self.config.algorithm.type
            raise ConfigError("evaluation.outsiders", f"{kind} reads each class after its example", "write 0")
        section = self.config.tasks
        order = getattr(section, "order", None)  # tasks of one's own have the order they have
        if algorithm.wants_order and order is not None and order not in algorithm.wants_order:
            raise ConfigError(
                "tasks.order",
                f"is {order}, which would tell {self.config.algorithm.type} an example's class by its place",
                f"write tasks.order: {algorithm.wants_order[0]}",
            )

    def _make_algorithm(self) -> Algorithm:
        if self.algorithm is not None:
            return copy.copy(self.algorithm)  # learners of two engines must not share what they are bound to
        section = self.config.algorithm
        if section.type == "custom":
            return self._construct("algorithm", section, Algorithm)
        if section.type == "python":
            raise _python_only("algorithm", section.name)
        options = section.model_dump(exclude={"type"})
        if ":" in options.get("loss", ""):
            options["loss"] = self._imported("algorithm.loss", options["loss"])
        with _refusals("algorithm"):
            if "inner_optimizer" in options:
                options["inner_optimizer"] = make_optimizer(**options["inner_optimizer"])
            return BUILT_IN[section.type](**options)


@contextlib.contextmanager
def _refusals(section: str) -> Iterator[None]:
    """Within it, a ValueError is a fault of the config's section, told in its own words."""
    try:
        yield
    except ValueError as e:
        raise ConfigError(section, str(e)) from e


def _task_source(kind: str) -> Callable[..., TaskSource]:
    if kind == "glyphs":
        from metadist.tasks.glyphs import GlyphTasks

        return GlyphTasks
    if kind == "sinusoid":
        from metadist.tasks.sinusoid import SinusoidTasks

        return SinusoidTasks
    if kind == "ratings":
        from metadist.tasks.ratings import RatingTasks

        return RatingTasks
    if kind == "texts":
        from metadist.tasks.texts import TextTasks

        return TextTasks
    from metadist.tasks.shards import ShardTasks

    return ShardTasks


def import_object(field_name: str, path: str) -> Any:
    """What ``package.module:Name`` names."""
    module_name, _, name = path.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except Exception as e:
        raise ConfigError(
            field_name,
            f"{path} cannot be imported ({type(e).__name__}: {e})",
            "check its spelling; it is looked for in the folder where `metadist` is run, and on PYTHONPATH",
        ) from e
    return target


def _checked(where: str, made: Any, wanted: type) -> Any:
    if not isinstance(made, wanted):
        raise ConfigError(where, f"made a {type(made).__name__}, wanted a {wanted.__name__}")
    return made


def _python_only(section: str, name: str) -> ConfigError:
    return ConfigError(
        section,
        f"is {name}, which was passed from Python and has no import path",
        f"pass it again, for example metadist.load(RUN_DIR, {section}=...)",
    )
