"""A reproduction: its drift before the start, its verdict at the end."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.config.tasks import DriftPolicy, Resume
from llama_pretrain.plan.resolve import resolve
from llama_pretrain.runs.drift import Drift, Made, list_unknown
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row
from llama_pretrain.runs.report import render_report
from llama_pretrain.runs.status import Status
from llama_pretrain.tasks import reproduce
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.reproduce import (
    Reproduction,
    begin,
    find_reproduction,
    finish,
    read_made,
    show_drift,
)
from tests.conftest import compose_run
from tests.machines import LAPTOP
from tests.rows import write_rows
from tests.runs.test_agreement import drift, steps
from tests.runs.test_drift import CORPUS, MADE, SOURCE


def write_run(folder: Path, rows: list[Row], *words: str) -> RunDir:
    folder.mkdir()
    run_dir = RunDir(folder)
    run = resolve(compose_run(["debug=smoke", *words]), LAPTOP)
    run_dir.snapshot.write_text(render_snapshot(run))
    write_rows(run_dir.metrics, rows)
    run_dir.provenance.write_text(json.dumps(dict(MADE.provenance)))
    run_dir.plan.write_text(json.dumps({"corpus": CORPUS}))
    return run_dir


def reproduction_of(of: RunDir, *drifts: Drift) -> Reproduction:
    unknown = list_unknown(read_made(of))
    return Reproduction(of=of, policy=DriftPolicy.warn, drifts=drifts, unknown=unknown)


def test_what_a_run_was_made_with_is_read(tmp_path: Path) -> None:
    of = write_run(tmp_path / "of", [], "seed=7")
    of.data_files.parent.mkdir()
    of.data_files.write_text(json.dumps({"text": {"a": "1"}, "other": 5}))
    found = read_made(of)
    assert (found.config["seed"], found.plan["corpus"]["sources"]) == (7, [SOURCE])
    assert found.files == {"text": {"a": "1"}}
    for file in (of.snapshot, of.plan, of.provenance, of.data_files):
        file.write_text("[" * 100_000)
    assert read_made(of) == Made()


DIVERGED = (
    "diverged from OF at step 2: loss 1 -> 1.5 (a difference of 0.5, 0.5 of it);"
    " bitwise equal up to step 1\n"
)
WHAT = "loss, gradient norm and sample ids"
VERDICTS: dict[str, tuple[list[Row], list[Drift], Status, str]] = {
    "equal": (
        steps(2.0, 1.0), [], Status.reproduced,
        f"reproduced: bitwise equal to OF in all 2 steps: {WHAT}",
    ),
    "shorter": (
        steps(2.0), [], Status.reproduced,
        "reproduced: bitwise equal to OF in the 1 steps that both have (2 there, 1 here): " + WHAT,
    ),
    "diverged": (
        steps(2.0, 1.5), [drift("versions", "torch")], Status.diverged,
        DIVERGED + "the most likely cause (versions): torch: 1 -> 2",
    ),
    "no-cause": (
        steps(2.0, 1.5), [drift("host", "host")], Status.diverged,
        DIVERGED + "nothing has drifted: the device or a library may not be deterministic",
    ),
    "nothing": (
        [], [], Status.completed, "nothing to compare with: OF has no readable steps"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "drifts", "status", "verdict"), VERDICTS.values(), ids=VERDICTS)
def test_the_verdict_is_returned_and_written(
    tmp_path: Path, rows: list[Row], drifts: list[Drift], status: Status, verdict: str
) -> None:
    of = write_run(tmp_path / "of", steps(2.0, 1.0))
    run_dir = write_run(tmp_path / "now", rows)
    reproduction = reproduction_of(of, *drifts)
    begin(reproduction, run_dir)
    assert json.loads(run_dir.reproduction.read_text())["status"] is None
    verdict = verdict.replace("OF", str(of.path))
    assert finish(reproduction, run_dir) == (status, verdict)
    written = json.loads(run_dir.reproduction.read_text())
    assert (written["status"], written["verdict"]) == (status.value, verdict)
    assert [item["path"] for item in written["drift"]] == [item.path for item in drifts]
    page = render_report(run_dir)
    assert verdict.splitlines()[0].replace("->", "-&gt;") in page
    assert all(item.path in page for item in drifts)


def test_a_run_whose_files_are_lost_compares_with_nothing(tmp_path: Path) -> None:
    of = RunDir(tmp_path / "gone")
    run_dir = write_run(tmp_path / "now", steps(1.0))
    assert finish(reproduction_of(of), run_dir)[0] is Status.completed
    of.path.mkdir()
    for text in ("5\n", "{\n", '{"kind": "step", "step": "x"}\n', '[{"kind": "rollback"}]\n'):
        of.metrics.write_text(text)
        assert finish(reproduction_of(of), run_dir)[0] is Status.completed


def test_drift_is_shown_in_three_groups(tmp_path: Path) -> None:
    lines: list[str] = []
    many = [drift("host", f"h{number}") for number in range(17)]
    shown = reproduction_of(RunDir(tmp_path), drift("config", "seed", asked=True), *many)
    show_drift(replace(shown, unknown=["plan.json"]), say=lines.append)
    assert lines == [
        *(f"drift since {tmp_path}", "  can change results:"),
        "    config: seed: 1 -> 2 (asked for on the command line)",
        *("  can change bits: none", "  harmless:"),
        *(f"    host: h{number}: 1 -> 2" for number in range(15)),
        *("    and 2 more, in reproduction.json", "  cannot be compared: plan.json"),
    ]


Compare = Callable[..., Reproduction | None]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Compares a run of seed 7 at another seed, on another processor."""
    of = write_run(tmp_path / "of", steps(1.0), "seed=7")
    provenance = dict(MADE.provenance) | {"cpu": "B"}
    monkeypatch.setattr(reproduce, "describe_launch", lambda *_: provenance)
    monkeypatch.setattr(reproduce, "hash_data_files", lambda plan: {})
    monkeypatch.setattr(reproduce, "asdict", lambda corpus: CORPUS)

    def find(policy: str, origins: dict[str, str], **changes: Any) -> Reproduction | None:
        changes = {"reproduce_of": str(of.path), "drift": DriftPolicy(policy)} | changes
        run = replace(compose_run(["debug=smoke", "seed=8"]), **changes)
        plan: Any = SimpleNamespace(corpus=None)
        now = RunDir(tmp_path / "now")
        context = TaskContext(run_dir=now, argv=[], origins=origins, machine=LAPTOP)
        return find_reproduction(resolve(run, LAPTOP), plan, context)

    return find


