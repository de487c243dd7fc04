"""What a task gets besides the run itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llama_pretrain.plan.machine import Machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.phases import Phases


def _do_nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Where a task writes, and the command that it belongs to."""

    run_dir: RunDir
    argv: Sequence[str]
    """The words of the command, for provenance."""
    origins: Mapping[str, str]
    """Where each setting comes from (config/origins.py)."""
    machine: Machine
    """This machine, or a job's share of it."""
    phases: Phases = field(default_factory=Phases)
    """The time that the start has taken so far, by phase."""
    poll: Callable[[], None] = _do_nothing
    """Called a few times a second while workers run; what it raises ends them."""
