"""Reproduce a run: what has drifted since, and in how far the two runs are equal."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.config.origins import origin_of
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.secrets import known_secrets, redact_values
from llama_pretrain.config.snapshot import SNAPSHOT_NAME, load_snapshot, to_plain, without_command
from llama_pretrain.config.tasks import DriftPolicy
from llama_pretrain.config.validate import flatten
from llama_pretrain.files import read_json, write_json
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.agreement import Agreement, compare_rows, likeliest_cause
from llama_pretrain.runs.drift import Drift, Group, Made, find_drift, list_unknown, unasked
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row, read_metrics
from llama_pretrain.runs.status import Status
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.run_directory import describe_launch, hash_data_files

SNAPSHOT_FILE = f"{SNAPSHOT_NAME}.yaml"
MAX_SHOWN = 15
"""Drifts of a group beyond this number are only counted on the terminal."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What is known before workers start."""

    of: RunDir
    policy: DriftPolicy
    drifts: Sequence[Drift]
    unknown: Sequence[str]
    """What the earlier run's directory does not record."""


def find_reproduction(
    run: ResolvedRun, plan: TrainingPlan, context: TaskContext
) -> Reproduction | None:
    """Find and print what has drifted since the run that this one reproduces.

    An interrupted reproduction that is resumed stays one, with its own policy.

    Returns:
        `None` for a run that reproduces no other.

    Raises:
        UserError: with `drift=error`, for drift that can change a result and was not requested.
    """
    place, policy, requested_before = run.reproduce_of, run.drift, set[str]()
    if place is None and run.resume.run_dir is not None:
        place, policy, requested_before = _started(context.run_dir)
    if place is None:
        return None
    of = RunDir(Path(place))
    if policy is DriftPolicy.off:
        return Reproduction(of=of, policy=policy, drifts=[], unknown=[])

    def asked(path: str) -> bool:
        return path in requested_before or origin_of(path, context.origins) != SNAPSHOT_FILE

    before = read_made(of)
    now = Made(
        config=_settings(run),
        provenance=describe_launch(run, plan, context),
        plan={"corpus": asdict(plan.corpus)},
        files=hash_data_files(plan),
    )
    drifts, unknown = find_drift(before, now, asked=asked), list_unknown(before)
    reproduction = Reproduction(of=of, policy=policy, drifts=drifts, unknown=unknown)
    show_drift(reproduction)
    if policy is DriftPolicy.error:
        _refuse_drift(drifts)
    return reproduction


def _refuse_drift(drifts: Sequence[Drift]) -> None:
    hint = "To start anyway, add drift=warn"
    problems = [
        Problem(path=drift.path, message=f"was {drift.before} (got {drift.now})", hint=hint)
        for drift in unasked(drifts)
    ]
    if problems:
        raise UserError(problems)


def _started(run_dir: RunDir) -> tuple[str | None, DriftPolicy, set[str]]:
    """The run, the policy and the requested changes of an interrupted reproduction."""
    values = read_json(run_dir.reproduction) or {}
    try:
        asked = {item["path"] for item in values["drift"] if item["asked"]}
        return str(values["of"]), DriftPolicy(values["policy"]), asked
    except (ValueError, KeyError, TypeError):
        return None, DriftPolicy.warn, set()


def _settings(run: Run) -> dict[str, Any]:
    return dict(flatten(to_plain(without_command(run))))


def read_made(of: RunDir) -> Made:
    """What a run was made with. Its files may come from elsewhere: unreadable ones are left out."""
    try:
        config = _settings(load_snapshot(of.snapshot))
    except UserError:
        config = {}
    files = read_json(of.data_files) or {}
    return Made(
        config=config,
        provenance=read_json(of.provenance) or {},
        plan=read_json(of.plan) or {},
        files={name: item for name, item in files.items() if isinstance(item, dict)},
    )


def begin(reproduction: Reproduction, run_dir: RunDir) -> None:
    """Record which run is reproduced, so that it stays a reproduction if it is interrupted."""
    _write(reproduction, run_dir)


