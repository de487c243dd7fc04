"""A run that does another one again: what has drifted before it starts, how far they are equal."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.config.compose import SNAPSHOT_NAME
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.secrets import known_secrets, redact_values
from llama_pretrain.config.snapshot import as_written, load_snapshot, to_plain
from llama_pretrain.config.tasks import DriftPolicy
from llama_pretrain.config.validate import flatten
from llama_pretrain.files import write_text
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.agreement import Agreement, compare_rows, likeliest_cause
from llama_pretrain.runs.drift import Drift, Group, Made, find_drift, list_unknown, unasked
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.provenance import read_provenance
from llama_pretrain.runs.status import Status

MAX_SHOWN = 15
"""Drifts of a group beyond these are only counted on the terminal."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What is known before the ranks start."""

    of: RunDir
    policy: DriftPolicy
    drifts: Sequence[Drift]
    unknown: Sequence[str]
    """What the earlier run's directory doesn't tell."""


def is_reproduction(run: Run, run_dir: RunDir) -> bool:
    """Whether a run does another one again, or goes on with doing so."""
    resumed = run.resume.run_dir is not None
    return run.reproduce_of is not None or (resumed and _begun(run_dir)[0] is not None)


def find_reproduction(
    run: Run,
    plan: Plan,
    run_dir: RunDir,
    *,
    provenance: Mapping[str, Any],
    files: Mapping[str, Mapping[str, str]],
    origins: Mapping[str, str],
) -> Reproduction | None:
    """Look at what has drifted, and say it. `None` for a run that does no other one again.

    A reproduction that was interrupted and is resumed goes on as one, with its own policy.

    Args:
        provenance, files: what this run is made with.
        origins: where each setting is from (config/compose.py).

    Raises:
        UserError: with `drift=error`, for drift that can change a result and that nobody asked for.
    """
    place, policy, asked_before = run.reproduce_of, run.drift, set[str]()
    if place is None and run.resume.run_dir is not None:
        place, policy, asked_before = _begun(run_dir)
    if place is None:
        return None
    of = RunDir(Path(place))
    if policy is DriftPolicy.off:
        return Reproduction(of=of, policy=policy, drifts=[], unknown=[])

    def asked(path: str) -> bool:
        return path in asked_before or _is_set(path, origins)

    before = read_made(of)
    now = Made(
        config=_settings(run),
        provenance=provenance,
        plan={"corpus": None if plan.corpus is None else asdict(plan.corpus)},
        files=files,
    )
    drifts, unknown = find_drift(before, now, asked=asked), list_unknown(before)
    reproduction = Reproduction(of=of, policy=policy, drifts=drifts, unknown=unknown)
    show_drift(reproduction)
    if policy is DriftPolicy.error:
        _refuse_drift(drifts)
    return reproduction


def _refuse_drift(drifts: Sequence[Drift]) -> None:
    hint = "to go on all the same, drift=warn"
    problems = [
        Problem(path=drift.path, message=f"was {drift.before} (got {drift.now})", hint=hint)
        for drift in unasked(drifts)
    ]
    if problems:
        raise UserError(problems)


def _is_set(path: str, origins: Mapping[str, str]) -> bool:
    """Whether the command line has a hand in a setting: it isn't simply the snapshot's."""
    name = path
    while name:
        if name in origins:
            return origins[name] != f"{SNAPSHOT_NAME}.yaml"
        name = name.rpartition(".")[0]
    return True  # of an option that was chosen


def _begun(run_dir: RunDir) -> tuple[str | None, DriftPolicy, set[str]]:
    """Of a reproduction that was interrupted: whose it is, its policy, what was asked for."""
    try:
        values = json.loads(run_dir.reproduction.read_text(encoding="utf-8"))
        asked = {item["path"] for item in values["drift"] if item["asked"]}
        return str(values["of"]), DriftPolicy(values["policy"]), asked
    except (OSError, ValueError, KeyError, TypeError):
        return None, DriftPolicy.warn, set()


