"""The jobs of a sweep: listed, composed, checked and planned before the first starts."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, open_dict

from llama_pretrain import console
from llama_pretrain.config.compose import (
    COMPOSE_ERRORS,
    describe_compose_error,
    name_run,
    read_config,
)
from llama_pretrain.config.origins import trace_settings
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import SNAPSHOT_NAME, to_plain, without_command
from llama_pretrain.data.cache import disk_problems
from llama_pretrain.launch.slurm import validate_job
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.nodes import submits_job
from llama_pretrain.plan.plan import (
    Corpus,
    Plan,
    build_plan,
    build_training_plan,
    validate_corpus,
    validate_memory,
)
from llama_pretrain.sweep.directory import JobRecord, SweepDir, Verdict
from llama_pretrain.tasks.run_directory import snapshot_of
from llama_pretrain.tasks.submit import at_nodes
from llama_pretrain.tasks.validate import resolve_valid


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """A job as it was planned."""

    index: int
    words: list[str]
    """All its overrides."""
    settings: dict[str, str]
    """Those that differ between jobs, by key."""
    run: ResolvedRun | None = None
    plan: Plan | None = None
    problem: str = ""
    verdict: Verdict = Verdict.runs
    snapshot: str = ""
    """The text of its snapshot: its identity."""
    origins: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The overrides that set it apart."""
        return ",".join(f"{k}={shorten(v)}" for k, v in self.settings.items()) or "the only job"

    def record(self, folder: SweepDir) -> JobRecord:
        """Its entry of sweep.json: with the directory that it had before, or a new one."""
        name, digest = "", hashlib.sha256(self.snapshot.encode()).hexdigest()
        if self.verdict is Verdict.runs:
            before = sorted(folder.path.glob(f"*-{digest[:8]}/"))
            new = f"{self.index:02d}-{name_run([self.label])}-{digest[:8]}"
            name = before[0].name if before else new
        return JobRecord(
            index=self.index,
            label=self.label,
            settings=self.settings,
            words=self.words,
            verdict=self.verdict,
            reason=self.problem,
            folder=name,
        )


def shorten(value: str) -> str:
    """A number that a sampler has drawn, in four digits."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 and "." in value else value
    except ValueError:
        return value


def list_jobs(words: Sequence[str], params: dict[str, Any]) -> list[SweepJob]:
    """The jobs of Hydra's basic sweeper: all combinations of listed values, in its order.

    Args:
        words: the overrides of the command.
        params: hydra.sweeper.params of the config; the command's own values replace them.

    Raises:
        UserError: if something is swept over a range without listed values.
    """
    given = _parse(words)
    keys = {override.key_or_group for override in given}
    defaults = [f"{key}={value}" for key, value in params.items() if key not in keys]
    overrides = [*_parse(defaults), *given]
    swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    choices = [list(_values(override)) for override in overrides]
    return [
        make_job(index, list(combination), swept)
        for index, combination in enumerate(itertools.product(*choices))
    ]


def _values(override: Override) -> Iterator[str]:
    """The words that an override stands for, as Hydra's basic sweeper writes them."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        value = "" if override.is_delete() else f"={override.get_value_element_as_str()}"
        yield f"{key}{value}"
        return
    if not override.is_discrete_sweep():
        message = f"has no listed values (got {override.input_line})"
        hint = "List the values, or let Optuna choose: hydra/sweeper=optuna"
        raise UserError([Problem(path=key, message=message, hint=hint)])
    for value in override.sweep_string_iterator():
        yield f"{key}={value}"


def make_job(index: int, words: list[str], swept: Sequence[str]) -> SweepJob:
    """A job by its overrides; `swept` are the keys that differ between jobs."""
    pairs = [word.partition("=")[::2] for word in words]
    return SweepJob(index=index, words=words, settings={k: v for k, v in pairs if k in swept})