def finish(reproduction: Reproduction, run_dir: RunDir) -> tuple[Status, str]:
    """Compare the steps of the two runs and record the result. Returns the status and a text."""
    agreement = compare_rows(*(_rows(side) for side in (reproduction.of, run_dir)))
    cause = None
    if not agreement.compared:
        status = Status.completed
    elif agreement.is_equal:
        status = Status.reproduced
    else:
        status, cause = Status.diverged, likeliest_cause(reproduction.drifts, agreement)
    verdict = describe(agreement, reproduction, status=status, cause=cause)
    found = {
        "status": status.value,
        "verdict": verdict,
        "cause": None if cause is None else str(cause),
        "agreement": {**asdict(agreement), "compared": agreement.compared},
    }
    _write(reproduction, run_dir, **found)
    return status, verdict


def _rows(side: RunDir) -> list[Row]:
    """The rows of a run's metrics; none if they cannot be read."""
    try:
        return read_metrics(side.metrics)
    except OSError:
        return []


def describe(
    agreement: Agreement, reproduction: Reproduction, *, status: Status, cause: Drift | None
) -> str:
    """The result of the comparison, in one or a few lines."""
    of, steps = reproduction.of.path, agreement.equal_steps
    if status is Status.completed:
        return f"nothing to compare with: {of} has no readable steps"
    until = f"all {steps} steps"
    if agreement.steps_before != agreement.steps_now:
        until = f"the {agreement.compared} steps that both have"
        until += f" ({agreement.steps_before} there, {agreement.steps_now} here)"
    what = "loss, gradient norm and sample ids"
    if status is Status.reproduced:
        return f"reproduced: bitwise equal to {of} in {until}: {what}"
    if agreement.difference is not None:
        first = agreement.difference
        equal = f"bitwise equal up to step {steps}" if steps else "no step is equal"
        text = f"diverged from {of} at step {first.step}: {first}; {equal}"
    elif agreement.initial_weights is False:
        text = f"diverged from {of}: the initial weights differ"
    else:
        differing = agreement.evaluations - agreement.equal_evaluations
        text = f"diverged from {of}: equal in {until}, but {differing} evaluations differ"
    if agreement.difference is not None and agreement.initial_weights is False:
        text += "; the initial weights already differ"
    return f"{text}\n{_describe_cause(reproduction, cause)}"


def _describe_cause(reproduction: Reproduction, cause: Drift | None) -> str:
    if cause is not None:
        return f"the most likely cause ({cause.kind.value}): {cause}"
    if reproduction.policy is DriftPolicy.off:
        return "the cause is unknown: drift=off"
    if reproduction.unknown:
        missing = ", ".join(reproduction.unknown)
        return f"the cause is unknown: {reproduction.of.path} does not record {missing}"
    return "nothing has drifted: the device or a library may not be deterministic"


def _write(reproduction: Reproduction, run_dir: RunDir, **found: Any) -> None:
    empty = {"status": None, "verdict": None, "cause": None, "agreement": None}
    values = {
        "of": str(reproduction.of.path),
        "policy": reproduction.policy.value,
        "drift": [
            {
                "group": drift.group.value,
                "kind": drift.kind.value,
                "path": drift.path,
                "before": drift.before,
                "now": drift.now,
                "asked": drift.asked,
            }
            for drift in reproduction.drifts
        ],
        "unknown": list(reproduction.unknown),
        **empty,
        **found,
    }
    write_json(run_dir.reproduction, redact_values(values, known=known_secrets()))


def show_drift(reproduction: Reproduction, *, say: Callable[[str], None] = console.say) -> None:
    """The drift in its three groups."""
    say(f"drift since {reproduction.of.path}")
    for group in Group:
        drifts = [drift for drift in reproduction.drifts if drift.group is group]
        say(f"  {group.value}:{'' if drifts else ' none'}")
        for drift in drifts[:MAX_SHOWN]:
            say(f"    {drift.kind.value}: {drift}")
        if len(drifts) > MAX_SHOWN:
            say(f"    and {len(drifts) - MAX_SHOWN} more, in reproduction.json")
    if reproduction.unknown:
        say(f"  cannot be compared: {', '.join(reproduction.unknown)}")
