"""What a launch needs to know."""

from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir


@dataclass(frozen=True)
class LaunchSpec:
    """A run directory that has been written, and the checkpoint to start from, if any."""

    run: ResolvedRun
    plan: TrainingPlan
    run_dir: RunDir
    checkpoint: Path | None = None

    @property
    def worker_args(self) -> list[str]:
        """The arguments of `python -m llama_pretrain.train.worker`."""
        return [str(path) for path in (self.run_dir.path, self.checkpoint) if path is not None]
