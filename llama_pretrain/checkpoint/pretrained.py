"""Validation of `model.path`: whether the directory holds weights that can be read."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from llama_pretrain.checkpoint.manifest import find_damaged_file, read_manifest
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.run import Run
from llama_pretrain.files import read_json

MAX_LAYERS = 10_000
LAYER_WEIGHTS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)
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
        message = _find_missing_weight(folder)
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


def _find_missing_weight(folder: Path) -> str:
    """The first weight that config.json promises and no file has; empty if all are there."""
    config = read_json(folder / "config.json") or {}
    index = read_json(folder / "model.safetensors.index.json")
    try:
        if index is not None:
            present = set(index.get("weight_map") or ())
        else:
            with safe_open(folder / "model.safetensors", framework="numpy") as file:
                present = set(file.keys())
    except Exception as error:  # the library raises an exception of its own
        return f"{folder}/model.safetensors cannot be read: {error}"
    layers, tied = config.get("num_hidden_layers"), config.get("tie_word_embeddings") is True
    wanted = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    for number in range(layers if isinstance(layers, int) and layers < MAX_LAYERS else 0):
        wanted += [f"model.layers.{number}.{name}.weight" for name in LAYER_WEIGHTS]
    missing = next((name for name in [*wanted, "model.norm.weight"] if name not in present), None)
    hint = ", and tie_word_embeddings is false" if missing == "lm_head.weight" else ""
    return "" if missing is None else f"{folder} has no weight {missing}{hint}"
