"""Between Hydra and a checked `Run`: registration, the command line, and errors that teach."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_pretrain.config import data
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.secrets import (
    find_secrets,
    is_secret_name,
    read_environment,
    secret_problem,
)
from llama_pretrain.config.snapshot import NO_TEXT, YAML_LOADER
from llama_pretrain.config.validate import flatten, parse_values, schema_paths, unknown_key

PROJECT_ROOT = Path(__file__).resolve().parents[2]
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises for a user's mistake: `zero=null` is a ValueError to it."""
SNAPSHOT_NAME = "snapshot"
OVERLAYS = ("experiment", "sweep", "debug")
"""Groups whose options name settings of the others; applied last."""


def register() -> None:
    """Tell Hydra of the schema and of our resolvers; `oc.env` reads no secret."""
    ConfigStore.instance().store(name="run_schema", node=Run)
    OmegaConf.register_new_resolver("oc.env", read_environment, replace=True)
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("run_name", name_run, replace=True)


def name_run(overrides: Sequence[str]) -> str:
    """A folder name for a sweep's point: safe characters, at most 80, and a hash where cut."""
    text = ",".join(overrides)
    safe = re.sub(r"[^A-Za-z0-9=.,+_-]+", "-", text).strip("-") or "run"
    if len(safe) <= 80:
        return safe
    return f"{safe[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def list_groups() -> list[str]:
    """Groups whose options are sections of a run."""
    folders = [path.name for path in (PROJECT_ROOT / "conf").glob("*") if path.is_dir()]
    return sorted({*folders} - {*OVERLAYS})


def read_config(config: DictConfig) -> Run:
    """A composed config, resolved and checked.

    Raises:
        UserError: with all mistakes at once.
    """
    refuse(_secret_interpolations(OmegaConf.to_container(config, resolve=False)))
    try:
        values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        path = str(error.full_key or "")
        raise UserError([Problem(path=path, message=str(error).split("\n")[0])]) from error
    assert isinstance(values, dict)
    refuse(secret_problem(path) for path in find_secrets(values))
    refuse(
        Problem(path=path, message="has a text that a snapshot can't keep", hint="leave out ${")
        for path, text in texts_of(values)
        if "${" in text or NO_TEXT.search(text)
    )
    return parse_values({str(key): value for key, value in values.items()})


def _secret_interpolations(raw: Any) -> Iterator[Problem]:
    """Settings that would take a secret out of the environment, before they are resolved."""
    for path, text in texts_of(raw):
        names = re.findall(r"oc\.env: *['\"]?([A-Za-z_]\w*)", text)
        if names and (is_secret_name(path) or any(is_secret_name(name) for name in names)):
            yield secret_problem(path)


def texts_of(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and text of every string in plain nested values, those in lists too."""
    if isinstance(values, dict):
        for key, item in values.items():
            yield from texts_of(item, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for number, item in enumerate(values):
            yield from texts_of(item, f"{path}.{number}")
    elif isinstance(values, str):
        yield path, values


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
            prefix = f"{group}." if group in groups else ""
            origins |= dict.fromkeys(_settings_in(file, prefix), f"{name}.yaml")
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if not choices and key in list_groups():
            origins = {path: of for path, of in origins.items() if not path.startswith(f"{key}.")}
            origins |= settings_of_option(key, value)
        elif key not in choices:
            origins[key] = "command line"
    return origins


def settings_of_option(group: str, option: str) -> dict[str, str]:
    """The settings that an option of a group names, each with the file's name."""
    file = PROJECT_ROOT / "conf" / group / f"{option}.yaml"
    return dict.fromkeys(_settings_in(file, f"{group}."), f"{group}/{option}.yaml")


@cache  # the points of a sweep share most files
def _settings_in(file: Path, prefix: str) -> tuple[str, ...]:
    """The settings that a YAML names; none where it isn't there."""
    if not file.is_file():
        return ()
    values = yaml.load(file.read_text(encoding="utf-8"), Loader=YAML_LOADER) or {}
    return tuple(path for path, _ in flatten(values, prefix))


def explain(argv: Sequence[str], error: BaseException) -> tuple[list[Problem], Run | None]:
    """All mistakes of a command line that Hydra refused, and the run that the rest describes.

    Hydra stops at the first; here each override is tried on its own.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    known = get_args_parser().parse_known_args(list(argv))[0]
    name = known.config_name or "config"
    folder = known.config_path or str(PROJECT_ROOT / "conf")
    if known.multirun or known.config_dir or (known.config_path and name != SNAPSHOT_NAME):
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
        groups = {*list_groups(), *OVERLAYS}
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
