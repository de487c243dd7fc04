"""`resume=DIR`, `reproduce=DIR` and `run=DIR`: a command line about a run, as Hydra can read it.

Hydra gets a copy of the run's snapshot in place of conf/config.yaml, with the options and derived
settings that the command line changes taken out.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama_pretrain.config.compose import (
    PROJECT_ROOT,
    SNAPSHOT_NAME,
    list_groups,
    settings_of_option,
)
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.secrets import check_files, check_words, find_secrets, secret_problem
from llama_pretrain.config.snapshot import (
    DEFAULTS,
    as_written,
    load_snapshot,
    render_document,
    to_plain,
)
from llama_pretrain.config.zero import Zero, stages_of

ABOUT_A_RUN = ("resume", "reproduce", "run")
"""Words of the command line that name a run's directory."""
AUTO = "auto"
MULTIRUN = {"-m", "--multirun"}
COMPLETED = ("completed", "reproduced", "diverged")
"""Statuses of runs with nothing left to do (runs/layout.py)."""
FLAGS_WITH_VALUES = (
    *("--cfg", "-c", "--package", "-p", "--info", "-i"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
)
"""Of Hydra."""
KEPT = {"data": ("sequence_length", "cache_dir"), "optim": ("learning_rate",)}
"""What of a snapshot's section stays where another option of its group is chosen that doesn't name
it."""
HPZ = "zero_hpz_partition_size"
DERIVED_OF_ZERO = (
    "reduce_scatter",
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
"""Settings of `zero` that follow from the stage, the model and the optimizer where they are null;
and so does HPZ, from the ranks."""
OFFLOAD_OF_STAGE_3 = ("ratio", "super_offload", "cpuadam_cores_perc")
"""What offload_optimizer has for stage 3 alone."""
HYDRA_SETTINGS = (
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.output_subdir=null",
    "hydra.run.dir=outputs/${now:%Y-%m-%d}/${now:%H-%M-%S-%f}",
    "hydra.sweep.dir=outputs/sweeps/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    "hydra.sweep.subdir='${hydra:job.num}-${run_name:${hydra:overrides.task}}'",
)
"""What conf/config.yaml says of Hydra itself, for a snapshot, which says nothing of it."""


def rewrite_argv(argv: Sequence[str], *, scratch: Path) -> list[str]:
    """Turn `resume=DIR`, `reproduce=DIR` and `run=DIR` into a run of DIR's own snapshot.

    `resume` goes on in DIR itself; `reproduce` starts anew in a directory of its own; `run` is for
    tasks about a run that there is. Hydra gets a copy of what was understood of the snapshot, alone
    in `scratch`: in DIR it would also read other files, which could name code to run.

    Raises:
        UserError: if DIR holds no snapshot that is safe to hand to Hydra, or if the command line
            would write a secret to files or run code out of one.
    """
    _check_words(argv)
    named = {
        key: word.partition("=")[2]
        for word in argv
        for key in ABOUT_A_RUN
        if word.lstrip("+").startswith(f"{key}=")
    }
    given = {key: value for key, value in named.items() if value not in ("", "null")}
    others = [word for word in argv if word.lstrip("+").partition("=")[0] not in named]
    if not given:  # resume=null
        return others
    if len(given) > 1:
        message = "cannot be given together"
        raise UserError([Problem(path=", ".join(given), message=message)])
    ((kind, place),) = given.items()
    settings = dict(word.lstrip("+").partition("=")[::2] for word in others)
    swept = MULTIRUN & set(others)
    if place == AUTO and kind == "resume":
        if "hydra.run.dir" in settings and not swept:
            return [*others, f"resume.run_dir={AUTO}"]
        place = str(find_unfinished(Path("outputs")))
        print(f"resume=auto: {place}", flush=True)
    elsewhere = [w for w in others if w in swept or w.startswith("hydra.run.dir=")]
    if kind == "resume" and elsewhere:
        message = f"goes on in the run's own directory (got {elsewhere[0]} as well)"
        hint = "leave it out, or start anew with reproduce=DIR"
        raise UserError([Problem(path="resume", message=message, hint=hint)])
    folder = Path(place).expanduser().resolve()
    task = settings.get("task", "")
    write_scratch(folder, settings, scratch=scratch, kind=kind)
    ours: list[str] = []
    if kind == "resume":
        ours = [f"hydra.run.dir={_quote(folder)}", f"resume.run_dir={_quote(folder)}"]
    if kind == "run":
        ours = [*_place_of_task(task, folder, settings), f"of_run={_quote(folder)}"]
    set_already = {*settings, *(word.partition("=")[0] for word in ours)}
    ours = [word for word in HYDRA_SETTINGS if word.partition("=")[0] not in set_already] + ours
    # In place of conf/, not beside it: whatever lies there by now, it is the snapshot that counts.
    words = ["--config-path", str(scratch), "--config-name", SNAPSHOT_NAME]
    flags, overrides = _split_flags(argv)  # Hydra wants all overrides in one row
    words += flags
    for word in overrides:
        words += ours if word.lstrip("+").partition("=")[0] == kind else [word]
    return words


def is_sweep(argv: Sequence[str]) -> bool:
    """Whether a command line asks for several runs, and for nothing that only Hydra knows."""
    flags = {word for word in argv if word.startswith("-")}
    if flags - {*MULTIRUN, "--config-path", "--config-name"}:  # --cfg, --info, ...
        return False
    named = any(word.startswith("sweep=") and word not in ("sweep=null", "sweep=") for word in argv)
    return named or "hydra.mode=MULTIRUN" in argv or bool(flags & MULTIRUN)


def _split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides, each in their order."""
    flags: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flags.append(word)
        if word in FLAGS_WITH_VALUES:
            flags += [value for value in [next(words, None)] if value is not None]
    return flags, overrides


def _check_words(argv: Sequence[str]) -> None:
    """Refuse what Hydra would do before it calls us.

    It writes the words of a sweep to multirun.yaml, with the whole config unresolved, and
    --experimental-rerun opens a pickle, which runs what it says.

    Raises:
        UserError: for a secret in the words or in the files of the config, or for that flag.
    """
    from hydra._internal.utils import get_args_parser

    problems = list(check_words(argv))
    try:
        known = get_args_parser().parse_known_args(list(argv))[0]
    except SystemExit:  # Hydra tells of it
        refuse(problems)
        return
    if known.experimental_rerun is not None:
        message = "opens a pickle, which can run any code"
        hint = "do a run again with reproduce=DIR"
        problems.append(Problem(path="--experimental-rerun", message=message, hint=hint))
    if known.multirun or any(word.lstrip("+~").startswith("hydra") for word in argv):
        given = [Path(place) for place in (known.config_dir, known.config_path) if place]
        problems += check_files([PROJECT_ROOT / "conf", PROJECT_ROOT / "sweeps", *given])
    refuse(problems)


def _quote(folder: Path) -> str:
    """A path as a value in Hydra's grammar.

    Raises:
        UserError: if it can't be written as one.
    """
    text = str(folder)
    if "${" in text or ("'" in text and '"' in text) or not text.isprintable():
        message = "has a path that a config can't name"
        raise UserError([Problem(path=text, message=message, hint="rename the folder")])
    return f'"{text}"' if "'" in text else f"'{text}'"


def _place_of_task(task: str, folder: Path, settings: Mapping[str, str]) -> list[str]:
    """Where a task about the run in `folder` writes: an evaluation in a folder of its own.

    Raises:
        UserError: if another is given to a task that has none.
    """
    given = settings.get("hydra.run.dir")
    if task == "evaluate":
        place = f"{folder}/evaluations/${{now:%Y-%m-%dT%H-%M-%S-%f}}"
        return [] if given is not None else [f"hydra.run.dir='{place}'"]
    if given is not None:
        message = f"is the run's own with task={task} (got {given})"
        hint = "leave it out" if task != "export" else "use export.target=DIR"
        raise UserError([Problem(path="hydra.run.dir", message=message, hint=hint)])
    return [f"hydra.run.dir={_quote(folder)}"]


def find_unfinished(outputs: Path) -> Path:
    """The run below `outputs`, sweeps aside, that was started last and has not completed.

    Raises:
        UserError: if there is none.
    """
    found = [
        snapshot
        for pattern in (f"*/{SNAPSHOT_NAME}.yaml", f"*/*/{SNAPSHOT_NAME}.yaml")
        for snapshot in outputs.glob(pattern)
        if snapshot.relative_to(outputs).parts[0] != "sweeps"
        and _status_of(snapshot.parent) not in COMPLETED
    ]
    if not found:
        message = f"there is no unfinished run in {outputs.resolve()}"
        hint = "name its directory: resume=DIR; or, to start or go on in one: resume=auto"
        hint += " hydra.run.dir=DIR"
        raise UserError([Problem(path="resume", message=message, hint=hint)])
    return max(found, key=lambda snapshot: snapshot.stat().st_mtime).parent.resolve()


def _status_of(folder: Path) -> str | None:
    try:
        values = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("status") if isinstance(values, dict) else None


def write_scratch(folder: Path, settings: Mapping[str, str], *, scratch: Path, kind: str) -> None:
    """Write the config that Hydra composes in place of a snapshot's: snapshot.yaml in `scratch`.

    A section whose option is chosen on the command line is that option's; what follows from a
    setting that is given is derived again.

    Args:
        settings: what the command line gives, by key.
        kind: the word of ABOUT_A_RUN that names the folder.

    Raises:
        UserError: if `folder` holds no snapshot, or one that holds a secret.
    """
    values = to_plain(as_written(load_snapshot(folder / f"{SNAPSHOT_NAME}.yaml")))
    refuse(secret_problem(path) for path in find_secrets(values))
    chosen = [group for group in list_groups() if group in settings]
    if kind == "run" and settings.get("task") == "evaluate":
        _evaluate_instead(values, folder, settings)
    if kind == "reproduce":
        _quote(folder)  # it must be one that a config can name
        values["reproduce_of"] = str(folder)
    _derive_again(values, settings, chosen)
    for group in chosen:
        named = settings_of_option(group, settings[group])
        kept = [key for key in KEPT.get(group, ()) if f"{group}.{key}" not in named]
        values[group] = {key: values[group][key] for key in kept}
    document: dict[str, Any] = {"defaults": DEFAULTS, **values}
    if chosen:
        document["defaults"] = [DEFAULTS[0], *({group: None} for group in chosen), DEFAULTS[1]]
        document["hydra"] = {"searchpath": [f"file://{PROJECT_ROOT / 'conf'}"]}
    (scratch / f"{SNAPSHOT_NAME}.yaml").write_text(render_document(document), encoding="utf-8")


def _evaluate_instead(values: dict[str, Any], folder: Path, settings: Mapping[str, str]) -> None:
    """Make a run's values those of its evaluation: its own tokenizer, all rows, no accumulation."""
    tokenizer = {"name": "pretrained", "path": str(folder / "tokenizer")}
    values["tokenizer"] = tokenizer
    values["train"]["eval_rows"] = None
    micro = values["batch"]["micro_batch_size"]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        planned = plan["batch"]["micro_batch_size"]
        micro = planned if isinstance(planned, int) else micro  # a text could be an interpolation
    values["batch"] = {"micro_batch_size": micro or 1, "gradient_accumulation_steps": 1}
    if any(key.startswith("data.") for key in settings):  # on purpose other data
        values["data"]["hash"] = None


def _derive_again(
    values: dict[str, Any], settings: Mapping[str, str], chosen: Sequence[str]
) -> None:
    """Forget what a snapshot has derived from settings that are given anew."""
    launch, zero = values["launch"], values["zero"]
    if {"launch.num_processes", "launch.device"} & {*settings} or "launch" in chosen:
        launch |= dict.fromkeys(("threads_per_process", "bind_cores", "device_memory"))
        if zero["zero_hpz_partition_size"] != 1:
            zero["zero_hpz_partition_size"] = None
    if settings.get("checkpoint.every_steps") == "null":  # nothing is left to save beside
        values["checkpoint"]["asynchronous"] = None
    stage = settings.get("zero.stage", "")
    if stage.isdigit() and int(stage) != zero["stage"] and "zero" not in chosen:
        values["zero"] = settings_of_stage(zero, int(stage))
    elif {"model", "optim"} & {*chosen}:
        zero |= dict.fromkeys(DERIVED_OF_ZERO)
    if "optim" in chosen:
        values["train"]["gradient_clipping"] = None


def settings_of_stage(zero: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """What of the section `zero` another stage reads; the rest, and derived sizes, are left out."""
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
