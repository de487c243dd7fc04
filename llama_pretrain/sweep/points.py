"""A sweep's command line -> its points, each composed, checked and planned before any starts."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, open_dict

from llama_pretrain import console
from llama_pretrain.config.compose import (
    COMPOSE_ERRORS,
    PROJECT_ROOT,
    SNAPSHOT_NAME,
    explain,
    name_run,
    read_config,
    trace_settings,
)
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import as_written, to_plain
from llama_pretrain.data.cache import disk_problems
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import Corpus, Plan, build_plan, check_fits
from llama_pretrain.plan.resolve import describe_choices
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.sweep.directory import PointRecord, SweepDir, Verdict
from llama_pretrain.tasks.run import check_everything, plan_training
from llama_pretrain.tasks.run_directory import snapshot_of

BASIC = "basic"
"""Hydra's own launcher and sweeper, in whose place we run points one after another."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A sweep's command line, with what all its points share."""

    folder: str
    """Where Hydra's primary config lies."""
    name: str
    words: list[str]
    """Overrides of the run; those of Hydra itself are apart."""
    hydra_words: list[str]
    base: DictConfig
    """The config without what is swept, and Hydra's own in `base.hydra`."""

    @property
    def fixed(self) -> list[str]:
        """Overrides that all points share."""
        parsed = _parse(self.words)
        return [str(word.input_line) for word in parsed if not word.is_sweep_override()]

    @property
    def run_config(self) -> DictConfig:
        """The config without Hydra's own."""
        return drop_hydra(self.base.copy())

    @property
    def launcher(self) -> str:
        """The option of hydra/launcher."""
        return str(self.base.hydra.runtime.choices["hydra/launcher"])

    @property
    def sweeper(self) -> str:
        """The option of hydra/sweeper."""
        return str(self.base.hydra.runtime.choices["hydra/sweeper"])


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """A point as it was planned."""

    index: int
    words: list[str]
    label: str
    settings: dict[str, str]
    run: Run | None = None
    plan: Plan | None = None
    problem: str = ""
    verdict: Verdict = Verdict.runs
    snapshot: str = ""
    """The text of the snapshot that it will have: its identity."""
    origins: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Eight digits of the identity."""
        return hashlib.sha256(self.snapshot.encode()).hexdigest()[:8]

    def record(self, folder: SweepDir) -> PointRecord:
        """Its line of sweep.json: in the folder that it had before, or in a new one."""
        name = ""
        if self.verdict is Verdict.runs:
            before = sorted(folder.path.glob(f"*-{self.digest}/"))
            label = name_run([self.label])
            name = before[0].name if before else f"{self.index:02d}-{label}-{self.digest}"
        return PointRecord(
            index=self.index,
            label=self.label,
            settings=self.settings,
            words=self.words,
            verdict=self.verdict,
            reason=self.problem,
            folder=name,
        )


def read_command(argv: Sequence[str]) -> Command:
    """Understand a sweep's command line, and compose what its points share.

    Raises:
        UserError: with all mistakes in that.
    """
    given = get_args_parser().parse_known_args(list(argv))[0]
    folder, name = given.config_path or str(PROJECT_ROOT / "conf"), given.config_name or "config"
    parsed = _parse(given.overrides)
    fixed = [str(word.input_line) for word in parsed if not word.is_sweep_override()]
    about_hydra = [word for word in given.overrides if re.match(r"[+~]*hydra[./=]", word)]
    try:
        base = compose(folder, name, fixed)
    except COMPOSE_ERRORS as error:
        problems = explain_plugin(str(error)) or explain([*_flags(folder, name), *fixed], error)[0]
        raise UserError(problems) from error
    words = [word for word in given.overrides if word not in about_hydra]
    return Command(folder=folder, name=name, words=words, hydra_words=about_hydra, base=base)


EXTRAS = {
    "optuna": "optuna",
    "joblib": "joblib",
    "submitit_slurm": "slurm",
    "submitit_local": "slurm",
}
"""Where Hydra's plugins come from."""


def explain_plugin(error: str) -> list[Problem]:
    """A launcher or sweeper of Hydra's that isn't there."""
    missing = re.search(r"Could not find 'hydra/(launcher|sweeper)(?:/sampler)?/(\w+)'", error)
    if missing is None:
        return []
    group, option = f"hydra/{missing[1]}", missing[2]
    extra = EXTRAS.get("optuna" if missing[1] == "sweeper" else option)
    hint = f"it comes with an extra: pip install -e '.[{extra}]'" if extra else ""
    options = re.findall(r"^\t(\w+)$", error, re.M)
    hint = hint or f"options: {', '.join(options)}"
    return [Problem(path=group, message=f"there is no option {option!r}", hint=hint)]


def _flags(folder: str, name: str) -> list[str]:
    """Hydra's flags for a primary config that isn't its usual one: a snapshot."""
    return ["--config-path", folder, "--config-name", name] if name == SNAPSHOT_NAME else []


def compose(folder: str, name: str, words: Sequence[str]) -> DictConfig:
    """A config with Hydra's own in it."""
    before = get_gh_backup()  # a sweeper may be at work, with one of its own
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(folder, version_base="1.3"):
            return hydra.compose(name, overrides=list(words), return_hydra_config=True)
    finally:
        restore_gh_from_backup(before)


