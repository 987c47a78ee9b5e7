"""The part of the tree that says how a model is trained: ``train:``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ray_moe.config_methods import OF_GATES, AuxiliaryConfig, GateOptions, MethodsConfig
from ray_moe.config_types import Count, Devices, File, Number, Seconds, Section, absolute_if_here


def _data(name: str) -> str:
    """Where the data is, for workers in another folder; `stdlib` is no folder even where there is one of that name."""
    return name if name == "stdlib" else absolute_if_here(name)


Data = Annotated[str, AfterValidator(_data)]
Positive = Annotated[float, Field(gt=0), Number]
NotNegative = Annotated[float, Field(ge=0), Number]
Steps = Annotated[int, Field(ge=0), Number]


def _offload(value: object) -> object:
    """What this setting was before it had a third value."""
    return {"true": "cpu", "false": "none"}.get(str(value).lower(), value)


class ParallelConfig(Section):
    """How many processes share the work. Any checkpoint goes on with other numbers."""

    data: Count = 1
    """Workers: each has the whole backbone and its own micro-batches."""
    min_data: Count | None = None
    """Fewest workers to begin with when there is no room for `data`, and to go on with when nodes are lost (Ray Train's
    elastic workers; they come back with the nodes). A step always has `data * train.micro_batches` micro-batches, which
    are dealt to the workers there are: fewer take longer, and learn the same. `data` when not set."""
    expert: Count | None = None
    """Expert actors; `experts.num_actors` when not set."""
    tensor: Count | None = None
    """Parts that each expert is cut into, on different actors where there are as many; `experts.tensor` when not set. A
    service that runs has the number that it was started with."""
    replicas: Count = 1
    """Actors that share the rows of each expert."""

    @model_validator(mode="after")
    def _ordered(self) -> ParallelConfig:
        if self.min_data is not None and self.min_data > self.data:
            raise ValueError(f"min_data is {self.min_data} and data is {self.data}; swap them")
        return self


class OptimizerConfig(Section):
    """What steps the weights, of the backbone and of the experts alike."""

    kind: Literal["adamw", "sgd", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its state in 8 bits (`pip install 'ray-moe[train8bit]'`)."""
    lr: Positive = 1e-3
    """Highest learning rate."""
    betas: tuple[NotNegative, NotNegative] = (0.9, 0.999)
    """Of AdamW."""
    eps: NotNegative = 1e-8
    """Of AdamW."""
    weight_decay: NotNegative = 0.0
    """Decoupled from the gradient, as AdamW has it."""
    momentum: NotNegative = 0.0
    """Of SGD."""
    nesterov: bool = False
    """Of SGD with momentum."""
    no_decay: tuple[str, ...] = ("*norm*", "*bias*")
    """Patterns of names of parameters that have no weight decay."""
    offload: Annotated[Literal["none", "cpu", "disk"], BeforeValidator(_offload)] = "none"
    """`cpu` (or `true`): keep master weights and optimizer state on the CPU. `disk`: keep them, and snapshots of
    experts (`snapshot_every`), in files without a name that end with their process; those of one parameter are in
    memory while it is stepped, on the CPU. The numbers are those of steps on the CPU."""
    offload_folder: File = ""
    """Folder on a disk of each node for `disk`; empty is the system's for temporary files, or /var/tmp where that is in
    memory. It needs room for the optimizer's state and, with snapshots, a few times as much as the whole state."""
    fused: bool = False
    """One kernel for the whole update: quicker, and different in the last bit."""


class ScheduleConfig(Section):
    """How the learning rate goes."""

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    """After the warm-up; `linear`, `cosine` and `wsd` end with `train.steps`."""
    warmup_steps: Steps = 0
    """Steps in which it rises from 0."""
    decay_steps: Steps | None = None
    """Of `wsd`: in so many last steps it falls."""
    final_ratio: Annotated[float, Field(ge=0, le=1), Number] = 0.0
    """Part of the highest that is left at the end."""


class LoraConfig(Section):
    """Low-rank adapters on the backbone (`pip install 'ray-moe[lora]'`): its own weights stay as they are. What is
    published or exported has the adapters in its weights."""

    rank: Count = 8
    """Of the product that is added to a layer's weights."""
    alpha: Positive = 16.0
    """Divided by the rank it is what the product is multiplied by."""
    dropout: Annotated[float, Field(ge=0, lt=1), Number] = 0.0
    """Of what goes into the adapters."""
    experts: bool = False
    """Whether experts have adapters of that rank as well, beside each of their matrices (without `dropout`), and their
    weights stay as they are; false trains them whole."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("*self_attn*",)
    """Patterns of names of the backbone's linear layers that get one."""


class CheckpointsConfig(Section):
    """Checkpoints of training: a folder for each, readable with any number of actors and workers."""

    folder: File = ""
    """Where they are, on a disk that all nodes share; empty saves none. A run that finds some goes on from the last."""
    every: Count = 500
    """Steps from one to the next; the last step is always saved."""
    keep: Count | None = 2
    """How many stay; null keeps all."""


