"""Between Hydra and a checked `Run`."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.secrets import (
    find_secrets,
    is_secret_name,
    read_environment,
    secret_problem,
)
from llama_pretrain.config.snapshot import UNPRINTABLE
from llama_pretrain.config.validate import parse_values

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONF, SWEEPS = PROJECT_ROOT / "conf", PROJECT_ROOT / "sweeps"
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises for a user's mistake."""
OVERLAYS = ("experiment", "sweep", "debug")
"""Groups whose options set values in other groups; applied last."""


def register() -> None:
    """Register the schema and the resolvers with Hydra; `oc.env` reads no secret."""
    ConfigStore.instance().store(name="run_schema", node=Run)
    OmegaConf.register_new_resolver("oc.env", read_environment, replace=True)
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
    OmegaConf.register_new_resolver("run_name", name_run, replace=True)


def name_run(overrides: Sequence[str]) -> str:
    """A directory name for a job: safe characters, at most 80, and a hash if it was cut."""
    text = ",".join(overrides)
    safe = re.sub(r"[^A-Za-z0-9=.,+_-]+", "-", text).strip("-") or "run"
    if len(safe) <= 80:
        return safe
    return f"{safe[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def list_groups() -> list[str]:
    """Config groups whose options are sections of a run."""
    return sorted({path.name for path in CONF.iterdir() if path.is_dir()} - {*OVERLAYS})


def compose_run(overrides: Sequence[str], *, folder: Path = CONF, name: str = "config") -> Run:
    """The checked `Run` that overrides compose to, outside of a Hydra application.

    Raises:
        UserError: for mistakes in the composed config.
        COMPOSE_ERRORS: if Hydra cannot compose it.
    """
    register()
    with initialize_config_dir(str(folder), version_base="1.3"):
        return read_config(compose(name, overrides=list(overrides)))


def read_config(config: DictConfig) -> Run:
    """A composed config, resolved and checked.

    Raises:
        UserError: with all mistakes at once.
    """
    refuse(_find_secret_interpolations(OmegaConf.to_container(config, resolve=False)))
    try:
        values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        path = str(error.full_key or "")
        raise UserError([Problem(path=path, message=str(error).split("\n")[0])]) from error
    assert isinstance(values, dict)
    refuse(secret_problem(path) for path in find_secrets(values))
    refuse(
        Problem(path=path, message="holds text that a snapshot cannot hold", hint="Remove ${")
        for path, text in _texts_of(values)
        if "${" in text or UNPRINTABLE.search(text)
    )
    return parse_values({str(key): value for key, value in values.items()}, Run)


def _find_secret_interpolations(raw: Any) -> Iterator[Problem]:
    """Settings that would read a secret from the environment, before they are resolved."""
    for path, text in _texts_of(raw):
        names = re.findall(r"oc\.env: *['\"]?([A-Za-z_]\w*)", text)
        if names and (is_secret_name(path) or any(is_secret_name(name) for name in names)):
            yield secret_problem(path)


def _texts_of(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and text of every string in plain nested values, those in lists too."""
    if isinstance(values, dict):
        for key, item in values.items():
            yield from _texts_of(item, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for number, item in enumerate(values):
            yield from _texts_of(item, f"{path}.{number}")
    elif isinstance(values, str):
        yield path, values


def describe_compose_error(error: BaseException) -> str:
    """What Hydra says of a config that it cannot compose, without lines that only Hydra needs."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group} has no option {option!r}. Options: {', '.join(error.options)}"
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
        cause = cause.__cause__
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    return "\n    ".join(dict.fromkeys(kept))
