"""What is done with a run that has been trained: export it, evaluate it, let it write."""

from collections.abc import Sequence

from llama_pretrain.config.schema import Run
from llama_pretrain.runs.rundir import RunDir


def do_with_run(run: Run, run_dir: RunDir, *, argv: Sequence[str]) -> float | None:
    """task=export, evaluate or generate. Returns the evaluation loss."""
    raise NotImplementedError


def export_at_end(run: Run, run_dir: RunDir) -> None:
    """Export the last checkpoint, prove it, and let it write its sample."""