FROM_SNAPSHOT = {"seed": "command line", "data": "snapshot.yaml", "model": "snapshot.yaml"}


def test_drift_that_was_not_asked_for_is_refused(compare: Callable[..., Reproduction]) -> None:
    with pytest.raises(UserError) as caught:
        compare("error", FROM_SNAPSHOT)
    assert str(caught.value) == "cpu: was A (got B). To start anyway, add drift=warn."
    with pytest.raises(UserError, match="seed: was 7"):
        compare("error", FROM_SNAPSHOT | {"seed": "snapshot.yaml"})
    found = compare("warn", FROM_SNAPSHOT)
    assert [(item.path, item.asked) for item in found.drifts] == [("seed", True), ("cpu", False)]
    assert compare("off", FROM_SNAPSHOT).drifts == []


def test_an_interrupted_reproduction_stays_one(compare: Compare, tmp_path: Path) -> None:
    resumed: dict[str, Any] = {"reproduce_of": None, "resume": Resume(run_dir="auto")}
    assert compare("warn", {}, reproduce_of=None) is None
    assert compare("warn", {}, **resumed) is None
    begun = compare("warn", FROM_SNAPSHOT)
    assert begun is not None
    now = RunDir(tmp_path / "now")
    now.path.mkdir()
    begin(replace(begun, policy=DriftPolicy.error, drifts=begun.drifts[:1]), now)
    with pytest.raises(UserError, match=r"^cpu: was A"):  # its policy is the one it began with
        compare("warn", {"seed": "snapshot.yaml"}, **resumed)


def test_secrets_of_an_old_run_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "opaque-v4lue")
    run_dir = write_run(tmp_path / "now", steps(1.0))
    leaking = drift("threads", "environment variable X")
    begin(reproduction_of(RunDir(tmp_path), replace(leaking, before="opaque-v4lue")), run_dir)
    assert "opaque" not in run_dir.reproduction.read_text()
