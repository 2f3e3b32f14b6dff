"""The learners an experiment may choose, with their hyper-parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from metadist.config.section import CustomConfig, Fraction, Natural, Positive, PythonConfig, Rate, Section

Loss = Annotated[
    str,
    Field(
        pattern=r"^(auto|cross_entropy|binary_cross_entropy|mse|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$",
        description="auto (by the targets' type), cross_entropy, binary_cross_entropy, mse, or "
        "package.module:function(output, target)",
    ),
]
Metric = Literal["accuracy", "auc", "mean_squared_error", "mean_absolute_error", "ndcg"]


class Judged(Section):
    """Fields of every learner."""

    loss: Loss = "auto"
    metric: Literal["auto"] | Metric = Field(
        "auto", description="what tasks are judged by; auto: what goes with the loss"
    )


class InnerLoop(Judged):
    """Fields of every learner that adapts by gradient steps."""

    inner_lr: Rate = Field(0.01, description="step size of the inner loop")
    inner_steps: Positive = Field(1, description="gradient steps of the inner loop in training")
    evaluation_inner_steps: Positive | None = Field(None, description="the same in evaluation; null: as in training")


class SGDConfig(Section):
    """Plain gradient descent."""

    type: Literal["sgd"] = "sgd"
    learned: bool = Field(False, description="learn the step size, one number for all parameters")


class MomentumConfig(Section):
    """Gradient descent with momentum."""

    type: Literal["momentum"] = "momentum"
    momentum: Fraction = Field(0.9, description="how much of the step before is kept")
    nesterov: bool = Field(False, description="look ahead along the step before")
    learned: bool = Field(False, description="learn the momentum and the step size")


class AdamConfig(Section):
    """Steps of about the same size for every number."""

    type: Literal["adam"] = "adam"
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="how much of the mean gradient and of the mean squared gradient is kept"
    )
    eps: Rate = Field(1e-8, description="size of gradients below which steps shrink")
    learned: bool = Field(False, description="learn both betas and the step size")


class ByOptimizer(InnerLoop):
    """Fields of every learner whose inner steps may be made by an optimizer."""

    inner_optimizer: Annotated[SGDConfig | MomentumConfig | AdamConfig, Field(discriminator="type")] = Field(
        default_factory=SGDConfig, description="what an inner step makes of a gradient; starts anew with each task"
    )


class SecondOrder(ByOptimizer):
    """Fields of every learner that can leave out second derivatives."""

    first_order: bool = Field(False, description="leave out the second derivatives")


class WithHead(SecondOrder):
    """Fields of every learner that treats the last layer apart."""

    head: str | None = Field(None, description="name of the model's last layer; null: the linear layer defined last")


class MAMLConfig(SecondOrder):
    """Model-agnostic meta-learning, exact second order; `first_order: true` for its approximation."""

    type: Literal["maml"] = "maml"
    adapted: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="patterns of the parameters that the inner loop changes, such as head.*; null: all"
    )
    inner_lr_for: Positive | None = Field(
        None, description="support examples that inner_lr is meant for: of fewer the inner loop learns less; null: any"
    )


class ANILConfig(WithHead):
    """MAML that adapts the last layer alone: nearly as good, several times cheaper."""

    type: Literal["anil"] = "anil"


class BOILConfig(WithHead):
    """MAML that adapts all but the last layer: features must move, good where domains differ."""

    type: Literal["boil"] = "boil"


class MetaSGDConfig(SecondOrder):
    """MAML with a learned inner rate for every parameter."""

    type: Literal["meta_sgd"] = "meta_sgd"


class MAMLPlusPlusConfig(ByOptimizer):
    """MAML++: learned rates a layer and step, multi-step loss, per-step BatchNorm; steadier over many steps."""

    type: Literal["mamlpp"] = "mamlpp"
    inner_steps: Positive = Field(5, description="gradient steps of the inner loop in training")
    learned_rates: bool = Field(True, description="learn an inner rate for each layer and step")
    multi_step_loss_updates: Natural = Field(
        1000, description="meta-updates until only the last step's query loss counts; 0: from the start"
    )
    first_order_updates: Natural = Field(0, description="meta-updates by first-order gradients at the start")
    per_step_norm: bool = Field(True, description="BatchNorm weights and biases of their own for each inner step")


class CAVIAConfig(SecondOrder):
    """Adapts a small context vector that modulates the network: little to adapt, hard to overfit."""

    type: Literal["cavia"] = "cavia"
    inner_lr: Rate = Field(1.0, description="step size of the inner loop")
    context_size: Positive = Field(5, description="numbers of the context")
    layer: str | None = Field(None, description="name of the layer it modulates; null: the first with weights")
    modulation: Literal["shift", "film"] = Field("shift", description="add to the layer's output, or scale it as well")


class ReptileConfig(ByOptimizer):
    """Walks towards each task's adapted parameters: no second derivatives, no query set, long inner loops."""

    type: Literal["reptile"] = "reptile"
    inner_steps: Positive = Field(5, description="gradient steps of the inner loop in training")
    inner_batch_size: Positive | None = Field(None, description="support examples of an inner step; null: all")


