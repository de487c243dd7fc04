"""The schema of a run: every setting with its type, range, unit and meaning.

Three readers share these classes: Hydra (types and unknown keys while composing), pydantic
(ranges, in config/rules.py) and people (the string under a field is its documentation, and
docs/configuration.md is made from it). OmegaConf drops the `Annotated` part.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Interval, Len

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def schema(cls: type[T]) -> type[T]:
    """A keyword-only dataclass that pydantic checks without accepting unknown keys."""
    config = {"extra": "forbid", "allow_inf_nan": False}
    cls.__pydantic_config__ = config  # type: ignore[attr-defined]  # pydantic's hook
    return dataclass(kw_only=True)(cls)


PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]


class Task(str, Enum):
    pretrain = "pretrain"
    plan = "plan"
    prepare = "prepare"


class RopeType(str, Enum):
    default = "default"
    linear = "linear"
    llama3 = "llama3"


@schema
class RopeParameters:
    """Rotary position embedding, as transformers' `rope_parameters` names it."""

    rope_type: RopeType = RopeType.default
    """`default`, `linear` (arXiv 2306.15595) or `llama3` (the scaling of LLaMA 3.1 and later)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    factor: PositiveFloat | None = None
    """Context is stretched by this factor; needed by `linear` and `llama3`."""
    low_freq_factor: PositiveFloat | None = None
    """`llama3`: wavelengths above original_max_position_embeddings / this are scaled fully."""
    high_freq_factor: PositiveFloat | None = None
    """`llama3`: wavelengths below original_max_position_embeddings / this are left alone."""
    original_max_position_embeddings: PositiveInt | None = None
    """`llama3`: the context length before it was stretched, in tokens."""


@schema
class Model:
    """The architecture, under the names of transformers' LlamaConfig."""

    name: str = "custom"
    """A label for plans and reports; the shape is what the other fields say."""
    path: str | None = None
    """Directory of a Hugging Face LLaMA checkpoint (config.json and safetensors) to go on from;
    the shape then comes from its config.json. `null` starts from random weights."""
    vocab_size: PositiveInt = 32_000
    """Rows of the embedding matrix; at least the size of the tokenizer."""
    hidden_size: PositiveInt = 4096
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 11_008
    """Width of the SwiGLU feed-forward layer."""
    num_hidden_layers: PositiveInt = 32
    """Number of decoder layers."""
    num_attention_heads: PositiveInt = 32
    """Number of query heads."""
    num_key_value_heads: PositiveInt | None = None
    """Number of key and value heads (grouped-query attention); `null` = num_attention_heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; `null` = hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt = 4096
    """Longest row that the model is made for, in tokens."""
    rms_norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    """Rotary position embedding."""
    tie_word_embeddings: bool = False
    """Whether the output head shares the embedding matrix."""
    attention_bias: bool = False
    """Whether the four attention projections have biases."""
    mlp_bias: bool = False
    """Whether the three feed-forward projections have biases."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities while training."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial normal distribution of linear and embedding weights."""
    resize_embeddings: bool = False
    """Whether a tokenizer larger than vocab_size grows the embeddings; `false` refuses it."""
    pad_embeddings_to_multiple_of: PositiveInt = 8
    """Embeddings that grow are rounded up to a multiple of this many rows."""


class DataName(str, Enum):
    stdlib = "stdlib"
    docstrings = "docstrings"
    text = "text"


@schema
class Data:
    """The corpus and how it becomes rows."""

    name: DataName = DataName.stdlib
    """`stdlib`: the Python standard library's sources where they are installed; `docstrings`:
    English prose from the docstrings of installed packages; `text`: your own files in `paths`."""
    paths: list[str] = field(default_factory=list)
    """Files and globs of .txt (one file = one document), .jsonl and .parquet; `**` recurses."""
    text_field: str = "text"
    """Field of a .jsonl record, or column of a .parquet file, that holds the text."""
    sequence_length: Annotated[int, Ge(2)] = 512
    """Tokens of a row."""
    heldout_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.02
    """Share of documents held out for evaluation, chosen by a hash of each document's text."""
    limit_train_rows: PositiveInt | None = None
    """Use only the first rows of the training split; `null` = all."""
    cache_dir: str = "~/.cache/llama_pretrain"
    """Where tokenizers and tokens are kept, each under the hash of what it was made from."""
    num_workers: NonNegativeInt = 0
    """Loader processes a rank; 0 is the fastest here (docs/log.md)."""


