"""Validation of `model.path`: whether the directory holds weights that can be read."""

from collections.abc import Iterator
from pathlib import Path

from llama_pretrain.checkpoint.manifest import find_damaged_file, read_manifest
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.run import Run

PICKLES = (".bin", ".pt", ".pth")


def validate_pretrained(run: Run) -> Iterator[Problem]:
    """Refuse a directory without readable weights, or with pickles, which can run code."""
    if run.model.path is None or run.task.reads_a_run:
        return
    folder = Path(run.model.path).expanduser().resolve()
    hint = "Name a directory that save_pretrained wrote, or a run's export/ or checkpoints/step-N"
    has_config = (folder / "config.json").is_file()
    weights = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    if any(folder.glob("rank*.safetensors")):  # one of our checkpoints
        try:
            fault = find_damaged_file(folder, read_manifest(folder), hashes=False)
        except ValueError as error:
            fault = str(error)
        message = f"{fault} (got {folder})" if fault else ""
    elif has_config and any(path.is_file() for path in weights):
        message = ""
    else:
        files = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
        missing = "model.safetensors" if has_config else "config.json"
        message = f"must be a directory with {missing} (got {folder})"
        if any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in files):
            message = f"{folder} is a DeepSpeed checkpoint of another program, whose pickles are"
            message += f" not opened (got {files[0]})"
            hint = "Write its weights with DeepSpeed's zero_to_fp32.py --safe_serialization, and"
            hint += " put the model's config.json beside them"
        elif files:
            message = f"{folder} has pickled weights, which are not opened (got {files[0]})"
            hint = "Save it again with transformers' save_pretrained, which writes safetensors"
    if message:
        yield Problem(path="model.path", message=message, hint=hint)
