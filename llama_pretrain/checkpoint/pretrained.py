"""Whether the directory that `model.path` names holds weights that can be read."""

from collections.abc import Iterator
from pathlib import Path

from llama_pretrain.checkpoint.manifest import read_manifest
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.run import Run

PICKLES = (".bin", ".pt", ".pth")


def validate_pretrained(run: Run) -> Iterator[Problem]:
    """Refuse a directory whose weights can't be read: pickles, which could run code, or none."""
    if run.model.path is None or run.task.reads_a_run:
        return
    folder = Path(run.model.path).expanduser().resolve()
    hint = "give a directory that save_pretrained wrote, or a run's export/ or checkpoints/step-N"
    has_config = (folder / "config.json").is_file()
    whole = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    if any(folder.glob("rank*.safetensors")):  # one of our checkpoints
        message = _find_fault(folder)
    elif has_config and any(path.is_file() for path in whole):
        message = ""
    else:
        files = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
        message = f"no {'model.safetensors' if has_config else 'config.json'} in {folder}"
        if any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in files):
            message = f"{folder} is another program's DeepSpeed checkpoint, of pickles such as"
            message += f" {files[0]}, which are not opened"
            hint = "write its weights with DeepSpeed's zero_to_fp32.py --safe_serialization, and"
            hint += " put the model's config.json beside them"
        elif files:
            message = f"{folder} has pickled weights, which are not opened: {files[0]}"
            hint = "save it again with transformers' save_pretrained, which writes safetensors"
    if message:
        yield Problem(path="model.path", message=message, hint=hint)


def _find_fault(folder: Path) -> str:
    """Why a checkpoint of ours can't be used, by its manifest and its files' sizes; or nothing."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return f"{folder} {error}"
    for name, (size, _) in manifest.files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"{folder}: {name} is missing, or not of {size} bytes"
    return ""