def _settings(run: Run) -> dict[str, Any]:
    return dict(flatten(to_plain(as_written(run))))


def read_made(of: RunDir) -> Made:
    """What a run was made with. Its files may be from elsewhere: what can't be read is left out."""
    try:
        config = _settings(load_snapshot(of.snapshot))
    except UserError:
        config = {}
    files = _load(of.data_files)
    return Made(
        config=config,
        provenance=read_provenance(of),
        plan=_load(of.plan),
        files={name: item for name, item in files.items() if isinstance(item, dict)},
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def begin(reproduction: Reproduction, run_dir: RunDir) -> None:
    """Note whose reproduction a run is, so that it stays one where it is interrupted."""
    _write(reproduction, run_dir)


def finish(reproduction: Reproduction, run_dir: RunDir) -> tuple[Status, str]:
    """Compare the two runs' steps, and write down what was found. Returns the status and a text."""
    agreement = compare_rows(*(_rows(side) for side in (reproduction.of, run_dir)))
    cause = None
    if not agreement.compared:
        status = Status.completed
    elif agreement.is_equal:
        status = Status.reproduced
    else:
        status, cause = Status.diverged, likeliest_cause(reproduction.drifts, agreement)
    told = describe(agreement, reproduction, status=status, cause=cause)
    found = {
        "status": status.value,
        "told": told,
        "cause": None if cause is None else str(cause),
        "agreement": {**asdict(agreement), "compared": agreement.compared},
    }
    _write(reproduction, run_dir, **found)
    return status, told


def _rows(side: RunDir) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none where they can't be read."""
    try:
        rows = read_metrics(side.metrics)
        return [row for row in rows if isinstance(row.get("step"), int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def describe(
    agreement: Agreement, reproduction: Reproduction, *, status: Status, cause: Drift | None
) -> str:
    """What was found, in a line or a few."""
    of, steps = reproduction.of.path, agreement.equal_steps
    if status is Status.completed:
        return f"nothing to compare with: {of} has no steps that can be read"
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
        text = f"diverged from {of}: the initial weights are others"
    else:
        differing = agreement.evaluations - agreement.equal_evaluations
        text = f"diverged from {of}: equal in {until}, but {differing} evaluations differ"
    if agreement.difference is not None and agreement.initial_weights is False:
        text += "; the initial weights differ already"
    return f"{text}\n{_describe_cause(reproduction, cause)}"


def _describe_cause(reproduction: Reproduction, cause: Drift | None) -> str:
    if cause is not None:
        return f"the likeliest cause ({cause.kind.value}): {cause}"
    if reproduction.policy is DriftPolicy.off:
        return "the cause is unknown: drift=off"
    if reproduction.unknown:
        missing = ", ".join(reproduction.unknown)
        return f"the cause is unknown: {reproduction.of.path} doesn't tell all ({missing})"
    return "nothing has drifted: the device or a library may not be deterministic"


def _write(reproduction: Reproduction, run_dir: RunDir, **found: Any) -> None:
    empty = {"status": None, "told": None, "cause": None, "agreement": None}
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
    text = json.dumps(redact_values(values, known=known_secrets()), indent=2)
    write_text(run_dir.reproduction, text + "\n")


def show_drift(reproduction: Reproduction, *, say: Callable[[str], None] = console.say) -> None:
    """The drift in its three groups."""
    say(f"drift since {reproduction.of.path} was made")
    for group in Group:
        drifts = [drift for drift in reproduction.drifts if drift.group is group]
        say(f"  {group.value}:{'' if drifts else ' none'}")
        for drift in drifts[:MAX_SHOWN]:
            say(f"    {drift.kind.value}: {drift}")
        if len(drifts) > MAX_SHOWN:
            say(f"    and {len(drifts) - MAX_SHOWN} more, in reproduction.json")
    if reproduction.unknown:
        say(f"  can't be compared: {', '.join(reproduction.unknown)}")
