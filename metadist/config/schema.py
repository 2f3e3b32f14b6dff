"""What an experiment may say. Each family's members are told apart by ``type``.

The first line of a class docstring is what ``metadist check --list`` prints for it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Discriminator, Field, Tag, field_validator, model_validator

from metadist.config.algorithms import AlgorithmConfig, Metric
from metadist.config.section import CustomConfig, Fraction, Natural, Positive, PythonConfig, Rate, Section

# --------------------------------------------------------------------------- tasks


class ClassTasks(Section):
    """Fields of every few-shot classification source."""

    ways: Annotated[int, Field(ge=2)] = Field(5, description="classes of an episode")
    shots: Positive = Field(1, description="support examples of each class")
    query_shots: Positive = Field(1, description="query examples of each class")
    order: Literal["by_class", "within_sets", "shuffled"] = Field(
        "by_class",
        description="of the examples: class by class; support and query shuffled, each in itself; or all shuffled "
        "together, the first ways x shots of them being the support set",
    )
    labels: Literal["index", "letters"] = Field(
        "index", description="class numbers, or strings of five letters drawn anew for each episode"
    )


class GlyphTasksConfig(ClassTasks):
    """Letters of many scripts drawn from fonts that come with matplotlib; no download."""

    type: Literal["glyphs"] = "glyphs"


class SinusoidTasksConfig(Section):
    """Sine waves of random amplitude and phase to regress (Finn et al. 2017, section 5.1)."""

    type: Literal["sinusoid"] = "sinusoid"
    shots: Positive = Field(10, description="support points of a wave")
    query_shots: Positive = Field(10, description="query points of a wave")


class UniformSamplerConfig(Section):
    """Any classes of the split, any examples of each."""

    type: Literal["uniform"] = "uniform"


class WindowSamplerConfig(Section):
    """A moving window over shuffled class blocks, for sets larger than memory."""

    type: Literal["window"] = "window"
    blocks: Positive = Field(300, description="class blocks held at once (W)")
    reuse: Rate = Field(0.5, description="slots the window moves on after each episode (r)")


SamplerConfig = Annotated[UniformSamplerConfig | WindowSamplerConfig, Field(discriminator="type")]


class AugmentationConfig(Section):
    """Random changes to the pictures of the training split."""

    mirror: bool = Field(False, description="each class of a task left to right or not: a mirrored class is a new one")
    shift: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="moved either way, as a part of the side")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="turned either way, in degrees")
    zoom: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="logarithm of the factor of size, either way")


class ShardTasksConfig(ClassTasks):
    """Episodes streamed from a shard set written by `metadist data pack`."""

    type: Literal["shards"] = "shards"
    path: str = Field(description="the shard set's directory")
    sampler: SamplerConfig = UniformSamplerConfig()
    rotations: Literal["none", "classes", "task"] = Field(
        "none",
        description="quarter turns: of no use, as classes of their own, or one drawn for each class of a task",
    )
    resident: bool | Literal["auto"] = Field("auto", description="hold the split in memory")
    train_split: str = Field("train", description="the split to meta-train on")
    augmentation: AugmentationConfig = AugmentationConfig()
    on_bad: Literal["error", "skip"] = Field(
        "error", description="blocks that are cut, altered or no pictures end the run, or are left out from its start"
    )
    most_bad: Fraction = Field(0.01, description="with on_bad: skip, the share of the blocks that may be left out")
    left_out: tuple[Annotated[str, Field(pattern=r"^c\d+-\d+$")], ...] | None = Field(
        None, description="the blocks that are left out; null: with on_bad: skip they are looked for when a run begins"
    )


class TextTasksConfig(ClassTasks):
    """Episodes of sentences from a shard set of texts, written by `metadist data pack csv`."""

    type: Literal["texts"] = "texts"
    path: str = Field(description="the shard set's directory")
    tokens: Literal["words", "subwords", "bytes"] = Field(
        "words",
        description="words, numbered by a hash: no vocabulary is kept; words and their parts of three characters, for "
        "words that training never met; or the bytes of the text",
    )
    length: Positive = Field(32, description="tokens of a text; a longer one is cut")
    vocabulary: Annotated[int, Field(ge=2)] = Field(8192, description="numbers of words; two share one by chance")
    renamed: Fraction = Field(
        0.0,
        description="chance that a word is another one throughout an episode of training: for classes to come, whose "
        "words training has not met, a learner must not rely on those of the training classes",
    )
    train_split: str = Field("train", description="the split to meta-train on")
    outsiders_from: str | None = Field(
        None, description="the split of evaluation.outsiders; null: other classes of the split that is evaluated"
    )


class RatingTasksConfig(Section):
    """A user's ratings to come, from the first ones; written by `metadist data pack ratings`."""

    type: Literal["ratings"] = "ratings"
    path: str = Field(description="the shard set's directory")
    shots: Positive = Field(10, description="ratings of a user that are known")
    query_shots: Positive = Field(10, description="ratings that come next")
    items: bool = Field(True, description="whether an item has a vector itself, beside its features")
    least: Positive | None = Field(None, description="ratings of a user at the least; null: shots + query_shots")
    train_split: str = Field("train", description="the split to meta-train on")


