"""`resume=DIR`, `reproduce=DIR` and `run=DIR`: a command about a run, as Hydra can compose it.

Hydra gets a copy of the run's snapshot in place of conf/config.yaml, without the options and
derived settings that the command line changes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama_pretrain.config.command_line import CommandLine
from llama_pretrain.config.compose import CONF, list_groups
from llama_pretrain.config.fields import divisors_near
from llama_pretrain.config.origins import settings_of_option
from llama_pretrain.config.ownership import validate_ownership
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.secrets import find_secrets, secret_problem
from llama_pretrain.config.snapshot import (
    DEFAULTS,
    SNAPSHOT_NAME,
    load_snapshot,
    render_document,
    to_plain,
    without_command,
)
from llama_pretrain.config.zero import Zero, stages_of
from llama_pretrain.files import read_json

AUTO = "auto"
COMPLETED = ("completed", "reproduced", "diverged")
"""Statuses of runs with nothing left to do (runs/status.py)."""
KEPT = {"data": ("sequence_length", "cache_dir"), "optim": ("learning_rate",)}
"""Settings of a snapshot's section that stay when another option of its group is chosen that does
not set them."""
HPZ = "zero_hpz_partition_size"
DERIVED_OF_ZERO = (
    "reduce_scatter",
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
"""Settings of `zero` that are derived from stage, model and optimizer when null; HPZ is derived
from the ranks."""
OFFLOAD_OF_STAGE_3 = ("ratio", "super_offload", "cpuadam_cores_perc")
"""Settings of offload_optimizer that only stage 3 has."""
HYDRA_SETTINGS = (
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.output_subdir=null",
    "hydra.run.dir=outputs/${now:%Y-%m-%d}/${now:%H-%M-%S-%f}",
    "hydra.sweep.dir=outputs/sweeps/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    "hydra.sweep.subdir='${hydra:job.num}-${run_name:${hydra:overrides.task}}'",
    "+hydra.callbacks.sweep._target_=llama_pretrain.sweep.callback.SweepCallback",
)
"""What conf/config.yaml sets of Hydra itself, for a snapshot, which has none of it."""


def words_for_hydra(command: CommandLine, *, scratch: Path) -> list[str]:
    """The command line for Hydra, with a reference to a run replaced by that run's snapshot.

    `resume` continues in DIR itself; `reproduce` starts anew in its own directory; `run` is for
    tasks on an existing run. Hydra gets a copy of the snapshot alone in `scratch`: in DIR it would
    also read other files, which could name code to run.

    Raises:
        UserError: if DIR holds no snapshot that is safe to give to Hydra.
    """
    references = command.reference
    flags = [word for name, value in command.flags.items() for word in (f"--{name}", value) if word]
    if not references:
        words = [word for word in command.words if not word.lstrip("+").startswith("resume=")]
        return [*flags, *words]
    ((kind, place),) = references.items()
    others = [word for word in command.words if word.lstrip("+").partition("=")[0] != kind]
    settings = dict(word.lstrip("+").partition("=")[::2] for word in others)
    if place == AUTO and kind == "resume":
        if "hydra.run.dir" in settings and not command.is_multirun:
            return [*flags, *others, f"resume.run_dir={AUTO}"]
        place = str(find_unfinished(Path("outputs")))
        print(f"resume=auto: {place}", flush=True)
    elsewhere = ["--multirun"] if "multirun" in command.flags else []
    elsewhere += [word for word in others if word.startswith("hydra.run.dir=")]
    if kind == "resume" and elsewhere:
        message = f"continues in the run's own directory (got {elsewhere[0]} as well)"
        hint = "Remove it, or start a new run with reproduce=DIR"
        raise UserError([Problem(path="resume", message=message, hint=hint)])
    folder = Path(place).expanduser().resolve()
    write_primary_config(folder, settings, scratch=scratch, kind=kind)
    if kind == "resume" or (kind == "run" and _writes_inside(folder, settings)):
        refuse(validate_ownership(folder))  # before Hydra creates anything
    ours: list[str] = []
    if kind == "resume":
        ours = [f"hydra.run.dir={_quote(folder)}", f"resume.run_dir={_quote(folder)}"]
    if kind == "run":
        ours = [*_output_directory(folder, settings), f"of_run={_quote(folder)}"]
    given = {*settings, *(word.partition("=")[0] for word in ours)}
    ours += [word for word in HYDRA_SETTINGS if word.lstrip("+").partition("=")[0] not in given]
    # In place of conf/, not beside it: whatever is in conf/ now, the snapshot counts.
    snapshot = ["--config-path", str(scratch), "--config-name", SNAPSHOT_NAME]
    return [*snapshot, *flags, *ours, *others]


def _quote(folder: Path) -> str:
    """A path as a value in Hydra's grammar.

    Raises:
        UserError: if it cannot be written as one.
    """
    text = str(folder)
    if "${" in text or ("'" in text and '"' in text) or not text.isprintable():
        message = "has a path that a config cannot hold"
        raise UserError([Problem(path=text, message=message, hint="Rename the directory")])
    return f'"{text}"' if "'" in text else f"'{text}'"


def _output_directory(folder: Path, settings: Mapping[str, str]) -> list[str]:
    """Where a task on the run in `folder` writes: an evaluation in its own directory.

    Raises:
        UserError: if another directory is given to a task that has none.
    """
    task, given = settings.get("task", ""), settings.get("hydra.run.dir")
    if task == "evaluate":
        place = f"{folder}/evaluations/${{now:%Y-%m-%dT%H-%M-%S-%f}}"
        return [] if given is not None else [f"hydra.run.dir='{place}'"]
    if given is not None:
        message = f"is always the run's own directory with task={task} (got {given})"
        hint = "Remove it" if task != "export" else "Use export.target=DIR"
        raise UserError([Problem(path="hydra.run.dir", message=message, hint=hint)])
    return [f"hydra.run.dir={_quote(folder)}"]


def _writes_inside(folder: Path, settings: Mapping[str, str]) -> bool:
    """Whether a task on an existing run writes to its directory."""
    task = settings.get("task", "")
    exported = task == "generate" and (folder / "export" / "config.json").is_file()
    elsewhere = {"evaluate": "hydra.run.dir", "export": "export.target"}.get(task)
    return not exported and elsewhere not in settings


def find_unfinished(outputs: Path) -> Path:
    """The run below `outputs`, sweeps excluded, that was started last and has not completed.

    Raises:
        UserError: if there is none.
    """
    found = [
        snapshot
        for pattern in (f"*/{SNAPSHOT_NAME}.yaml", f"*/*/{SNAPSHOT_NAME}.yaml")
        for snapshot in outputs.glob(pattern)
        if snapshot.relative_to(outputs).parts[0] != "sweeps"
        and (read_json(snapshot.parent / "status.json") or {}).get("status") not in COMPLETED
    ]
    if not found:
        message = f"there is no unfinished run in {outputs.resolve()}"
        hint = "Name its directory: resume=DIR; or start or resume in one: resume=auto"
        hint += " hydra.run.dir=DIR"
        raise UserError([Problem(path="resume", message=message, hint=hint)])
    return max(found, key=lambda snapshot: snapshot.stat().st_mtime).parent.resolve()


def write_primary_config(
    folder: Path, settings: Mapping[str, str], *, scratch: Path, kind: str
) -> None:
    """Write the config that Hydra composes instead of conf/config.yaml: `scratch`/snapshot.yaml.

    A section whose option is chosen on the command line is that option's; what is derived from a
    setting that is given is derived again.

    Args:
        settings: what the command line sets, by key.
        kind: the word that names the run: resume, reproduce or run.

    Raises:
        UserError: if `folder` holds no snapshot, or one that holds a secret.
    """
    values = to_plain(without_command(load_snapshot(folder / f"{SNAPSHOT_NAME}.yaml")))
    refuse(secret_problem(path) for path in find_secrets(values))
    chosen = [group for group in list_groups() if group in settings]
    if kind == "run" and settings.get("task") == "evaluate":
        _evaluate_instead(values, folder, settings)
    if kind == "reproduce":
        _quote(folder)  # a path that a config can hold
        values["reproduce_of"] = str(folder)
    if kind != "run" and "batch" not in chosen:
        values["batch"] |= _batch_anew(values, settings, launch_chosen="launch" in chosen)
    _derive_again(values, settings, chosen)
    for group in chosen:
        named = settings_of_option(group, settings[group])
        kept = [key for key in KEPT.get(group, ()) if f"{group}.{key}" not in named]
        values[group] = {key: values[group][key] for key in kept}
    document: dict[str, Any] = {"defaults": DEFAULTS, **values}
    if chosen:
        document["defaults"] = [DEFAULTS[0], *({group: None} for group in chosen), DEFAULTS[1]]
        document["hydra"] = {"searchpath": [f"file://{CONF}"]}
    (scratch / f"{SNAPSHOT_NAME}.yaml").write_text(render_document(document), encoding="utf-8")


def _evaluate_instead(values: dict[str, Any], folder: Path, settings: Mapping[str, str]) -> None:
    """Turn a run's values into its evaluation's: its own tokenizer, the whole eval set."""
    values["tokenizer"] = {"name": "pretrained", "path": str(folder / "tokenizer")}
    values["train"]["eval_sequences"] = None
    micro = values["batch"]["micro_batch_size"]
    with contextlib.suppress(KeyError, TypeError):
        planned = (read_json(folder / "plan.json") or {})["batch"]["micro_batch_size"]
        micro = planned if isinstance(planned, int) else micro  # text could be an interpolation
    values["batch"] = {"micro_batch_size": micro or 1, "gradient_accumulation_steps": 1}
    if any(key.startswith("data.") for key in settings):  # other data on purpose
        values["data"]["hash"] = None


def _derive_again(
    values: dict[str, Any], settings: Mapping[str, str], chosen: Sequence[str]
) -> None:
    """Clear what a snapshot has derived from settings that are given anew."""
    launch, zero = values["launch"], values["zero"]
    if {"launch.num_processes", "launch.device"} & {*settings} or "launch" in chosen:
        launch |= dict.fromkeys(("threads_per_process", "bind_cores", "device_memory"))
        if zero[HPZ] != 1:
            zero[HPZ] = None
    if settings.get("checkpoint.every_steps") == "null":  # no save happens during training
        values["checkpoint"]["asynchronous"] = None
    stage = settings.get("zero.stage", "")
    if stage.isdigit() and int(stage) != zero["stage"] and "zero" not in chosen:
        values["zero"] = settings_of_stage(zero, int(stage))
    elif {"model", "optim"} & {*chosen}:
        zero |= dict.fromkeys(DERIVED_OF_ZERO)
    if "optim" in chosen:
        values["train"]["gradient_clipping"] = None


def _batch_anew(
    values: Mapping[str, Any], settings: Mapping[str, str], *, launch_chosen: bool
) -> dict[str, int | None]:
    """What changes in the batch: the global batch stays, and is split anew over the ranks.

    The micro batch becomes smaller only if it does not divide a rank's share.
    """
    given = {key.removeprefix("batch.") for key in settings if key.startswith("batch.")}
    micro, accumulation = "micro_batch_size", "gradient_accumulation_steps"
    if given:
        derived: dict[str, int | None] = {accumulation: None}
        if accumulation in given:
            derived[micro] = None
        if "global_batch_tokens" in given:
            derived["global_batch_size"] = None
        return derived
    sizes = [
        settings.get(f"launch.{name}", str(values["launch"].get(name, 1)))
        for name in ("num_processes", "nodes", "sequence_parallel_size")
    ]
    batch = values["batch"]
    whole, before = batch["global_batch_size"], batch[micro]
    known = all(size.isdigit() and int(size) > 0 for size in sizes) and not launch_chosen
    if not known or whole is None or before is None:
        return {accumulation: None}
    processes, nodes, sharing = map(int, sizes)
    groups = processes * nodes // sharing
    if groups == 0 or whole % groups:
        return {accumulation: None}
    share = whole // groups
    size = divisors_near(share, before)[0]
    return {micro: size, accumulation: share // size}


def settings_of_stage(zero: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """The settings of the section `zero` that another stage reads, without derived sizes."""
    kept = {"stage": stage, "extra": zero["extra"]}
    for item in fields(Zero):
        if stage in stages_of(item) and item.name not in (*DERIVED_OF_ZERO, HPZ):
            kept[item.name] = zero[item.name]
    offload = dict(zero["offload_optimizer"])
    if stage in (1, 2):
        for name in OFFLOAD_OF_STAGE_3:
            del offload[name]
    if stage == 3 or (stage > 0 and offload["device"] != "nvme"):
        kept["offload_optimizer"] = offload
    if stage == 3:
        kept["offload_param"] = zero["offload_param"]
    return kept
