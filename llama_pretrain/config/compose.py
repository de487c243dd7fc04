"""Between Hydra and a checked `Run`: registration, the command line, and errors that teach."""

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_pretrain.config import data, schema
from llama_pretrain.config.deepspeed import Zero, stages_of
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.rules import flatten, parse_values, schema_paths, unknown_key
from llama_pretrain.config.schema import Run
from llama_pretrain.config.snapshot import DEFAULTS, load_snapshot, render_snapshot, to_plain

PROJECT_ROOT = Path(__file__).resolve().parents[2]
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises for a user's mistake: `zero=null` is a ValueError to it."""
SNAPSHOT_NAME = "snapshot"
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML has it: some ten times as fast."""
OVERLAYS = ("experiment", "sweep", "debug")
"""Groups whose options name settings of the others; applied last."""
ABOUT_A_RUN = ("resume", "reproduce", "run")
"""Words of the command line that name a run's directory."""
AUTO = "auto"
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


def register() -> None:
    """Tell Hydra of the schema and of our two resolvers."""
    schema.register()
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("run_name", name_run, replace=True)


def name_run(overrides: Sequence[str]) -> str:
    """A folder name for a sweep's point: safe characters, at most 80, and a hash where cut."""
    text = ",".join(overrides)
    safe = re.sub(r"[^A-Za-z0-9=.,_-]+", "-", text).strip("-") or "run"
    if len(safe) <= 80:
        return safe
    return f"{safe[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


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
    swept = {"-m", "--multirun"} & set(others)
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


def list_groups() -> list[str]:
    """Groups whose options are sections of a run."""
    folders = [path.name for path in (PROJECT_ROOT / "conf").iterdir() if path.is_dir()]
    return sorted({*folders} - {*OVERLAYS})


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


def read_config(config: DictConfig) -> Run:
    """A composed config, resolved and checked.

    Raises:
        UserError: with all mistakes at once.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        path = str(error.full_key or "")
        raise UserError([Problem(path=path, message=str(error).split("\n")[0])]) from error
    assert isinstance(values, dict)
    return parse_values({str(key): value for key, value in values.items()})


def trace_settings(overrides: Sequence[str], choices: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting is from that isn't left at the schema's default.

    Args:
        overrides: words of the command line.
        choices: the option of each group, as Hydra has them; none for a snapshot.

    Returns:
        `zero/stage3.yaml`, `experiment/llama2_7b.yaml`, `config.yaml`, `snapshot.yaml` or
        `command line`, by dotted path; a path may stand for all settings below it.
    """
    origins: dict[str, str] = {}
    if not choices:
        origins = {path: f"{SNAPSHOT_NAME}.yaml" for path, _ in schema_paths()}
    overlays = [group for group in OVERLAYS if choices.get(group)]
    groups = [group for group in choices if group not in OVERLAYS and "/" not in group]
    for group in (*groups, "", *overlays):
        name = f"{group}/{choices[group]}" if group else "config"
        for root in (PROJECT_ROOT / "conf", PROJECT_ROOT / "sweeps"):
            file = root / f"{name}.yaml"
            if file.is_file():
                values = yaml.load(file.read_text(encoding="utf-8"), Loader=YAML_LOADER) or {}
                prefix = f"{group}." if group in groups else ""
                origins |= {path: f"{name}.yaml" for path, _ in flatten(values, prefix)}
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if not choices and key in list_groups():
            origins = {path: of for path, of in origins.items() if not path.startswith(f"{key}.")}
            origins |= _settings_of_option(key, value)
        elif key not in choices:
            origins[key] = "command line"
    return origins


def _settings_of_option(group: str, option: str) -> dict[str, str]:
    """The settings that an option of a group names, each with the file's name."""
    file = PROJECT_ROOT / "conf" / group / f"{option}.yaml"
    if not file.is_file():
        return {}
    values = yaml.load(file.read_text(encoding="utf-8"), Loader=YAML_LOADER) or {}
    return {path: f"{group}/{option}.yaml" for path, _ in flatten(values, f"{group}.")}