class CustomTasksConfig(CustomConfig):
    """A TaskSource of your own, named by import_path."""


TasksConfig = Annotated[
    GlyphTasksConfig | SinusoidTasksConfig | ShardTasksConfig | TextTasksConfig | RatingTasksConfig
    | CustomTasksConfig | PythonConfig,
    Field(discriminator="type"),
]

# --------------------------------------------------------------------------- model

BatchNormMode = Annotated[
    Literal["transductive", "inductive", "running", "stored"],
    Field(
        description="whose statistics BatchNorm takes for the query set: its own, the support set's, running "
        "averages of training, one for each inner step, or those that a pretrained network came with"
    ),
]


class ModelSection(Section):
    """A field of every model."""

    batchnorm: BatchNormMode = "transductive"


class Conv4Config(ModelSection):
    """Four convolution blocks with BatchNorm, the usual few-shot image network."""

    type: Literal["conv4"] = "conv4"
    filters: Positive = Field(64, description="channels of each block")
    downsample: Literal["stride", "max_pool"] = Field(
        "stride", description="how a block halves its input: stride-2 convolution (Omniglot) or 2x2 max pooling"
    )


class ResNet12Config(ModelSection):
    """Four residual blocks of three convolutions, for colour pictures (mini-ImageNet and the like)."""

    type: Literal["resnet12"] = "resnet12"
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (64, 160, 320, 640), description="channels of each block; each halves its input"
    )


class MLPConfig(ModelSection):
    """A multi-layer perceptron with ReLU."""

    type: Literal["mlp"] = "mlp"
    hidden: tuple[Positive, ...] = Field((40, 40), description="sizes of the hidden layers")


class TextBagConfig(ModelSection):
    """Embedded tokens, weighted by what is learned of each and summed: for classes whose words are new."""

    type: Literal["text_bag"] = "text_bag"
    embedding: Positive = Field(512, description="numbers of a token's vector")


class TextConvConfig(ModelSection):
    """Convolutions over embedded tokens, the largest answer of each over the sentence (Kim 2014)."""

    type: Literal["text_conv"] = "text_conv"
    embedding: Positive = Field(64, description="numbers of a token's vector")
    filters: Positive = Field(64, description="of each width")
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (1, 2, 3), description="tokens that a filter sees"
    )


class TextTransformerConfig(ModelSection):
    """A small transformer over embedded tokens, the mean of its answers."""

    type: Literal["text_transformer"] = "text_transformer"
    embedding: Positive = Field(64, description="numbers of a token's vector, a multiple of heads")
    layers: Positive = 2
    heads: Positive = 4

    @model_validator(mode="after")
    def _whole_heads(self) -> TextTransformerConfig:
        if self.embedding % self.heads:
            raise ValueError(f"embedding is {self.embedding}, which {self.heads} heads cannot share")
        return self


class RatingModelConfig(ModelSection):
    """Vectors of items and features, summed, and a perceptron that decides (Lee et al. 2019)."""

    type: Literal["rating"] = "rating"
    embedding: Positive = Field(32, description="numbers of a vector")
    hidden: tuple[Positive, ...] = Field((64, 64), description="sizes of the perceptron's layers")
    mean: float | None = Field(None, description="what is said of an unknown item; null: the mean of some ratings")


class BackboneConfig(ModelSection):
    """A pretrained network of timm or torchvision that is on this disk, and a last layer of its own, `head`."""

    type: Literal["backbone"] = "backbone"
    batchnorm: BatchNormMode = "stored"
    library: Literal["timm", "torchvision"]
    name: str = Field(description="of the network in that library, such as resnet18")
    weights: str | None = Field(None, description="file of its parameters, .safetensors or .pth; null: random ones")
    size: Positive | None = Field(None, description="side in pixels to which pictures are scaled; null: as they are")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="of channels, of pictures in [0, 1]")
    std: tuple[Rate, Rate, Rate] = Field((0.229, 0.224, 0.225), description="of the channels")


