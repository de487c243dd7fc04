"""The whole config of a run."""

from dataclasses import field
from typing import Annotated

from annotated_types import Interval

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.checkpoint import Checkpoint
from llama_pretrain.config.data import Data
from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.fields import PATH, UsedWhen, schema
from llama_pretrain.config.kernels import Kernels
from llama_pretrain.config.launch import Launch
from llama_pretrain.config.model import Model
from llama_pretrain.config.monitor import Monitor
from llama_pretrain.config.optim import Optim
from llama_pretrain.config.precision import Precision
from llama_pretrain.config.provenance import Provenance
from llama_pretrain.config.schedule import Schedule
from llama_pretrain.config.sweep import SweepSettings
from llama_pretrain.config.tasks import DriftPolicy, Export, Generate, PlanSettings, Resume, Task
from llama_pretrain.config.tokenizer import Tokenizer
from llama_pretrain.config.train import Train
from llama_pretrain.config.zero import Zero


@schema
class Run:
    """A run as the user describes it; settings left open are decided by plan/resolve.py."""

    task: Task = Task.pretrain
    """`pretrain` trains; `plan` stops after the plan; `probe` trains a few steps and estimates how
    long the run would take; `prepare` stops after the data; `inspect` shows the data;
    `verify_resume` proves that a resumed run equals an uninterrupted one. On an existing run,
    `run=DIR`: `export` its model, `evaluate` it, `generate` text."""
    of_run: str | None = None
    """What `run=DIR` sets: the directory of the run to export, evaluate or generate from."""
    reproduce_of: str | None = None
    """What `reproduce=DIR` sets: the directory of the run to reproduce."""
    drift: Annotated[DriftPolicy, UsedWhen("reproduce_of", (PATH,))] = DriftPolicy.warn
    """`reproduce=DIR`: what happens when something differs from when that run was made. `warn`
    prints it; `error` also refuses to start if it can change the result and was not requested on
    the command line, and ends with exit code 1 if the new run differs; `off` does not compare."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1234
    """Seed of the initial weights, the order of the data, dropout, and generated text."""
    resume: Resume = field(default_factory=Resume)
    """Resuming a run."""
    model: Model = field(default_factory=Model)
    """The architecture."""
    data: Data = field(default_factory=Data)
    """The corpus and its sequences."""
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    """How text becomes token ids."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate over the run."""
    batch: Batch = field(default_factory=Batch)
    """Micro batch, gradient accumulation, global batch."""
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
    generate: Annotated[Generate, UsedWhen("task", ("generate",))] = field(default_factory=Generate)
    """Text from a finished run's model."""
    monitor: Monitor = field(default_factory=Monitor)
    """Where metrics go."""
    provenance: Provenance = field(default_factory=Provenance)
    """What a run records about its origin."""
    launch: Launch = field(default_factory=Launch)
    """Nodes, ranks and threads."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    """What the plan computes beyond the plan itself."""
    sweep: SweepSettings = field(default_factory=SweepSettings)
    """Jobs of a sweep."""
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    """The rest of DeepSpeed."""
