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

import yaml

from llama_pretrain.config.compose import PROJECT_ROOT, SNAPSHOT_NAME, list_groups
from llama_pretrain.config.deepspeed import Zero, stages_of
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.snapshot import DEFAULTS, load_snapshot, render_snapshot, to_plain

ABOUT_A_RUN = ("resume", "reproduce", "run")
"""Words of the command line that name a run's directory."""
AUTO = "auto"
MULTIRUN = {"-m", "--multirun"}
KEPT = {"data": ("sequence_length", "cache_dir")}
"""What of a snapshot's section stays where another option of its group is chosen."""
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
        UserError: if DIR holds no snapshot that is safe to hand to Hydra.
    """
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
    write_scratch(folder, settings, scratch=scratch, evaluates=kind == "run" and task == "evaluate")
    ours: list[str] = []
    if kind == "resume":
        ours = [f"hydra.run.dir='{folder}'", f"resume.run_dir='{folder}'"]
    if kind == "run":
        ours = [*_place_of_task(task, folder, settings), f"of_run='{folder}'"]
    set_already = {*settings, *(word.partition("=")[0] for word in ours)}
    ours = [word for word in HYDRA_SETTINGS if word.partition("=")[0] not in set_already] + ours
    words = ["--config-dir", str(scratch), "--config-name", SNAPSHOT_NAME]
    for word in argv:  # in its place: Hydra wants all overrides in one row, behind its flags
        words += ours if word.lstrip("+").partition("=")[0] == kind else [word]
    return words


def is_sweep(argv: Sequence[str]) -> bool:
    """Whether a command line asks for several runs, and for nothing that only Hydra knows."""
    flags = {word for word in argv if word.startswith("-")}
    if flags - {*MULTIRUN, "--config-dir", "--config-name"}:  # --cfg, --info, ...
        return False
    named = any(word.startswith("sweep=") and word not in ("sweep=null", "sweep=") for word in argv)
    return named or "hydra.mode=MULTIRUN" in argv or bool(flags & MULTIRUN)


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
    return [f"hydra.run.dir='{folder}'"]


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
        and _status_of(snapshot.parent) != "completed"
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


def write_scratch(
    folder: Path, settings: Mapping[str, str], *, scratch: Path, evaluates: bool
) -> None:
    """Write the config that Hydra composes in place of a snapshot's: snapshot.yaml in `scratch`.

    A section whose option is chosen on the command line is that option's; what follows from a
    setting that is given is derived again.

    Args:
        settings: what the command line gives, by key.

    Raises:
        UserError: if `folder` holds no snapshot.
    """
    snapshot = load_snapshot(folder / f"{SNAPSHOT_NAME}.yaml")
    values = to_plain(snapshot)
    chosen = [group for group in list_groups() if group in settings]
    if evaluates:
        _evaluate_instead(values, folder, settings)
    _derive_again(values, settings, chosen)
    for group in chosen:
        kept = {key: values[group][key] for key in KEPT.get(group, ())}
        values[group] = kept
    text = render_snapshot(snapshot)
    if values != to_plain(snapshot):
        defaults = [DEFAULTS[0], *({group: None} for group in chosen), DEFAULTS[1]]
        place = {"searchpath": [f"file://{PROJECT_ROOT / 'conf'}"]}
        document = {"defaults": defaults, "hydra": place, **values}
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (scratch / f"{SNAPSHOT_NAME}.yaml").write_text(text, encoding="utf-8")


def _evaluate_instead(values: dict[str, Any], folder: Path, settings: Mapping[str, str]) -> None:
    """Make a run's values those of its evaluation: its own tokenizer, all rows, no accumulation."""
    tokenizer = {"name": "pretrained", "path": str(folder / "tokenizer")}
    values["tokenizer"] = tokenizer
    values["train"]["eval_rows"] = None
    micro = values["batch"]["micro_batch_size"]
    with contextlib.suppress(OSError, ValueError, KeyError):
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        micro = plan["batch"]["micro_batch_size"]
    values["batch"] = {"micro_batch_size": micro or 1, "gradient_accumulation_steps": 1}
    if any(key.startswith("data.") for key in settings):  # on purpose other data
        values["data"]["hash"] = None


def _derive_again(
    values: dict[str, Any], settings: Mapping[str, str], chosen: Sequence[str]
) -> None:
    """Forget what a snapshot has derived from settings that are given anew."""
    launch, zero = values["launch"], values["zero"]
    if {"launch.num_processes", "launch.device"} & {*settings} or "launch" in chosen:
        launch |= {"threads_per_process": None, "device_memory": None}
        if zero["zero_hpz_partition_size"] != 1:
            zero["zero_hpz_partition_size"] = None
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