def _parse(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


@dataclass(frozen=True)
class Primary:
    """Where Hydra finds the configs of a command."""

    folder: str
    name: str
    words: tuple[str, ...] = ()
    """Overrides of Hydra's search path."""

    @classmethod
    def of(cls, hydra: DictConfig | HydraConf) -> "Primary":
        """That of a command, from its own Hydra section."""
        sources = hydra.runtime.config_sources
        (folder,) = (item.path for item in sources if item.provider == "main")
        others = [
            f"'{item.schema}://{item.path}'"
            for item in sources
            if item.provider == "command-line" or item.provider.startswith("hydra.searchpath")
        ]
        words = (f"hydra.searchpath=[{','.join(others)}]",) if others else ()
        return cls(folder, str(hydra.job.config_name), words)


def compose_job(primary: Primary, words: Sequence[str]) -> DictConfig:
    """A job's config with Hydra's own in it, while Hydra's sweeper is at work with another."""
    before = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(primary.folder, version_base="1.3"):
            overrides = [*words, *primary.words]
            return compose(primary.name, overrides=overrides, return_hydra_config=True)
    finally:
        restore_gh_from_backup(before)


def check_job(job: SweepJob, primary: Primary, machine: Machine) -> SweepJob:
    """A job that is composed, checked, and planned as far as possible without data."""
    try:
        config = compose_job(primary, job.words)
        choices = {} if primary.name == SNAPSHOT_NAME else config.hydra.runtime.choices
        origins = trace_settings(job.words, choices)
        with open_dict(config):
            config.pop("hydra", None)
        run = read_config(config)
        if primary.name == SNAPSHOT_NAME and submits_job(run.launch):
            message = "cannot submit jobs that start from a snapshot"
            hint = "Run the sweep in an allocation, or with hydra/launcher=submitit_slurm"
            raise UserError([Problem(path="launch", message=message, hint=hint)])
        return check_run(job, run, origins, machine)
    except COMPOSE_ERRORS as error:
        problems = [Problem(path="", message=describe_compose_error(error))]
    except UserError as error:
        problems = error.problems
    return refuse_job(job, problems)


def check_run(job: SweepJob, run: Run, origins: dict[str, str], machine: Machine) -> SweepJob:
    """The same for a job whose config is composed.

    Raises:
        UserError: with all its mistakes.
    """
    submitted = submits_job(run.launch)
    if submitted:
        refuse(validate_job(run.launch.slurm))
        if run.sweep.prune:
            message = "compares jobs of one command, and launch=slurm submits each by itself"
            raise UserError([Problem(path="sweep.prune", message=message, hint="Set it to false")])
        run = at_nodes(run, machine.num_gpus)
    resolved = resolve_valid(run, machine)
    plan = build_plan(resolved)
    job = replace(job, run=resolved, plan=plan, origins=origins)
    unfit = list(validate_memory(resolved, plan))
    if unfit and not submitted:  # of the nodes' memory nothing is known here
        return replace(job, verdict=Verdict.unfit, problem=unfit[0].message)
    return job


def refuse_job(job: SweepJob, problems: Sequence[Problem]) -> SweepJob:
    """A job that will not run, with the reason."""
    text = "; ".join(str(problem) for problem in problems)
    return replace(job, verdict=Verdict.refused, problem=text, run=None, plan=None)


def plan_on_data(job: SweepJob) -> SweepJob:
    """A job with its plan on its data, which is prepared if it is not in the cache."""
    if job.run is None or job.verdict is not Verdict.runs:
        return job
    try:
        corpus = find_corpus(job.run)
        plan = build_training_plan(job.run, corpus)
        problems = list(validate_corpus(job.run, plan))
    except UserError as error:
        return refuse_job(job, error.problems)
    if problems:
        return refuse_job(job, problems)
    return replace(job, plan=plan, snapshot=snapshot_of(job.run, corpus))


def find_corpus(run: ResolvedRun) -> Corpus:
    """The corpus of a run; jobs of one process that read the same data prepare it once.

    Raises:
        UserError: if it cannot be prepared.
    """
    # numpy and tokenizers take 0.3 s, which `-m task=plan` need not pay
    from llama_pretrain.data.corpus import describe_corpus, prepare_sources

    plain, known = to_plain(without_command(run)), _prepared_sources()
    recipe = repr([plain[name] for name in ("data", "tokenizer", "seed")])
    recipe += repr(run.model.vocab_size)
    if recipe not in known:
        with disk_problems(run.data.cache_dir):
            known[recipe] = prepare_sources(run, report=console.DataReport())
    return describe_corpus(run, *known[recipe])


@cache
def _prepared_sources() -> dict[str, Any]:
    """Prepared sources of this process, by what they were made from."""
    return {}


def name_sweep(words: Sequence[str]) -> str:
    """A directory name for a sweep: the same for the same command, whatever runs its jobs."""
    kept = sorted({word for word in words if not re.match(r"-|[+~]*hydra[./]", word)})
    named = next((word[6:] for word in kept if word.startswith("sweep=")), "sweep")
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8]
    return str(Path("outputs/sweeps") / f"{name_run([named])}-{digest}")