class TokenizerName(str, Enum):
    train = "train"
    pretrained = "pretrained"


@schema
class Tokenizer:
    """How text becomes token ids."""

    name: TokenizerName = TokenizerName.train
    """`train`: a byte-level BPE learnt from the training documents; `pretrained`: from `path`."""
    vocab_size: Annotated[int, Ge(260)] = 32_000
    """`train`: largest number of tokens, the 256 bytes and the special ones included."""
    path: str | None = None
    """`pretrained`: directory with tokenizer.json, as `save_pretrained` writes it."""


class OptimName(str, Enum):
    adamw = "adamw"
    fused_adam = "fused_adam"
    cpu_adam = "cpu_adam"
    torch_adamw = "torch_adamw"


@schema
class Optim:
    """The optimizer: AdamW (arXiv 1711.05101) in one of its implementations."""

    name: OptimName = OptimName.adamw
    """`adamw` chooses: cpu_adam where optimizer state is offloaded, fused_adam on CUDA, else
    torch_adamw. `fused_adam` and `cpu_adam` are DeepSpeed's, `torch_adamw` is torch's fused one."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of warm-up."""
    betas: Annotated[list[float], Len(2, 2)] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the update."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of linear and embedding weights; norms and biases never decay."""


class ScheduleName(str, Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


@schema
class Schedule:
    """The learning rate over the run."""

    name: ScheduleName = ScheduleName.cosine
    """Shape after warm-up; `wsd` = warm-up, stable, decay (arXiv 2404.06395)."""
    warmup_steps: NonNegativeInt | None = None
    """Length of the linear warm-up in optimizer steps; `null` = see warmup_tokens, else none."""
    warmup_tokens: NonNegativeInt | None = None
    """Length of the linear warm-up in tokens, rounded up to whole steps."""
    decay_steps: PositiveInt | None = None
    """`wsd`: length of the final linear decay in optimizer steps; `null` = see decay_tokens."""
    decay_tokens: PositiveInt | None = None
    """`wsd`: length of the final decay in tokens, rounded up; both `null` = a tenth of the run."""
    min_learning_rate_ratio: Fraction = 0.1
    """Learning rate of the last step as a share of the peak (`constant` stays at the peak)."""


@schema
class Batch:
    """global_batch_size = micro_batch_size x gradient_accumulation_steps x ranks, exactly."""

    global_batch_size: PositiveInt | None = None
    """Rows of one optimizer step, over all ranks; `null` = derived from the other two."""
    micro_batch_size: PositiveInt | None = None
    """Rows of one forward pass on one rank; `null` = derived."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forward passes of one rank before an optimizer step; `null` = derived, 1 where open."""


class OffloadDevice(str, Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@schema
class OffloadOptimizer:
    """Optimizer state outside the accelerator."""

    device: OffloadDevice = OffloadDevice.none
    """`none`, `cpu`, or `nvme` (stage 3 only)."""
    nvme_path: str | None = None
    """Folder on a local disk, for `nvme`."""
    pin_memory: bool = False
    """Page-locked host memory: faster copies, cannot be swapped."""
    buffer_count: PositiveInt = 4
    """Buffers for `nvme`; at least the optimizer's states a parameter plus one."""
    ratio: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of the parameters whose state is offloaded (stage 3)."""


@schema
class OffloadParam:
    """Parameters outside the accelerator (stage 3)."""

    device: OffloadDevice = OffloadDevice.none
    """`none`, `cpu` or `nvme`."""
    nvme_path: str | None = None
    """Folder on a local disk, for `nvme`."""
    pin_memory: bool = False
    """Page-locked host memory: faster copies, cannot be swapped."""
    buffer_count: PositiveInt = 5
    """Buffers for `nvme`."""
    buffer_size: PositiveInt = 100_000_000
    """Size of a buffer in elements; at least the largest parameter's."""
    max_in_cpu: NonNegativeInt = 1_000_000_000
    """Elements kept in host memory with `nvme`."""


@schema
class Zero:
    """DeepSpeed's zero_optimization section, under its own names. Sizes are in elements."""

    stage: Annotated[int, Interval(ge=0, le=3)] = 1
    """0: nothing is sharded; 1: optimizer state; 2: + gradients; 3: + parameters."""
    offload_optimizer: OffloadOptimizer = field(default_factory=OffloadOptimizer)
    """Optimizer state outside the accelerator (stages 1 to 3)."""
    offload_param: OffloadParam = field(default_factory=OffloadParam)
    """Parameters outside the accelerator (stage 3)."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass runs; `null` = DeepSpeed's choice for the stage."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they are made, against fragmentation."""
    round_robin_gradients: bool = False
    """Spread the copying of gradients to the host over ranks (stages 1 and 2 with offload)."""
    reduce_bucket_size: PositiveInt = 500_000_000
    """Elements reduced at a time."""
    allgather_bucket_size: PositiveInt = 500_000_000
    """Elements gathered at a time (stages 1 and 2)."""
    sub_group_size: PositiveInt = 1_000_000_000
    """Elements that the optimizer updates at a time (stage 3)."""
    stage3_prefetch_bucket_size: NonNegativeInt = 50_000_000
    """Elements fetched ahead of their use."""
    stage3_param_persistence_threshold: NonNegativeInt = 100_000
    """Parameters with fewer elements stay gathered on every rank."""
    stage3_max_live_parameters: NonNegativeInt = 1_000_000_000
    """Gathered elements allowed at a time."""
    stage3_max_reuse_distance: NonNegativeInt = 1_000_000_000
    """A parameter used again within this many elements is not released."""
    zero_hpz_partition_size: PositiveInt | None = 1
    """ZeRO++ (arXiv 2306.10209): ranks that share a second copy of the weights; 1 = off, `null` =
    all ranks of a machine."""
    zero_quantized_weights: bool = False
    """ZeRO++: gather weights in 8 bits."""
    zero_quantized_gradients: bool = False
    """ZeRO++: reduce gradients in 4 bits."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of zero_optimization that have no field here, as DeepSpeed names them."""


class PrecisionName(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class GradAccumDtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@schema
class Precision:
    """Numbers of the forward and backward pass; master weights are always fp32."""

    name: PrecisionName = PrecisionName.auto
    """`auto` = bf16 where the device computes in it natively, else fp32."""
    grad_accum_dtype: GradAccumDtype | None = None
    """Gradients are accumulated in this type; `null` = the precision's own."""
    loss_scale: NonNegativeFloat = 0.0
    """fp16: a fixed loss scale; 0 = dynamic."""
    initial_scale_power: NonNegativeInt = 16
    """fp16: the dynamic loss scale starts at 2 to this power."""
    loss_scale_window: PositiveInt = 1000
    """fp16: steps without overflow after which the scale doubles."""
    hysteresis: PositiveInt = 2
    """fp16: overflows before the scale halves."""
    min_loss_scale: PositiveInt = 1
    """fp16: the scale never falls below this."""


@schema
class Train:
    """How long, how often to evaluate, and what a step does."""

    max_steps: PositiveInt | None = None
    """Optimizer steps of the run; with max_tokens too, the shorter one."""
    max_tokens: PositiveInt | None = None
    """Training tokens of the run, rounded up to whole steps."""
    eval_every_steps: PositiveInt | None = 100
    """Evaluate each so many steps; `null` = only before the first and after the last step."""
    eval_rows: PositiveInt | None = 64
    """Rows of held-out text in one evaluation; `null` = all."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sample_prompt: str = "The"
    """Text that the finished model continues; empty = no sample."""
    sample_tokens: PositiveInt = 60
    """Tokens of that sample."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one rank's device for MFU; `null` = a table for GPUs, measured on a CPU."""
    profile_steps: NonNegativeInt = 0
    """Steps that torch's profiler records after the first two, to profile/ in the run directory."""


@schema
class Checkpoint:
    """What is kept of the weights and the optimizer."""

    every_steps: PositiveInt | None = 100
    """Write a checkpoint each so many steps; `null` = only after the last step."""
    keep_last: PositiveInt = 2
    """Older complete checkpoints are deleted."""
    at_end: bool = True
    """Whether the last step is followed by a checkpoint."""
    export: bool = True
    """Whether the run ends with an export in Hugging Face format."""


@schema
class Monitor:
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = True
    """Event files in tensorboard/ of the run directory."""
    csv: bool = False
    """metrics.csv in the run directory: one row a step."""
    wandb: bool = False
    """Weights & Biases (needs the extra `wandb`)."""
    wandb_project: str = "llama-pretrain"
    """Project of Weights & Biases; the key comes from its own login, never from here."""
    deepspeed_tensorboard: bool = False
    """Also switch on DeepSpeed's own TensorBoard monitor, in tensorboard/deepspeed."""


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@schema
class Launch:
    """Processes and machines."""

    device: Device = Device.auto
    """`auto` = CUDA where torch and a GPU are there, else the CPU."""
    num_processes: PositiveInt | None = None
    """Ranks on each machine; `null` = one a GPU, or two on a CPU with two cores or more."""
    nodes: PositiveInt = 1
    """Machines. More than one can be planned, not yet launched."""
    threads_per_process: PositiveInt | None = None
    """Threads of one rank on a CPU; `null` = its share of the cores."""
    timeout_s: PositiveInt = 1800
    """A collective that takes longer than this ends the run, in seconds."""


@schema
class HybridEngine:
    """DeepSpeed's hybrid engine: generation with fused kernels while training. Needs CUDA."""

    enabled: bool = False
    """Whether it is on."""
    max_out_tokens: PositiveInt = 512
    """Longest prompt and continuation together, in tokens."""
    inference_tp_size: PositiveInt = 1
    """Ranks that share one model while generating."""
    release_inference_cache: bool = False
    """Free the inference memory after each generation."""
    pin_parameters: bool = True
    """Keep gathered parameters in place while generating."""
    tp_gather_partition_size: PositiveInt = 8
    """Parameters gathered at a time for tensor parallelism."""


@schema
class DeepSpeed:
    """DeepSpeed's settings that belong to no other group."""

    hybrid_engine: HybridEngine = field(default_factory=HybridEngine)
    """DeepSpeed's hybrid engine."""
    steps_per_print: PositiveInt = 100
    """DeepSpeed logs its own line each so many steps, to the log of rank 0."""
    wall_clock_breakdown: bool = False
    """Log the time of forward, backward and step; costs synchronisations."""
    prescale_gradients: bool = False
    """Divide gradients by the number of ranks before the reduction instead of after."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Top-level keys of DeepSpeed that have no field here, as DeepSpeed names them."""


@schema
class Run:
    """A whole run."""

    task: Task = Task.pretrain
    """`pretrain` trains; `plan` stops after the plan; `prepare` stops after the data."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1234
    """Seed of the initial weights, the order of the data and dropout."""
    resume: str | None = None
    """A run directory: go on from its newest complete checkpoint, in that directory."""
    model: Model = field(default_factory=Model)
    """The architecture."""
    data: Data = field(default_factory=Data)
    """The corpus and its rows."""
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    """How text becomes token ids."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate over the run."""
    batch: Batch = field(default_factory=Batch)
    """The batch triangle."""
    zero: Zero = field(default_factory=Zero)
    """ZeRO."""
    precision: Precision = field(default_factory=Precision)
    """Number formats."""
    train: Train = field(default_factory=Train)
    """Length, evaluation, clipping."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Checkpoints and the export."""
    monitor: Monitor = field(default_factory=Monitor)
    """Where metrics go."""
    launch: Launch = field(default_factory=Launch)
    """Processes and machines."""
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    """The rest of DeepSpeed."""


def register() -> None:
    """Tell Hydra of the schema, which config.yaml and every snapshot name as `run_schema`."""
    from hydra.core.config_store import ConfigStore  # workers read schemas without Hydra

    ConfigStore.instance().store(name="run_schema", node=Run)