class FlattenConfig(ModelSection):
    """No network: the inputs themselves as features, for learners with a memory of their own."""

    type: Literal["flatten"] = "flatten"
    size: Positive | None = Field(None, description="height and width to which pictures are averaged down; null: as is")


class CustomModelConfig(CustomConfig, ModelSection):
    """A torch.nn.Module of your own, named by import_path."""


class PythonModelConfig(PythonConfig, ModelSection):
    """A function passed to `metadist.train` that makes the module."""


ModelConfig = Annotated[
    Conv4Config | ResNet12Config | MLPConfig | TextBagConfig | TextConvConfig | TextTransformerConfig
    | RatingModelConfig | BackboneConfig | FlattenConfig
    | CustomModelConfig | PythonModelConfig,
    Field(discriminator="type"),
]

# --------------------------------------------------------------------------- engine, outer loop


LONG_RUN = 5000
"""Meta-updates from which on a minute of compilation is repaid by small networks (tools/bench/choice.py)."""


class EngineConfig(Section):
    """How the inner loops of a microbatch are executed; every strategy gives the same gradient."""

    strategy: Literal["auto", "vectorised", "adjoint", "loop"] = Field(
        "auto",
        description="vectorised: all tasks of a microbatch at once; adjoint: one by one without a second-order "
        "graph; loop: plain automatic differentiation, for modules the others cannot take",
    )
    compile: bool | Literal["auto", "trace"] = Field(
        "auto",
        description="trace: derive the vectorised meta-gradient once and run its operators alone, some seconds at the "
        "start of each worker; true: compile them as well (inductor), a minute or two, worth it in long runs of "
        "networks of many small operators and on GPUs; false: neither; auto: true where the run has "
        f"{LONG_RUN} steps or more, on a CPU for networks without convolutions alone, else trace",
    )
    recompute: bool = Field(
        False,
        description="in what is traced or compiled, compute each inner step again on the way back: slower, with the "
        "memory of one step in place of all",
    )
    memory: Annotated[ByteSize, Field(gt=0)] | None = Field(
        None,
        description="the most that computing a microbatch may take beside the model, such as 4GB: steps are recomputed "
        "and fewer tasks computed together until what is predicted is within it; null: no bound",
    )
    tasks_together: Positive | None = Field(
        None, description="tasks of a microbatch that are computed in one call; null: all; engine.memory may lower it"
    )
    convolution: Literal["auto", "direct", "columns", "winograd"] = Field(
        "auto",
        description="direct: torch's own; columns: products of matrices for small pictures; winograd: 3x3 convolutions "
        "of stride 1 with a quarter of the products, and others summed in registers; auto: winograd where the "
        "meta-gradient is traced or compiled for a CPU, columns where it is for a GPU, direct elsewhere",
    )
    fused_norm: bool | Literal["auto"] = Field(
        "auto", description="BatchNorm with the ReLU and max pooling after it as one operator, where it can be built"
    )
    precision: Literal["float32", "tf32", "float64", "bfloat16"] = Field(
        "float32",
        description="bfloat16: the factors of convolutions and products alone, in the inner loop and its derivatives; "
        "parameters, normalisation, losses and the sums of gradients stay float32; tf32: the same factors with ten "
        "bits, by a GPU alone, and as float32 on a CPU",
    )