def drop_hydra(config: DictConfig) -> DictConfig:
    """Leave of a config the part that is a run's: a copy would take as long as all our checks."""
    with open_dict(config):
        config.pop("hydra", None)
    return config


def list_points(command: Command) -> list[SweepPoint]:
    """The points of a sweep over all combinations, not looked into yet.

    Raises:
        UserError: if nothing is swept, or not over listed values.
    """
    params = _swept_by_file(command)
    overrides = _parse([*params, *command.words])
    swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    try:
        (batch,) = BasicSweeper.split_arguments(overrides, None)
    except HydraException as error:
        hint = "list the values, or let Optuna choose: hydra/sweeper=optuna"
        raise UserError([Problem(path="sweep", message=str(error), hint=hint)]) from error
    return [make_point(index, words, swept) for index, words in enumerate(batch)]


def make_point(index: int, words: Sequence[str], swept: Sequence[str]) -> SweepPoint:
    """A point by its overrides; `swept` are the keys in which points differ."""
    settings = {}
    for word in words:
        key, _, value = word.partition("=")
        if key in swept:
            settings[key] = value
    told = [f"{key}={shorten(value)}" for key, value in settings.items()]
    label = ",".join(told) or "the only point"
    return SweepPoint(index=index, words=list(words), label=label, settings=settings)


def shorten(value: str) -> str:
    """A number that a sampler has drawn, in four digits."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 and "." in value else value
    except ValueError:
        return value


def _swept_by_file(command: Command) -> list[str]:
    """Overrides in `hydra.sweeper.params`, but for those that the command line gives as well."""
    given = {override.key_or_group for override in _parse(command.words)}
    params = command.base.hydra.sweeper.get("params") or {}
    return [f"{key}={params[key]}" for key in params if str(key) not in given]


def _parse(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


def check_point(point: SweepPoint, command: Command, machine: Machine) -> SweepPoint:
    """A point that is composed, and checked and planned as far as that needs no data."""
    try:
        config = compose(command.folder, command.name, point.words)
        return check_config(point, config, command=command, machine=machine)
    except COMPOSE_ERRORS as error:
        problems, _ = explain([*_flags(command.folder, command.name), *point.words], error)
    except UserError as error:
        problems = error.problems
    return _refuse(point, problems)


def check_config(
    point: SweepPoint, config: DictConfig, *, command: Command, machine: Machine
) -> SweepPoint:
    """The same of a point whose config is composed; its part that is Hydra's is taken out.

    Raises:
        UserError: with all its mistakes.
    """
    is_snapshot = command.name == SNAPSHOT_NAME
    choices: Mapping[str, Any] = {} if is_snapshot else config.hydra.runtime.choices
    origins = trace_settings(point.words, choices)
    before = read_config(drop_hydra(config))
    run, problems = check_everything(before, machine)
    refuse(problems)
    if run.task.value != command.base.task:
        message = f"is the same for all points of a sweep (got {run.task.value})"
        raise UserError([Problem(path="task", message=message)])
    plan = build_plan(run, None)
    point = replace(point, run=run, plan=plan, origins={**origins, **describe_choices(before, run)})
    unfit = list(check_fits(run, plan))
    if unfit:
        return replace(point, verdict=Verdict.unfit, problem=unfit[0].message)
    return point


def _refuse(point: SweepPoint, problems: Sequence[Problem]) -> SweepPoint:
    text = "; ".join(str(problem) for problem in problems)
    return replace(point, verdict=Verdict.refused, problem=text, run=None, plan=None)


class Corpora:
    """The corpora of a sweep's points, each prepared once."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def of(self, run: Run) -> Corpus:
        """The corpus of a run.

        Raises:
            UserError: if it can't be prepared.
        """
        from llama_pretrain.data.corpus import describe_corpus, prepare_sources  # tokenizers

        plain = to_plain(run)
        recipe = repr([plain[name] for name in ("data", "tokenizer", "seed")])
        recipe += repr(run.model.vocab_size)
        if recipe not in self._known:
            with disk_problems(run.data.cache_dir):
                self._known[recipe] = prepare_sources(run, report=console.DataReport())
        return describe_corpus(run, *self._known[recipe])


def plan_point(point: SweepPoint, corpora: Corpora, folder: SweepDir) -> SweepPoint:
    """A point with its whole plan, that of its data too."""
    if point.run is None or point.verdict is not Verdict.runs:
        return point
    run = as_written(point.run)
    try:
        corpus = corpora.of(run)
        plan = build_plan(run, corpus)
        plan = plan_training(run, plan, run_dir=RunDir(folder.path), origins=point.origins)
    except UserError as error:
        return _refuse(point, error.problems)
    return replace(point, plan=plan, snapshot=snapshot_of(run, corpus))


def name_sweep(argv: Sequence[str]) -> str:
    """A folder name for a sweep: the same for the same command, whatever runs its points."""
    words = sorted({word for word in argv if not re.match(r"-|[+~]*hydra[./]", word)})
    named = next((word[6:] for word in words if word.startswith("sweep=")), "sweep")
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return f"{name_run([named])}-{digest}"


def sweep_folder(command: Command, argv: Sequence[str]) -> SweepDir:
    """Where a sweep lies: as given, or by its command."""
    if any(word.startswith("hydra.sweep.dir=") for word in argv):
        return SweepDir(Path(str(command.base.hydra.sweep.dir)).expanduser().resolve())
    return SweepDir(Path("outputs/sweeps").resolve() / name_sweep(argv))