class IMAMLConfig(ByOptimizer):
    """Implicit MAML: meta-gradient by conjugate gradient at the end of a long, proximal inner loop."""

    type: Literal["imaml"] = "imaml"
    inner_lr: Rate = Field(0.1, description="step size of the inner loop")
    inner_steps: Positive = Field(16, description="gradient steps of the inner loop in training")
    proximity: Rate = Field(2.0, description="pull towards the initialisation, lambda")
    cg_steps: Positive = Field(5, description="steps of conjugate gradient; its residual is logged as cg_residual")


class ProtoMAMLConfig(WithHead):
    """MAML whose last layer starts from the classes' prototypes: any number of ways, strong with few steps."""

    type: Literal["protomaml"] = "protomaml"


class ProtoNetConfig(Judged):
    """Prototypical networks: the nearest class mean in a learned embedding; no inner loop, fast."""

    type: Literal["protonet"] = "protonet"
    distance: Literal["euclidean", "cosine"] = Field("euclidean", description="of query and prototype")


class MatchingNetConfig(Judged):
    """Matching networks: attention over the support examples in a learned embedding; no inner loop, fast."""

    type: Literal["matchingnet"] = "matchingnet"
    sharpness: Rate = Field(10.0, description="factor of the cosine similarities before the softmax; 1 in the paper")
    full_context: bool = Field(False, description="embeddings that see the whole support set, by LSTMs over it")
    reads: Positive = Field(3, description="how often a query reads the support set for that")


class Evolution(InnerLoop):
    """Fields of every learner that estimates its meta-gradient from perturbations."""

    sigma: Rate = Field(0.05, description="standard deviation of the perturbations")
    pairs: Positive = Field(8, description="perturbations of each task, each with both signs")


class ESConfig(Evolution):
    """Evolution strategies: meta-gradient from losses alone, for inner loops that cannot be differentiated."""

    type: Literal["es"] = "es"


class PESConfig(Evolution):
    """Persistent evolution strategies: unbiased over long inner loops cut into short truncations; small models."""

    type: Literal["pes"] = "pes"
    inner_steps: Positive = Field(10, description="gradient steps of a truncation, of which each meta-update makes one")
    horizon: Positive = Field(100, description="gradient steps of the whole inner loop, a multiple of inner_steps")
    evaluation_inner_steps: Positive | None = Field(None, description="steps in evaluation; null: the horizon")
    learned_rate: bool = Field(True, description="learn the inner rate of each parameter tensor")

    @model_validator(mode="after")
    def _whole_truncations(self) -> PESConfig:
        if self.horizon % self.inner_steps:
            raise ValueError(f"horizon is {self.horizon}; make it a multiple of inner_steps, {self.inner_steps}")
        return self


class MANNConfig(Judged):
    """Memory-augmented network: reads an episode as one sequence, binds inputs to labels in a memory; no inner loop."""

    type: Literal["mann"] = "mann"
    controller: Literal["lstm", "feedforward"] = "lstm"
    controller_size: Positive = Field(200, description="numbers of the controller's state")
    memory: Literal["lrua", "none"] = Field(
        "lrua", description="least recently used access, or none, which leaves the controller alone"
    )
    memory_slots: Positive = Field(128, description="rows of the memory")
    memory_width: Positive = Field(40, description="numbers of a row")
    read_heads: Positive = Field(4, description="reads of a step; each head writes as well")
    usage_decay: Annotated[float, Field(ge=0, le=1)] = Field(0.99, description="of slots' usage from step to step")
    sharpness: Rate = Field(10.0, description="factor of the cosine similarities before the softmax; 1 in the paper")


class SNAILConfig(Judged):
    """SNAIL: temporal convolutions and attention over the support set with the query appended; no inner loop."""

    type: Literal["snail"] = "snail"
    filters: Positive = Field(128, description="numbers that each dense block adds")
    attention_size: Annotated[int, Field(ge=2)] = Field(64, description="numbers of the first attention block's keys")


class CustomAlgorithmConfig(CustomConfig):
    """An Algorithm of your own, named by import_path."""


AlgorithmConfig = Annotated[
    MAMLConfig
    | ANILConfig
    | BOILConfig
    | MetaSGDConfig
    | MAMLPlusPlusConfig
    | CAVIAConfig
    | ReptileConfig
    | IMAMLConfig
    | ProtoMAMLConfig
    | ProtoNetConfig
    | MatchingNetConfig
    | ESConfig
    | PESConfig
    | MANNConfig
    | SNAILConfig
    | CustomAlgorithmConfig
    | PythonConfig,
    Field(discriminator="type"),
]
