"""task=export: a checkpoint in Hugging Face format."""

from collections.abc import Callable
from pathlib import Path

from llama_pretrain import console
from llama_pretrain.checkpoint.manifest import find_fault, list_folders, newest_complete
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.runs.layout import RunDir


def pick_checkpoint(run: ResolvedRun, source: RunDir) -> Path:
    """The checkpoint that `export.checkpoint` names, or the newest complete one.

    Raises:
        UserError: if it does not exist, or is damaged.
    """
    name = run.export.checkpoint
    if name is None:
        folder, passed_over = newest_complete(source.checkpoints)
        for line in passed_over:
            console.note(line)
        if folder is None:
            message = f"no complete checkpoint in {source.checkpoints}"
            raise UserError([Problem(path="run", message=message)])
        return folder
    folder = source.checkpoints / name
    fault = find_fault(folder) if folder.is_dir() and Path(name).name == name else "does not exist"
    if fault is not None:
        names = [path.name for path in list_folders(source.checkpoints)]
        hint = f"Checkpoints: {', '.join(names)}" if names else "The run has none"
        problem = Problem(path="export.checkpoint", message=f"{fault} (got {name})", hint=hint)
        raise UserError([problem])
    return folder


def export(
    run: ResolvedRun, source: RunDir, checkpoint: Path, target: Path, *, say: Callable[[str], None]
) -> None:
    """Export a checkpoint of `source`, and report how close it is to what was trained.

    Raises:
        UserError: if it is not close enough, or cannot be written.
    """
    # torch and transformers take seconds to import
    from llama_pretrain.checkpoint.export import export_checkpoint, quiet_transformers

    quiet_transformers()
    try:
        proof = export_checkpoint(checkpoint, target, run=run, run_dir=source)
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename or target}"
        raise UserError([Problem(path="export", message=message)]) from error
    say(
        f"export: {checkpoint.name} in {proof.precision}, largest difference of logits"
        f" {proof.logit_difference:.1e} (tolerance {proof.logit_tolerance:g}): {target}"
    )
