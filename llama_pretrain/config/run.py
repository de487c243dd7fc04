"""The whole config of a run."""

from dataclasses import field
from typing import Annotated

from annotated_types import Interval

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.checkpoint import Checkpoint
from llama_pretrain.config.data import Data
from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.fields import schema
from llama_pretrain.config.kernels import Kernels
from llama_pretrain.config.launch import Launch
from llama_pretrain.config.model import Model
from llama_pretrain.config.monitor import Monitor
from llama_pretrain.config.optim import Optim
from llama_pretrain.config.precision import Precision
from llama_pretrain.config.schedule import Schedule
from llama_pretrain.config.sweep import SweepSettings
from llama_pretrain.config.tasks import DriftPolicy, Export, Generate, PlanSettings, Resume, Task
from llama_pretrain.config.tokenizer import Tokenizer
from llama_pretrain.config.train import Train
from llama_pretrain.config.zero import Zero


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
