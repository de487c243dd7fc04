"""From plain values to a checked `Run`: types, ranges, unknown keys, and every group's rules."""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llama_pretrain.config.checkpoint import validate_checkpoint
from llama_pretrain.config.data import validate_data
from llama_pretrain.config.deepspeed import validate_sections
from llama_pretrain.config.deepspeed_keys import EXTRA_KEYS, OWNED_KEYS, validate_extra
from llama_pretrain.config.fields import walk_fields
from llama_pretrain.config.model import validate_model
from llama_pretrain.config.optim import validate_optim
from llama_pretrain.config.precision import validate_precision
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.provenance import validate_provenance
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.schedule import validate_schedule
from llama_pretrain.config.tasks import validate_tasks
from llama_pretrain.config.tokenizer import validate_tokenizer
from llama_pretrain.config.train import validate_train
from llama_pretrain.config.zero import validate_zero

OTHER_NAMES = {
    "context_length": "data.sequence_length",
    "epochs": "train.max_steps",
    "grad_clip": "train.gradient_clipping",
    "layers": "model.num_hidden_layers",
    "lr": "optim.learning_rate",
    "max_grad_norm": "train.gradient_clipping",
    "max_seq_length": "data.sequence_length",
    "max_train_steps": "train.max_steps",
    "min_lr": "schedule.min_learning_rate_ratio",
    "num_gpus": "launch.num_processes",
    "num_layers": "model.num_hidden_layers",
    "num_train_epochs": "train.max_steps",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "seq_length": "data.sequence_length",
    "steps": "train.max_steps",
    "warmup_ratio": "schedule.warmup_steps",
}
"""Names that transformers, Megatron and others use for a setting."""


AnyRun = TypeVar("AnyRun", bound=Run)


def parse_values(values: Mapping[str, Any], kind: type[AnyRun]) -> AnyRun:
    """Check plain resolved values against the schema: missing, unknown, types and ranges.

    Args:
        kind: `Run`, or `ResolvedRun` for a snapshot.

    Raises:
        UserError: with all mistakes at once.
    """
    missing = [
        Problem(path=path, message="is required", hint=f"Add {path}=...")
        for path, value in flatten(values)
        if value == "???"
    ]
    try:
        run: AnyRun = _adapter(kind.__name__).validate_python(dict(values))
    except ValidationError as error:
        found = [_explain_field(dict(item)) for item in error.errors() if item["input"] != "???"]
        raise UserError(missing + found) from error
    refuse(missing)  # a text field would take "???" as its value
    return run


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter({"Run": Run, "ResolvedRun": ResolvedRun}[name])


def _explain_field(found: dict[str, Any]) -> Problem:
    """One pydantic error as a problem."""
    path = ".".join(str(part) for part in found["loc"])
    if found["type"] == "unexpected_keyword_argument":
        return unknown_key(path, got=f"{found['input']!r}")
    message = re.sub("^(Input|Value|List) should", "must", str(found["msg"]))
    return Problem(path=path, message=f"{message} (got {found['input']!r})")


def unknown_key(path: str, *, got: str) -> Problem:
    """The problem of a setting that does not exist, with the nearest ones that do."""
    for mapping in ("zero.extra", "deepspeed.extra", "launch.slurm.extra"):
        if path.startswith(mapping):
            hint = f"Add a key to it with a plus: +{mapping}.KEY=VALUE"
            return Problem(path=path, message=f"unknown key (got {got})", hint=hint)
    if path.startswith("data.sources"):
        hint = "Add a source with a plus: '+data.sources={NAME:{name:text,paths:[FILES]}}'"
        return Problem(path=path, message=f"unknown source (got {got})", hint=hint)
    group, _, key = path.partition(".")
    if group == "deepspeed" and key.partition(".")[0] in EXTRA_KEYS:
        hint = f"Pass it to DeepSpeed with +deepspeed.extra.{key}=VALUE"
        return Problem(path=path, message=f"unknown key (got {got})", hint=hint)
    close = _nearest_setting(path)
    hint = f"Did you mean {close}?" if close else "docs/configuration.md lists all settings"
    return Problem(path=path, message=f"unknown key (got {got})", hint=hint)


def _nearest_setting(path: str) -> str | None:
    known = [known_path for known_path, _ in walk_fields(Run)]
    first, _, rest = path.partition(".")
    name = path.rpartition(".")[2]
    owner = OWNED_KEYS.get(first)
    if owner is not None:  # a key of DeepSpeed's JSON
        inside = [f"{group}.{rest}" for group in (owner, owner.partition(".")[0])]
        return next((setting for setting in inside if setting in known), owner)
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    if any(candidate.startswith(f"deepspeed.{path}.") for candidate in known):
        return f"deepspeed.{path}"
    # The right name in the wrong group, then a typo.
    same = [candidate for candidate in known if candidate.endswith(f".{path}")]
    others = [candidate for candidate in known if candidate.endswith(f".{name}")]
    same += difflib.get_close_matches(path, others, n=1, cutoff=0.6)
    same += difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    return same[0] if same else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted paths."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def validate_run(run: Run) -> Iterator[Problem]:
    """Every rule across fields that needs only the config."""
    for rule in (
        validate_model,
        validate_data,
        validate_tokenizer,
        validate_tasks,
        validate_schedule,
        validate_train,
        validate_checkpoint,
        validate_provenance,
        validate_zero,
        validate_optim,
        validate_precision,
        validate_sections,
        validate_extra,
    ):
        yield from rule(run)
