"""The schema of a run: every setting with its type, range, unit and meaning.

Three readers share these classes: Hydra (types and unknown keys while composing), pydantic
(ranges, in config/rules.py) and people (the string under a field is its documentation, and
docs/configuration.md is made from it). OmegaConf drops the `Annotated` part. The data's sections
are in config/data.py, DeepSpeed's own in config/deepspeed.py.
"""

import math
from dataclasses import field
from enum import Enum
from typing import Annotated

from annotated_types import Ge, Interval, Len

from llama_pretrain.config.data import Data, Tokenizer
from llama_pretrain.config.deepspeed import DeepSpeed, Zero
from llama_pretrain.config.fields import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    schema,
)


class Task(str, Enum):
    pretrain = "pretrain"
    plan = "plan"
    probe = "probe"
    prepare = "prepare"
    inspect = "inspect"
    verify_resume = "verify_resume"
    export = "export"
    evaluate = "evaluate"
    generate = "generate"

    @property
    def trains(self) -> bool:
        """Whether ranks are started that train."""
        return self in (Task.pretrain, Task.probe, Task.verify_resume)

    @property
    def reads_a_run(self) -> bool:
        """Whether it is about a run that there is already: `run=DIR`."""
        return self in (Task.export, Task.evaluate, Task.generate)


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


class OptimName(str, Enum):
    adamw = "adamw"
    fused_adam = "fused_adam"
    cpu_adam = "cpu_adam"
    torch_adamw = "torch_adamw"
    lion = "lion"
    fused_lion = "fused_lion"
    cpu_lion = "cpu_lion"
    cpu_adagrad = "cpu_adagrad"
    lamb = "lamb"
    muon = "muon"


class BatchScaling(str, Enum):
    none = "none"
    sqrt = "sqrt"
    linear = "linear"

    def factor(self, ratio: float) -> float:
        """What a learning rate is multiplied by where the batch is so many times as large."""
        return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.value]


@schema
class Optim:
    """The optimizer and its numbers."""

    name: OptimName = OptimName.adamw
    """`adamw` (arXiv 1711.05101) chooses: cpu_adam where optimizer state is offloaded, else
    torch_adamw. `lion` (arXiv 2302.06675) chooses cpu_lion or fused_lion. `lamb` (arXiv
    1904.00962) needs CUDA and stage 0. `muon` (kellerjordan.github.io/posts/muon) updates
    the layers' matrices, AdamW the rest. All but torch_adamw and muon are DeepSpeed's kernels; the
    cpu_ ones update state in host memory."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of warm-up."""
    scale_by_batch: BatchScaling = BatchScaling.none
    """How the learning rates follow the global batch: not, with the square root of its size (arXiv
    2405.14578), or in proportion to it (arXiv 1706.02677). A snapshot has the scaled ones."""
    scale_from_rows: PositiveInt | None = None
    """`scale_by_batch`: rows of the global batch that the learning rates are given for."""
    betas: Annotated[list[float], Len(2, 2)] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and second moment (not Adagrad)."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the update (not Lion)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay (Adagrad: L2) of linear and embedding weights; norms and biases never
    decay."""
    muon_learning_rate: PositiveFloat = 0.02
    """`muon`: peak learning rate of the layers' matrices; learning_rate is AdamW's."""
    muon_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """`muon`: decay rate of the momentum."""


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
    """Rows of one optimizer step, over all ranks; `null` = derived from the others; all four
    `null` = 16, or the next number that the ranks divide."""
    global_batch_tokens: PositiveInt | None = None
    """The same in tokens: a multiple of data.sequence_length."""
    micro_batch_size: PositiveInt | None = None
    """Rows of one forward pass on one rank; `null` = derived."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forward passes of one rank before an optimizer step; `null` = derived, 1 where open."""