class TrainConfig(Section):
    """Training on the expert actors: `ray-moe train`, `ray_moe.train`, and the service's training calls."""

    data: Data | tuple[Data, ...] = ()
    """What to learn from: files, folders, globs, JSON Lines with a `text` in each line, `stdlib` (the sources of
    Python's own library), or `module:function`, which is asked for each batch."""
    steps: Count = 1000
    """Steps of the whole run."""
    batch_size: Count = 8
    """Windows of a micro-batch."""
    micro_batches: Count = 1
    """Of each worker in a step; their gradients are added up."""
    sequence_length: Annotated[int, Field(ge=2), Number] = 256
    """Tokens of a window."""
    validation_every: Steps = 0
    """Steps between two looks at the loss of documents that are kept apart; 0 never looks."""
    validation_batches: Count = 8
    """Micro-batches that each worker looks at for it."""
    seed: Steps = 0
    """Of the order of the data, and of whatever is random in a step."""
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "train"
    """Name of the run: a run of the same name goes on where the other one stopped."""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    gate: GateOptions = Field(default_factory=dict)
    """Another gate in the place of the model's routers, by its name (docs/methods/gates.md) or, one of your own, as
    `module:Class` (docs/how-to/add-a-gate.md), alone or with options: `{name: noisy_topk, top_k: 2}`; `top_k` is the
    model's own when not said. Empty keeps the routers. What is trained can be published or exported only where the gate
    is, in evaluation, what these routers are; that is checked."""
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    methods: MethodsConfig = MethodsConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    serve: bool = False
    """Whether the same actors answer requests meanwhile, with the weights that were published last."""
    publish_every: Steps = 0
    """Steps from one published version to the next; 0 publishes none. Needs `serve` and `publish_folder`."""
    publish_folder: File = ""
    """Where published versions are written as Hugging Face checkpoints, on a disk that all nodes share, for this
    service alone: each time those are removed that it does not hold any more (`versions.keep`)."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradients, over backbone and experts; null does not clip."""
    freeze: tuple[str, ...] = ()
    """Patterns of names of the backbone's parameters that are not trained; `*` trains the experts alone."""
    lora: LoraConfig | None = None
    """Train adapters on the backbone instead of its weights."""
    quantization: Literal["none", "int8"] = "none"
    """`int8`: the matrices of experts are 8 bits between steps and in all products; what is trained is what
    `experts.quantization: int8` serves. Their rows are computed again going backward, as with `recompute`."""
    compensation: Literal["none", "int8", "bfloat16"] = "int8"
    """With `quantization`: what is kept of what rounding takes away, for the next step (error feedback); a byte or two
    for each weight. Without it small updates are lost."""
    gradient_checkpointing: bool = False
    """Compute the backbone's activations again when going backward, instead of keeping them."""
    recompute: bool = False
    """Likewise in the expert actors."""
    wire: Literal["same", "float16", "bfloat16", "int8"] = "same"
    """What hidden states, rows and their gradients are sent as; `int8` has a scale for each row, and is a fourth of the
    bytes of float32."""
    in_flight: Count = 1
    """Micro-batches that each worker computes at a time: while the rows of one are with the experts, it is at another.
    Each takes memory for its activations and gradients. Sums are the same in whatever order they end, but what a model
    draws at random (dropout) depends on it from 2 on."""
    gradient_compression: Literal["none", "1bit"] = "none"
    """How gradients of weights travel: with `1bit`, from replicas of an expert to its owner in one bit a number (a 25th
    to a 31st of the bytes, the wider the model, the fewer), and those of the rest of the model between workers in four
    (a seventh). What that leaves out is added to the gradients of the next step (error feedback). What a process that
    is lost, or a run that is taken up from a checkpoint, had left out is not made good. Snapshots travel whole: set
    `snapshot_every` to more than 1."""
    compression_warmup_steps: Steps | None = None
    """First steps whose gradients travel whole in spite of `gradient_compression`, until Adam's moments have settled; a
    fifth of `steps` when not set. With fewer the loss ends higher."""
    snapshot_every: Steps = 1
    """After so many steps each actor's weights and optimizer state are copied to another actor's memory, so that the
    loss of one costs no more than those steps, which are made again; 0 relies on checkpoints alone."""
    report_every: Count = 1
    """Steps between two reports (progress, TensorBoard, Ray Train)."""
    num_cpus: Devices = 1
    """CPUs that Ray reserves for each worker, and for the actor that trains as clients ask."""
    num_gpus: Devices = 0
    """GPUs, likewise; fractions up to 1 are allowed."""
    num_threads: Count = 1
    """Threads that each worker computes with."""
    call_timeout_s: Seconds = 60
    """An actor that has answered nothing of a batch for so long is taken for lost; one that is as late with anything
    else is looked at, and started anew if it hangs."""
    max_failures: Annotated[int, Field(ge=-1), Number] = 3
    """How often workers are started again after some were lost; -1 is without end."""
    logs: File = ""
    """Folder for TensorBoard's event files; empty writes none."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.lora is not None and self.freeze:
            raise ValueError("lora trains adapters alone, so freeze has nothing to say: leave it out")
        if not self.gate and (told := [name for name in OF_GATES if name in self.auxiliary.coefficients]):
            raise ValueError(f"auxiliary.{told[0]} is a loss of some gates, and gate names none: name one, or leave it")
        return self


def check_experts(train: TrainConfig, tensor: int) -> None:
    """Raises: `ValueError` where experts (in `tensor` parts each) are to have adapters or 8 bits and cannot."""
    if tensor > 1 and train.lora is not None and train.lora.experts:
        raise ValueError(
            f"experts are in {tensor} parts, each of which would learn an adapter of its own; set train.lora.experts "
            "to false, or experts.tensor (train.parallel.tensor) to 1"
        )
    if train.quantization == "none":
        return
    for name, is_set in (
        ("experts.tensor (train.parallel.tensor)", tensor > 1),
        ("train.lora.experts", train.lora is not None and train.lora.experts),
        ("train.optimizer.offload", train.optimizer.offload != "none"),
    ):
        if is_set:
            raise ValueError(
                f"train.quantization is {train.quantization}, which {name} does not go with: leave one of them out"
            )