class OuterConfig(Section):
    """The meta-update."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Rate = 1e-3
    momentum: Fraction = Field(0.0, description="for sgd")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of lr over steps; linear and cosine end at zero"
    )
    warmup_steps: Natural = Field(0, description="steps over which lr rises from zero")
    clip_norm: Rate | None = Field(None, description="largest global norm of the meta-gradient")
    frozen: tuple[str, ...] = Field(
        (), description="patterns of what stays as it began, such as body.*: a pretrained backbone, say"
    )
    steps: Positive = Field(1000, description="meta-updates of the whole run")
    meta_batch_size: Positive = Field(32, description="tasks of a meta-update, all workers together")
    tasks_per_microbatch: Positive | Literal["auto"] = Field(
        "auto", description="tasks computed in one call; auto: an eighth of the meta-batch"
    )

    @model_validator(mode="after")
    def _resolve(self) -> OuterConfig:
        if self.tasks_per_microbatch == "auto":
            # Never a function of the workers: the microbatch fixes the bits of the sum.
            object.__setattr__(self, "tasks_per_microbatch", -(-self.meta_batch_size // 8))
        elif self.tasks_per_microbatch > self.meta_batch_size:
            raise ValueError(
                f"tasks_per_microbatch is {self.tasks_per_microbatch}, more than the meta_batch_size of "
                f"{self.meta_batch_size}; lower it or write auto"
            )
        return self


# --------------------------------------------------------------------------- where and how it runs


class WorkersRange(Section):
    """Workers that come and go with the cluster: `{min: 2, max: 16}`."""

    min: Positive = Field(1, description="the run begins when so many are ready; afterwards one is enough")
    max: Positive = Field(description="as many are asked for, of an autoscaler too; each begins when there is room")

    @model_validator(mode="after")
    def _in_order(self) -> WorkersRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, which is {self.max}")
        return self


def _arm_of_workers(value: Any) -> str:
    if isinstance(value, str):
        return "literal"
    return "range" if isinstance(value, (dict, WorkersRange)) else "int"


Workers = Annotated[
    Annotated[Positive, Tag("int")]
    | Annotated[Literal["auto"], Tag("literal")]
    | Annotated[WorkersRange, Tag("range")],
    Discriminator(_arm_of_workers),
]


class RuntimeConfig(Section):
    """Where the workers are: `ray` (actors on this machine or a cluster) or `local` (this process)."""

    type: Literal["ray", "local"] = "ray"
    workers: Workers = Field(
        "auto",
        description="worker processes; auto: one a GPU, else one a CPU, also of nodes that join later; {min, max}: "
        "between these, and a cluster that grows is asked for the most",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="GPUs of each worker, fractions allowed; auto: one where there are any"
    )
    threads_per_worker: Positive = Field(1, description="CPU threads of each worker; changes the last bits")
    address: str | None = Field(
        None, description="a running cluster that this machine is a node of (auto, HOST:PORT); null: start one here"
    )
    topology: Literal["server", "allreduce", "allreduce_unordered"] = Field(
        "server",
        description="who makes the update: a parameter server; or the workers between them, by torch.distributed, "
        "for a fixed number of them (when one dies the run goes back to its last checkpoint): in the server's order, "
        "with the same bits, or in any order, which is not reproducible",
    )
    server_shards: Positive = Field(
        1, description="actors that the parameter server is cut into, for models of 100 MB and more; changes no bit"
    )
    node_sums: bool = Field(
        False,
        description="gradients are summed on each node before they go to the server, for nodes with many workers and "
        "little network; changes no bit",
    )
    wire: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="numbers in which gradients travel to the server: bfloat16 halves the bytes, each worker sending "
        "with its next gradient what rounding took from the last; the run is not reproducible then",
    )
    transport: Literal["auto", "object_store", "nixl"] = Field(
        "auto",
        description="the way of gradients to the server: memory that the processes of a node share, and Ray's object "
        "store between nodes; the object store alone; or NIXL, for nodes that are joined by RDMA, which wants the "
        "package nixl on each; changes no bit",
    )
    max_staleness: Natural = Field(
        0,
        description="versions by which a gradient may lag when it is applied; 0: every update waits for its whole "
        "meta-batch, and nothing depends on who computes what; above: an update is made as soon as enough has come",
    )
    staleness_weighting: Literal["constant", "inverse"] = Field(
        "constant", description="what a gradient that lags by s versions counts for: 1, or 1 / (1 + s)"
    )
    microbatches_per_update: Positive | None = Field(
        None, description="with max_staleness: answers that make an update; null: as many as a meta-batch has"
    )
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="part of a meta-batch's microbatches with which an update is made; the late ones are left out"
    )
    lease_timeout_s: Rate = Field(
        600.0,
        description="silence after which a worker is taken to hang and is replaced; six times as long for its first "
        "answer. Microbatches that are merely late are given to idle workers as well, by what the run has learned",
    )
    start_timeout_s: Rate = Field(
        900.0,
        description="how long the workers that a run needs to begin are waited for, since the last of them came: a "
        "cluster may have to make their nodes, and these to fetch an image",
    )
    worker_logs: bool = Field(False, description="show what workers print")
    server_timeout_s: Rate = Field(
        300.0, description="silence after which a server shard is taken to hang, and restored from the last checkpoint"
    )
    max_worker_restarts: Natural = Field(
        20, description="workers that may die within restart_window_s before the run gives up"
    )
    max_server_restarts: Natural = Field(
        5, description="times the server may be lost within restart_window_s before the run gives up"
    )
    restart_window_s: Rate = Field(3600.0, description="seconds over which deaths are counted")

    @model_validator(mode="after")
    def _within_the_cluster(self) -> RuntimeConfig:
        if self.address is None:
            return self
        if self.type == "local":
            raise ValueError("address is for type: ray; write type: ray, or address: null")
        if self.address.startswith("ray://"):
            raise ValueError(
                f"address is {self.address}, of Ray Client, but a run's driver has to be on a machine of the cluster; "
                "write HOST:PORT there, or send a job from anywhere: `metadist submit CONFIG --address http://HOST:8265`"
            )
        return self

    @model_validator(mode="after")
    def _one_mode(self) -> RuntimeConfig:
        if self.max_staleness and self.quorum < 1:
            raise ValueError("quorum is for updates that wait for their meta-batch; write 1.0, or max_staleness: 0")
        if self.microbatches_per_update is not None and not self.max_staleness:
            raise ValueError(
                "microbatches_per_update needs max_staleness above 0; for smaller updates that wait for all of it "
                "lower outer.meta_batch_size"
            )
        if self.wire != "float32" and (self.max_staleness or self.quorum < 1):
            raise ValueError("wire: bfloat16 is for updates that wait for their meta-batch; write wire: float32")
        if self.topology != "server":
            of_a_server = {"max_staleness": 0, "node_sums": False, "server_shards": 1, "wire": "float32"}
            if self.transport == "nixl":
                raise ValueError("transport: nixl is for topology: server; write transport: auto")
            for name, off in of_a_server.items():
                if getattr(self, name) != off:
                    raise ValueError(f"{name} is for topology: server; write {name}: {str(off).lower()}")
            if isinstance(self.workers, WorkersRange):
                raise ValueError("an all-reduce run has a fixed number of workers; write one, or topology: server")
        if self.topology == "allreduce_unordered" and self.quorum < 1:
            raise ValueError("quorum needs an order; write topology: allreduce or server, or quorum: 1.0")
        if self.node_sums and self.max_staleness:
            raise ValueError(
                "node_sums is for updates that wait for their meta-batch; write false, or max_staleness: 0"
            )
        return self


class EvaluationConfig(Section):
    """The honest number: a fixed, seeded set of episodes of classes never trained on."""

    split: str = "test"
    episodes: Positive = 600
    ways: Annotated[int, Field(ge=2)] | None = Field(None, description="classes of an episode; null: as in training")
    shots: Positive | None = Field(None, description="support examples a class; null: as in training")
    query_shots: Positive | None = Field(None, description="query examples a class; null: as in training")
    also: tuple[Metric, ...] = Field((), description="metrics that are reported beside the task's own")
    outsiders: Natural = Field(
        0,
        description="query examples that belong to no class of an episode, to be answered with none of these: reported "
        "is how well confidence tells them from the others (AUROC)",
    )
    every: Natural = Field(0, description="steps between evaluations during training; 0: none")
    validation_split: str = Field("validation", description="the split of the evaluations during training")
    validation_episodes: Positive = 200


class CheckpointConfig(Section):
    """When committed versions are written."""

    every: Positive = Field(500, description="steps between checkpoints")
    keep: Positive = Field(3, description="checkpoints kept, the newest; the best of the evaluations is kept besides")
    path: str | None = Field(
        None, description="a folder, or a URL that fsspec knows (s3://bucket/run); null: RUN_DIR/checkpoints"
    )
    on_error: Literal["continue", "stop"] = Field(
        "continue", description="what a checkpoint that cannot be written means, of a full disk say; the last must be"
    )

    @field_validator("path")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and "://" in value and urlsplit(value).password:
            raise ValueError("holds a password, which would be kept with the run; give it by the environment")
        return value


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online where an account is set up, else offline"
    )
    project: str = "metadist"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    artifacts: bool = Field(
        True, description="when the run is done, send its last and its best checkpoint, as versions of one artifact"
    )


class TrackingConfig(Section):
    """Who is told of the run's progress, besides metrics.jsonl."""

    console: bool = True
    wandb: WandbConfig = WandbConfig()
    prometheus: bool = Field(
        True, description="where the runtime is ray: the figures of each step among Ray's own, for Prometheus"
    )


class Config(Section):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=100)] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tasks: TasksConfig
    model: ModelConfig
    algorithm: AlgorithmConfig
    engine: EngineConfig = EngineConfig()
    outer: OuterConfig = OuterConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("engine", mode="before")
    @classmethod
    def _all_auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value