def explain(argv: Sequence[str], error: BaseException) -> tuple[list[Problem], Run | None]:
    """All mistakes of a command line that Hydra refused, and the run that the rest describes.

    Hydra stops at the first; here each override is tried on its own.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    known = get_args_parser().parse_known_args(list(argv))[0]
    folder = known.config_dir or str(PROJECT_ROOT / "conf")
    name = known.config_name or "config"
    if known.multirun or known.config_path or (known.config_dir and name != SNAPSHOT_NAME):
        return [Problem(path="", message=_tidy(_whole_text(error)))], None
    problems: list[Problem] = []
    good: list[str] = []
    GlobalHydra.instance().clear()
    with initialize_config_dir(folder, version_base="1.3"):
        try:
            compose(name)
        except COMPOSE_ERRORS as broken:
            return [Problem(path=folder, message=_tidy(_whole_text(broken)))], None
        # Choices of groups first: what a setting may be depends on them.
        groups = {path.name for path in (PROJECT_ROOT / "conf").iterdir() if path.is_dir()}
        overrides = [word for word in known.overrides if not word.startswith("hydra")]
        for override in sorted(overrides, key=lambda word: word.split("=")[0] not in groups):
            try:
                compose(name, overrides=[*good, override])
                good.append(override)
            except COMPOSE_ERRORS as broken:
                problems.append(
                    explain_override(override, _whole_text(broken), options=name != SNAPSHOT_NAME)
                )
        config = compose(name, overrides=good)
    if not problems:
        return [Problem(path="", message=_tidy(_whole_text(error)))], None
    try:
        return problems, read_config(config)
    except UserError as more:
        return problems + more.problems, None


def explain_override(override: str, error: str, *, options: bool) -> Problem:
    """One override that Hydra refused with `error`, as a problem.

    Args:
        options: whether there are overlays to choose from; a snapshot has none.
    """
    key, _, value = override.lstrip("+~").partition("=")
    if "Ambiguous value" in error:
        hint = "to run each of them, add --multirun; to set a list, write [a,b]"
        return Problem(path=key, message=f"has several values (got {value})", hint=hint)
    available = re.search(r"Available options in '[^']*':((?:\n\t\S+)+)", error)
    not_text = "override must be a string" in error  # zero=3, zero=null
    if available is not None or not_text:
        names = sorted(path.stem for path in (PROJECT_ROOT / "conf" / key).glob("*.yaml"))
        names = names if available is None else available.group(1).split()
        ends = [name for name in names if name.endswith(value)]
        close = difflib.get_close_matches(value.lower(), names, n=1) or ends[:1]
        hint = f"did you mean {key}={close[0]}? " if close else ""
        hint += f"{'O' if close else 'o'}ptions: {', '.join(names)}"
        return Problem(
            path=key,
            message=f"there is no option {value!r}",
            hint=hint,
        )
    inner = re.search(r"Key '(\w+)' not in '(Source|Stage)'", error)
    if inner is not None:
        names = [item.name for item in fields(getattr(data, inner[2]))]
        close = difflib.get_close_matches(inner[1], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"
        message = f"a {inner[2].lower()} has no setting {inner[1]!r} (got {override})"
        return Problem(path=key, message=message, hint=hint)
    if not options and key in OVERLAYS:
        message = f"a snapshot has values and no options (got {override})"
        return Problem(path=key, message=message, hint="set values one by one: SETTING=VALUE")
    if "Could not override" in error or re.search(r"Key '.*' (is )?not in", error):
        return unknown_key(key, seen=override)
    if "could not be converted" in error or "Invalid value" in error or "Invalid type" in error:
        wanted = dict(schema_paths()).get(key)
        hint = _type_hint(key, wanted, value)
        return Problem(path=key, message=_wrong_type(error, value), hint=hint)
    return Problem(path=key, message=f"{_tidy(error)} (got {override})")


def _wrong_type(error: str, value: str) -> str:
    wanted = re.search(r"could not be converted to (\w+)", error)
    if wanted is not None:
        kind = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
        return f"should be {kind.get(wanted.group(1), wanted.group(1))} (got {value})"
    options = re.search(r"expected one of \[(.*?)\]", error)
    if options is not None:
        return f"should be one of {options.group(1)} (got {value})"
    return f"has the wrong type (got {value})"


def _type_hint(key: str, wanted: Any, value: str) -> str:
    if wanted is None:
        inside = [path for path, _ in schema_paths() if path.startswith(f"{key}.")]
        return f"it is a section: set {inside[0]}, say" if inside else ""
    kind = wanted.type
    if "int" in str(kind) and re.fullmatch(r"\d+(\.\d*)?(e\d+)?", value):
        return f"write {int(float(value)):_}"
    if value == "auto" and _allows_null(kind):
        return "set it to null: then it is derived, and the plan says from what"
    if "list" in str(kind):
        return f"write a list: {key}=[{value}]"
    return ""


def _allows_null(kind: Any) -> bool:
    return kind is NoneType or any(_allows_null(part) for part in get_args(kind))


def _whole_text(error: BaseException) -> str:
    """What an exception and its causes say: Hydra wraps the telling one."""
    cause = error.__cause__
    return str(error) if cause is None else f"{error}\n{_whole_text(cause)}"


def _tidy(text: str) -> str:
    """Hydra's own words, without the empty lines and the keys that only Hydra needs."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n    ".join(
        line for line in lines if not line.startswith(("full_key:", "object_type="))
    )
