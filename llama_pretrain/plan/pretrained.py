"""The shape of the model that `model.path` names, from its config.json."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llama_pretrain.config.model import SHAPE, Model, RopeParameters, RopeType
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.files import parse_json, read_json, read_regular

NO_CODE = "No code of a model or a tokenizer is ever run: remove it"
LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
"""Defaults of transformers' LlamaConfig that differ from `Model`'s."""


def read_shape(model: Model) -> Model:
    """The model with the shape of a Hugging Face model or of a checkpoint of ours.

    Raises:
        UserError: if config.json cannot be read, is not a LLaMA's, or contradicts the config.
    """
    folder = Path(str(model.path)).expanduser().resolve()
    config_file = folder / "config.json"
    refuse(Problem(path="model.path", message=text, hint=NO_CODE) for text in find_code(folder))
    try:
        values = LLAMA_DEFAULTS | parse_json(read_regular(config_file))
        rope_values = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    except (OSError, ValueError, TypeError) as error:
        message = f"{config_file} cannot be read: {error}"
        raise UserError([Problem(path="model.path", message=message)]) from error
    if values.get("rope_theta") is not None:  # as transformers 4 wrote it
        rope_values.setdefault("rope_theta", values["rope_theta"])
    rope_type = rope_values.pop("rope_type", rope_values.pop("type", "default"))
    for name, value, supported in (
        ("model_type", values.get("model_type"), ("llama",)),
        ("hidden_act", values["hidden_act"], ("silu",)),
        ("rope_type", rope_type, tuple(option.value for option in RopeType)),
    ):
        if value not in supported:
            message = f"{config_file}: {name} must be {' or '.join(supported)} (got {value})"
            raise UserError([Problem(path="model.path", message=message)])
    default = Model()
    given: dict[str, Any] = {name: values[name] for name in SHAPE if values.get(name) is not None}
    problems = [
        Problem(
            path=f"model.{name}",
            message=f"contradicts {config_file}, which has {value} (got {getattr(model, name)})",
            hint="Remove it: a pretrained model has its own shape",
        )
        for name, value in given.items()
        if getattr(model, name) not in (getattr(default, name), value)
    ]
    if model.rope_parameters != default.rope_parameters:
        message = f"contradicts {config_file}"
        hint = "Remove it: a pretrained model has its own"
        problems.append(Problem(path="model.rope_parameters", message=message, hint=hint))
    if problems:
        raise UserError(problems)
    known = {item.name for item in fields(RopeParameters)}
    rope = {key: value for key, value in rope_values.items() if key in known}
    rope["rope_type"] = RopeType(rope_type)
    kept = {item.name: getattr(model, item.name) for item in fields(model)}
    try:  # the file may hold anything
        adapter = TypeAdapter(Model)
        return adapter.validate_python(
            kept | given | {"path": str(folder), "rope_parameters": rope}
        )
    except ValidationError as error:
        raise UserError(
            [
                Problem(
                    path="model.path",
                    message=f"{config_file}: {'.'.join(map(str, found['loc']))} is not valid:"
                    f" {found['msg']} (got {str(found['input'])[:40]})",
                )
                for found in error.errors()
            ]
        ) from error


def find_code(folder: Path) -> Iterator[str]:
    """What in a model's or tokenizer's directory names code, which transformers offers to run."""
    for file in sorted(folder.glob("*config*.json")):
        if "auto_map" in (read_json(file) or {}):
            yield f"{file} names code to run (auto_map)"
    if (folder / "custom_generate").exists():
        yield f"{folder / 'custom_generate'} holds code to run"