class PrecisionName(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class AutocastDtype(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"


@schema
class TorchAutocast:
    """torch.autocast: fp32 weights, products in 16 bits. With precision=fp32 alone."""

    enabled: bool = False
    """Whether it is on."""
    dtype: AutocastDtype = AutocastDtype.bfloat16
    """Type of the products."""
    lower_precision_safe_modules: list[str] = field(default_factory=list)
    """Classes of modules whose gradients are reduced in 16 bits too; empty = DeepSpeed's list."""


@schema
class Precision:
    """Numbers of the forward and backward pass; master weights are fp32 unless told otherwise."""

    name: PrecisionName = PrecisionName.auto
    """`auto` = bf16 where the device computes in it natively, else fp32."""
    grad_accum_dtype: Dtype | None = None
    """Gradients are accumulated in this type; `null` = the precision's own."""
    communication_data_type: Dtype | None = None
    """Gradients are reduced in this type; `null` = the precision's own."""
    seq_parallel_communication_data_type: Dtype | None = None
    """Gradients are reduced in this type over sequence-parallel ranks; `null` = fp32."""
    buffer_dtype: Dtype | None = None
    """Buffers (rotary frequencies) are cast to this type; `null` = they stay fp32."""
    torch_autocast: TorchAutocast = field(default_factory=TorchAutocast)
    """torch.autocast instead of 16-bit weights."""
    immediate_grad_update: bool = False
    """bf16 with fp32 accumulation: add each gradient as it is made."""
    check_grad_overflow: bool = True
    """bf16: skip a step whose gradient isn't finite."""
    bf16_master_weights_and_grads: bool = False
    """bf16: keep no fp32 master weights (cpu_adam): less memory, other losses."""
    bf16_optimizer_states: bool = False
    """bf16: moments in bf16 too (with bf16_master_weights_and_grads)."""
    loss_scale: NonNegativeFloat = 0.0
    """fp16: a fixed loss scale; 0 = dynamic."""
    initial_scale_power: NonNegativeInt = 16
    """fp16: the dynamic loss scale starts at 2 to this power."""
    loss_scale_window: PositiveInt = 1000
    """fp16: steps without overflow after which the scale doubles."""
    hysteresis: PositiveInt = 2
    """fp16: overflows before the scale halves."""
    consecutive_hysteresis: bool = False
    """fp16: refill hysteresis after a step without overflow."""
    min_loss_scale: PositiveInt = 1
    """fp16: the scale never falls below this."""
    auto_cast: bool = False
    """fp16: cast floating-point inputs too."""
    fp16_master_weights_and_grads: bool = False
    """fp16: keep no fp32 master weights (cpu_adam)."""


class AttentionKernel(str, Enum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    blocked = "blocked"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"


class LossKernel(str, Enum):
    auto = "auto"
    plain = "plain"
    chunked = "chunked"
    liger = "liger"


class LayerKernel(str, Enum):
    auto = "auto"
    plain = "plain"
    fused = "fused"
    liger = "liger"


class CompiledPart(str, Enum):
    none = "none"
    layers = "layers"
    model = "model"


class Matmul(str, Enum):
    auto = "auto"
    plain = "plain"
    fp32 = "fp32"


class Allocator(str, Enum):
    auto = "auto"
    plain = "plain"
    keep = "keep"


@schema
class Kernels:
    """How the model is computed, not what: losses differ by rounding alone (docs/performance.md).
    `auto` takes the fastest that is sound on the device; `liger` needs CUDA and the extra `liger`.
    """

    attention: AttentionKernel = AttentionKernel.auto
    """`sdpa` = PyTorch's; `blocked` = products by blocks, for CPUs whose MKL is slow; `eager` =
    with all scores in memory; `flash_attention_2` needs CUDA and its package, `flex_attention`
    CUDA. `auto` = `blocked` in bf16 on a CPU that isn't Intel's, `flash_attention_2` on CUDA where
    it is installed, else `sdpa`."""
    loss: LossKernel = LossKernel.auto
    """`plain` = all logits, and fp32 copies of them; `chunked` = 1,024 tokens' at a time (512 with
    matmul=fp32), with the gradient made in the forward pass (arXiv 2410.10989). `auto` = `chunked`,
    but for fp16 and autocast."""
    rms_norm: LayerKernel = LayerKernel.auto
    """`plain` = transformers' module; `fused` = fewer passes over memory, less of it kept. `auto` =
    `fused` on a CPU, `liger` on CUDA where it is installed, `plain` in what is compiled
    and under autocast."""
    rotary: LayerKernel = LayerKernel.auto
    """Rotary embedding, as rms_norm."""
    swiglu: LayerKernel = LayerKernel.auto
    """The feed-forward layer's activation, as rms_norm."""
    compile: CompiledPart = CompiledPart.none
    """What torch.compile makes kernels of, at the first step: each of the `layers`, or the `model`
    but its head. Needs a C++ compiler on a CPU; not at ZeRO stage 3."""
    matmul: Matmul = Matmul.auto
    """Products of 16-bit matrices: `fp32` = with their operands in fp32, which is exact, and the
    result rounded as ever. `auto` = `fp32` on a CPU that is slow in 16 bits: Intel's without AMX,
    and all without instructions for it; else `plain`."""
    allocator: Allocator = Allocator.auto
    """On a CPU: `keep` = memory that was freed stays with the process (glibc's tunables), for to
    get it back takes up to a fifth of a step; `plain` = glibc's own ways. `auto` = `keep` on a CPU,
    unless launch.malloc_mmap_threshold says otherwise."""


class Spike(str, Enum):
    none = "none"
    skip = "skip"
    rollback = "rollback"


@schema
class Train:
    """How long, how often to evaluate, and what a step does."""

    max_steps: PositiveInt | None = None
    """Optimizer steps of the run; with max_tokens too, the shorter one."""
    max_tokens: PositiveInt | None = None
    """Training tokens of the run, rounded up to whole steps."""
    tokens_per_parameter: PositiveFloat | None = None
    """Training tokens as a multiple of the model's parameters: 20 is near the best loss for the
    compute (arXiv 2203.15556). A snapshot has it as max_tokens; with max_steps, the shorter one."""
    eval_every_steps: PositiveInt | None = 100
    """Evaluate each so many steps; `null` = only before the first and after the last step."""
    eval_rows: PositiveInt | None = 64
    """Rows of held-out text in one evaluation; `null` = all."""
    gradient_clipping: NonNegativeFloat | None = None
    """Largest norm of the gradient; 0 = no clipping; `null` = 1.0, but 0 with Muon, whose update
    DeepSpeed would clip in the gradient's place."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sample_prompt: str = "The"
    """Text that the model continues, after each evaluation and when it is finished; empty = no
    samples."""
    sample_tokens: PositiveInt = 60
    """Tokens of each sample, at most; before the first step 8 at most."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one rank's device for MFU; `null` = a table for GPUs, measured on a CPU."""
    max_nonfinite_steps: PositiveInt = 5
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run stops.
    (fp16: overflows of the gradient, which lower the loss scale, don't count.)"""
    spike: Spike = Spike.none
    """What is done with a step whose loss spikes: `none`; `skip` its update; `rollback` to the
    newest checkpoint and leave out the batches of the spike (arXiv 2204.02311, section 5.1)."""
    spike_window: Annotated[int, Ge(8)] = 100
    """Losses, of the last applied steps, that a loss is compared with; none is judged before."""
    spike_z: PositiveFloat = 6.0
    """A loss spikes where it is so many standard deviations above the window's mean."""
    spike_batches: PositiveInt = 2
    """`rollback`: batches that are left out: that of the spike and those before it."""
    profile_steps: NonNegativeInt = 0
    """Steps that torch's profiler records after the first two, to profile/ in the run directory."""


# `continue` can't be written as a name of a class.
OnError = Enum("OnError", {"continue": "continue", "stop": "stop"}, type=str)


@schema
class Checkpoint:
    """What is kept of the weights and the optimizer."""

    every_steps: PositiveInt | None = 100
    """Write a checkpoint each so many steps; `null` = by every_minutes alone."""
    every_minutes: PositiveFloat | None = None
    """Write one when so many minutes have gone by since the last; `null` = by every_steps alone."""
    keep_last: PositiveInt = 2
    """Older complete checkpoints are deleted."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of multiples of so many steps are kept for good."""
    at_end: bool = True
    """Whether the last step is followed by a checkpoint."""
    asynchronous: bool | None = None
    """Copy the state to host memory, and write it while training goes on; `null` = where there are
    saves before the last step, and the plan finds room for the copy."""
    on_error: OnError = OnError["continue"]
    """What a run does whose checkpoint can't be written: `continue` without it, or `stop`."""
    export: bool = True
    """Whether the run ends with an export in Hugging Face format."""


@schema
class Export:
    """The model in Hugging Face format: at a run's end, and task=export."""

    checkpoint: str | None = None
    """Name of the checkpoint, as in step-00000100, for task=evaluate too; `null` = the newest
    complete one."""
    target: str | None = None
    """Folder to write to, for task=export; `null` = export/ in the run's directory."""
    max_shard_size: str = "4GiB"
    """Largest file of weights."""
    logit_tolerance: PositiveFloat | None = None
    """Largest difference, over the largest logit or 1, between the exported model's logits and
    those that the training engine gave; `null` = 1e-5 in fp32 and 0.02 in 16 bits."""


@schema
class Generate:
    """task=generate: continue a prompt with a finished run's model."""

    prompt: str = "The"
    """Text to continue."""
    num_tokens: PositiveInt = 100
    """Tokens to add."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: PositiveInt | None = 50
    """Draw from so many of the likeliest tokens; `null` = from all."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have this probability together."""


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
    timings: bool = False
    """Show on the terminal where the seconds went from the command to the end of the first step,
    by phase; metrics.jsonl and report.html have them always."""


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
    device_memory: str | None = None
    """Memory of one rank's device, as in 80GiB, to plan for; `null` = the GPU's here, 80GiB where
    GPUs are planned that aren't here, and a rank's share of the host's memory on a CPU."""
    threads_per_process: PositiveInt | None = None
    """Threads of one rank on a CPU; `null` = its share of the cores."""
    bind_cores: bool | None = None
    """Each rank keeps to cores of its own, neighbours of a socket; `null` = on a CPU, where ranks
    and their threads take all cores that the run may use."""
    malloc_mmap_threshold: PositiveInt | None = None
    """On a CPU: blocks of this many bytes or more go back to the system when they are freed
    (glibc's MALLOC_MMAP_THRESHOLD_). With 262144 a rank's memory is what the plan says to a few
    percent, and a step takes up to a quarter longer; `null` = glibc's own choice."""
    fork: bool = True
    """Fork ranks from a process that imports everything once, while the data is prepared (on Linux
    alone); `false` = a fresh interpreter for each rank, through torch's elastic agent."""
    timeout_s: PositiveInt = 1800
    """A rank that makes no progress for so many seconds ends the run, with the stacks of all ranks
    in their logs."""
    max_restarts: NonNegativeInt = 0
    """How often a run whose rank failed goes on by itself from its newest checkpoint."""


@schema
class PlanSettings:
    """What task=plan and task=probe are asked beside the run itself."""

    fit: str | None = None
    """A memory, as in 80GiB: list which stages, offloads and recomputation fit a device of it, and
    the largest micro batch of each."""
    tokens_per_s: PositiveFloat | None = None
    """Tokens a second over all ranks, as measured by task=probe or known: gives hours."""
    price_per_device_hour: NonNegativeFloat | None = None
    """Price of one device (of one machine on a CPU) for an hour, in any currency: gives a cost."""
    watts_per_device: PositiveFloat | None = None
    """Power of one device (of one machine on a CPU) in W: gives an energy."""
    probe_steps: Annotated[int, Ge(3)] = 8
    """Steps of task=probe; the first two are not counted."""


@schema
class Resume:
    """Going on with a run: `resume=DIR` on the command line."""

    run_dir: str | None = None
    """What `resume=DIR` sets: go on from the newest complete checkpoint of DIR, in DIR. `auto` = of
    the run's own directory, where it holds a run."""
    verify_steps: PositiveInt = 3
    """task=verify_resume: steps before the cut, and steps after it."""
    allow_data_change: bool = False
    """Go on although the data is not what the checkpoint was trained on."""


class Objective(str, Enum):
    eval_loss = "eval_loss"
    train_loss = "train_loss"
    tokens_per_s = "tokens_per_s"
    peak_memory_bytes = "peak_memory_bytes"

    @property
    def more_is_better(self) -> bool:
        """Whether the largest value is the best."""
        return self is Objective.tokens_per_s


@schema
class SweepSettings:
    """What a sweep, with `-m`, does with its points; no single run has a use for it."""

    objective: Objective = Objective.eval_loss
    """What points are ranked by, and what Optuna is told: the last evaluation's loss, the mean loss
    of the last steps, the median throughput (the most is best) or the largest rank's peak memory.
    """
    prune: bool = False
    """End a point whose evaluation loss is worse than the median of the finished points' at as many
    tokens."""
    prune_after: PositiveInt = 4
    """`prune`: points that must have finished before one is ended."""


class DriftPolicy(str, Enum):
    warn = "warn"
    error = "error"
    off = "off"


@schema
class Run:
    """A whole run."""

    task: Task = Task.pretrain
    """`pretrain` trains; `plan` stops after the plan; `probe` trains a few steps and says how long
    the run would take; `prepare` stops after the data; `inspect` shows the data; `verify_resume`
    proves that a cut run equals an uncut one. Of a run that there is, `run=DIR`: `export` its
    model, `evaluate` it, `generate` text."""
    of_run: str | None = None
    """What `run=DIR` sets: the directory of the run that `export`, `evaluate` or `generate` is
    about."""
    reproduce_of: str | None = None
    """What `reproduce=DIR` sets: the directory of the run that is done again."""
    drift: DriftPolicy = DriftPolicy.warn
    """`reproduce=DIR`: what differs now from when that run was made. `warn` prints it; `error`
    also refuses to start where it can change the result and was not asked for on the command line,
    and ends with exit code 1 where the new run differs; `off` doesn't look."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1234
    """Seed of the initial weights, the order of the data and dropout, and of text that is
    generated."""
    resume: Resume = field(default_factory=Resume)
    """Going on with a run."""
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
    kernels: Kernels = field(default_factory=Kernels)
    """How the model is computed."""
    train: Train = field(default_factory=Train)
    """Length, evaluation, clipping."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Checkpoints."""
    export: Export = field(default_factory=Export)
    """The model in Hugging Face format."""
    generate: Generate = field(default_factory=Generate)
    """Text from a finished run's model."""
    monitor: Monitor = field(default_factory=Monitor)
    """Where metrics go."""
    launch: Launch = field(default_factory=Launch)
    """Processes and machines."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    """Questions to the plan."""
    sweep: SweepSettings = field(default_factory=SweepSettings)
    """Points of a sweep."""
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    """The rest of DeepSpeed."""


def register() -> None:
    """Tell Hydra of the schema, which config.yaml and every snapshot name as `run_schema`."""
    from hydra.core.config_store import ConfigStore  # workers read schemas without Hydra

    ConfigStore.instance().store(name="run_schema", node=Run)
