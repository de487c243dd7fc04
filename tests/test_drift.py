"""Drift by group, how far two runs agree, and the likeliest cause of a difference."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.config.tasks import DriftPolicy
from llama_pretrain.runs.agreement import Agreement, compare_rows, likeliest_cause
from llama_pretrain.runs.drift import Drift, Group, Kind, Made, find_drift, list_unknown, unasked
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.provenance import render_provenance
from llama_pretrain.runs.report import render_report
from llama_pretrain.runs.status import Status
from llama_pretrain.tasks.reproduce import (
    Reproduction,
    begin,
    find_reproduction,
    finish,
    read_made,
    show_drift,
)
from tests.conftest import compose_run

Row = dict[str, Any]
SOURCE = {"name": "text", "data_hash": "a" * 64}
CORPUS = {"tokenizer_hash": "b" * 64, "content_hash": "c" * 64, "sources": [SOURCE]}
MADE = Made(
    config={"seed": 1, "optim.betas": [0.9, 0.95], "data.cache_dir": "/a", "train.spike": "none"},
    provenance={
        "git_commit": "1" * 40,
        "code": {"run.py": "d" * 64, "llama_pretrain/train/loop.py": "e" * 64},
        "python": "3.11.7",
        "libc": "glibc-2.36",
        "packages": {f"p{number}": "1" for number in range(20)} | {"torch": "2.13.0", "rich": "1"},
        "cpu": "A",
        "cpu_isa": ["avx2"],
        "gpus": [],
        "machine": {"cores": 2, "memory_bytes": 5, "cpu_bf16": True},
        "environment": {"NCCL_ALGO": "Ring", "SLURM_JOB_ID": "7"},
        "host": "here",
        "platform": "Linux",
        "paths": {"project": "/p"},
        "operators": {"cpu_adam": {"sha256": "f" * 64}},
    },
    plan={"corpus": CORPUS},
    files={"text": {"/x/a.txt": "1" * 64, "/x/b.txt": "2" * 64}},
)


def changed(**changes: Any) -> Made:
    """MADE with other provenance."""
    return replace(MADE, provenance={**MADE.provenance, **changes})


def other_data(files: dict[str, str]) -> Made:
    source = SOURCE | {"data_hash": "9" * 64}
    plan = {"corpus": CORPUS | {"sources": [source], "content_hash": "8" * 64}}
    return replace(MADE, plan=plan, files={"text": files})


def drift_to(now: Made, *, before: Made = MADE, asked: tuple[str, ...] = ()) -> list[Drift]:
    return find_drift(before, now, asked=lambda path: path in asked)


NAMED = [
    pytest.param(
        replace(MADE, config={**MADE.config, "seed": 2}),
        (Group.results, "config", "seed: 1 -> 2"),
        id="seed",
    ),
    pytest.param(
        replace(MADE, config={**MADE.config, "launch.num_processes": 1}),
        (Group.bits, "threads", "launch.num_processes: nothing -> 1"),
        id="ranks",
    ),
    pytest.param(
        replace(MADE, config={**MADE.config, "data.cache_dir": "/b"}),
        (Group.harmless, "config", "data.cache_dir: /a -> /b"),
        id="cache",
    ),
    pytest.param(
        other_data({"/x/a.txt": "1" * 64, "/x/b.txt": "3" * 64}),
        (Group.results, "data", f"/x/b.txt: {'2' * 12} -> {'3' * 12}"),
        id="data-byte",
    ),
    pytest.param(
        other_data({"/x/a.txt": "1" * 64}),
        (Group.results, "data", f"/x/b.txt: {'2' * 12} -> nothing"),
        id="data-file-gone",
    ),
    pytest.param(
        other_data({}),
        (Group.results, "data", f"data of text: {'a' * 12} -> {'9' * 12}"),
        id="data-without-files",
    ),
    pytest.param(
        replace(MADE, plan={"corpus": CORPUS | {"tokenizer_hash": "7" * 64}}),
        (Group.results, "data", f"tokenizer: {'b' * 12} -> {'7' * 12}"),
        id="tokenizer",
    ),
    pytest.param(
        changed(code={"run.py": "d" * 64, "llama_pretrain/train/loop.py": "0" * 64}),
        (Group.results, "code", f"llama_pretrain/train/loop.py: {'e' * 12} -> {'0' * 12}"),
        id="code-line",
    ),
    pytest.param(
        changed(git_commit="2" * 40),
        (Group.harmless, "code", f"git commit: {'1' * 12} -> {'2' * 12}"),
        id="commit-with-the-same-code",
    ),
    pytest.param(
        changed(packages={**MADE.provenance["packages"], "torch": "2.14.0"}),
        (Group.bits, "versions", "torch: 2.13.0 -> 2.14.0"),
        id="package",
    ),
    pytest.param(
        changed(packages={**MADE.provenance["packages"], "rich": "2"}),
        (Group.harmless, "versions", "rich: 1 -> 2"),
        id="harmless-package",
    ),
    pytest.param(
        changed(python="3.12.1"), (Group.bits, "versions", "python: 3.11.7 -> 3.12.1"), id="python"
    ),
    pytest.param(
        changed(operators={"cpu_adam": {"sha256": "0" * 64}}),
        (
            Group.bits,
            "versions",
            f"compiled operator cpu_adam.sha256: {'f' * 12} -> {'0' * 12}",
        ),
        id="operator",
    ),
    pytest.param(changed(cpu="B"), (Group.bits, "hardware", "cpu: A -> B"), id="cpu"),
    pytest.param(
        changed(cpu_isa=["avx2", "avx512f"]),
        (Group.bits, "hardware", "cpu_isa: [avx2] -> [avx2, avx512f]"),
        id="isa",
    ),
    pytest.param(
        changed(gpus=[{"name": "H100", "driver": "1"}]),
        (Group.bits, "hardware", "gpus: [] -> [{name: H100, driver: 1}]"),
        id="gpu",
    ),
    pytest.param(
        changed(machine={"cores": 4, "memory_bytes": 5, "cpu_bf16": True}),
        (Group.harmless, "host", "machine.cores: 2 -> 4"),
        id="cores",
    ),
    pytest.param(
        changed(environment={"NCCL_ALGO": "Tree", "SLURM_JOB_ID": "7"}),
        (Group.bits, "threads", "environment variable NCCL_ALGO: Ring -> Tree"),
        id="variable",
    ),
    pytest.param(
        changed(environment={"NCCL_ALGO": "Ring", "SLURM_JOB_ID": "8"}),
        (Group.harmless, "host", "environment variable SLURM_JOB_ID: 7 -> 8"),
        id="job",
    ),
    pytest.param(changed(host="there"), (Group.harmless, "host", "host: here -> there"), id="host"),
    pytest.param(
        changed(paths={"project": "/q"}),
        (Group.harmless, "host", "path of project: /p -> /q"),
        id="path",
    ),
]


@pytest.mark.parametrize(("now", "named"), NAMED)
def test_each_drift_is_named_in_its_group(now: Made, named: tuple[Group, str, str]) -> None:
    found = [(drift.group, drift.kind.value, str(drift)) for drift in drift_to(now)]
    assert found == [named]


def test_nothing_has_drifted() -> None:
    assert drift_to(MADE) == []
    moved = replace(MADE, files={"text": {"/y/a.txt": "1" * 64, "/y/b.txt": "2" * 64}})
    assert drift_to(moved) == []


def test_a_moved_file_that_has_changed_is_named_where_it_was_and_is() -> None:
    now = other_data({"/y/a.txt": "1" * 64, "/y/b.txt": "3" * 64})
    assert [drift.path for drift in drift_to(now)] == ["/x/b.txt", "/y/b.txt"]


def test_checkpoints_matter_where_a_rollback_goes_back_to_them() -> None:
    def group(spike: str) -> Group:
        before = replace(MADE, config={"train.spike": spike, "checkpoint.every_steps": 1})
        now = replace(MADE, config={"train.spike": spike, "checkpoint.every_steps": 2})
        (found,) = drift_to(now, before=before)
        return found.group

    assert group("none") is Group.harmless
    assert group("rollback") is Group.results


def test_what_was_asked_for_is_told_apart() -> None:
    now = replace(
        changed(cpu="B", host="x"), config={**MADE.config, "seed": 2, "data.cache_dir": "/b"}
    )
    found = drift_to(now, asked=("seed",))
    assert [str(drift) for drift in found] == [
        "seed: 1 -> 2 (asked for on the command line)",
        "data.cache_dir: /a -> /b",
        "cpu: A -> B",
        "host: here -> x",
    ]
    assert [drift.path for drift in unasked(found)] == ["cpu"]
    data = other_data({})
    assert unasked(drift_to(data))
    assert not unasked(drift_to(data, asked=("data.cache_dir",)))  # data was set on purpose


def test_a_run_of_an_earlier_version_is_compared_as_far_as_it_tells() -> None:
    old = Made(
        config=MADE.config,
        provenance={
            "git_commit": "0" * 40,
            "packages": {"torch": "2.12"},
            "cpu": "A",
            "host": "here",
        },
        plan={"corpus": CORPUS},
    )
    found = [(drift.group, str(drift)) for drift in drift_to(MADE, before=old)]
    assert found == [
        (
            Group.results,
            f"git commit: {'0' * 12} -> {'1' * 12}",
        ),  # no hashes tell that it's harmless
        (Group.bits, "torch: 2.12 -> 2.13.0"),
    ]
    assert list_unknown(old) == [
        "code in provenance.json",
        "cpu_isa in provenance.json",
        "environment in provenance.json",
    ]
    assert drift_to(MADE, before=Made()) == []
    assert list_unknown(Made()) == ["provenance.json", "plan.json"]


@pytest.mark.parametrize("junk", [[], "x", 5, None, {"a": []}, [{}], {"name": {"x": 1}}])
def test_files_from_elsewhere_may_hold_anything(junk: Any) -> None:
    provenance = dict.fromkeys(MADE.provenance, junk)
    plan = {"corpus": {"sources": junk, "tokenizer_hash": junk}}
    found = drift_to(MADE, before=Made(config={"seed": junk}, provenance=provenance, plan=plan))
    assert all(str(drift).isprintable() for drift in found)


def test_a_text_from_elsewhere_is_one_printable_line() -> None:
    (found,) = drift_to(changed(host="x"), before=changed(host="\x1b[2J\n" + "y" * 5000))
    assert found.before == "?[2J?" + "y" * 195 + "..."


# Agreement


def steps(*losses: float, norm: float = 1.5, samples: str = "s") -> list[Row]:
    return [
        {"step": step, "loss": loss, "grad_norm": norm, "sample_hash": f"{samples}{step}"}
        for step, loss in enumerate(losses, start=1)
    ]


def test_equal_runs() -> None:
    found = compare_rows(steps(3.0, 2.0), steps(3.0, 2.0))
    assert found.is_equal
    assert (found.equal_steps, found.compared, found.difference) == (2, 2, None)
    assert found.digest != compare_rows(steps(3.0), steps(3.0)).digest


def test_the_first_step_that_differs_and_by_how_much() -> None:
    now = steps(4.0, 2.0 + 2**-20, 1.0)
    found = compare_rows(steps(4.0, 2.0, 1.0), now)
    assert not found.is_equal
    assert found.equal_steps == 1
    first = found.difference
    assert first is not None
    assert (first.step, first.quantity) == (2, "loss")
    assert (first.absolute, first.relative) == (2**-20, 2**-21)
    assert str(first) == "loss 2 -> 2.00000095 (a difference of 9.5e-07, 4.8e-07 of it)"


def test_one_bit_is_a_difference_and_a_missing_number_is_none() -> None:
    assert not compare_rows(steps(0.1), steps(math.nextafter(0.1, 1))).is_equal
    lost = [{"step": 1, "sample_hash": "s1", "grad_norm": math.nan}]
    assert compare_rows(lost, json.loads(json.dumps(lost))).is_equal
    found = compare_rows(steps(1.0), lost)
    assert found.difference is not None
    assert (found.difference.absolute, str(found.difference)) == (None, "loss 1 -> none")


def test_the_cause_is_compared_before_its_effect() -> None:
    found = compare_rows(steps(1.0), steps(2.0, samples="t"))
    assert found.difference is not None
    assert found.difference.quantity == "sample ids"
    found = compare_rows(steps(1.0), steps(1.0, norm=2.0))
    assert found.difference is not None
    assert found.difference.quantity == "gradient norm"


def test_a_run_that_was_cut_is_compared_as_far_as_it_goes() -> None:
    found = compare_rows(steps(3.0, 2.0, 1.0), steps(3.0))
    assert (found.is_equal, found.compared, found.steps_before) == (True, 1, 3)
    assert not compare_rows([], steps(3.0)).is_equal
    later = steps(3.0, 2.0, 1.0)[1:]  # the first line is lost
    assert compare_rows(later, steps(3.0, 2.0, 1.0)).compared == 2


def test_weights_and_evaluations_are_compared_too() -> None:
    def with_extra(weights: str, loss: float) -> list[Row]:
        lines: list[Row] = [{"step": 0, "initial_weights": weights}]
        lines.append({"step": 0, "eval_loss": loss})
        return lines + steps(1.0)

    assert compare_rows(with_extra("a", 5.0), with_extra("a", 5.0)).is_equal
    other = compare_rows(with_extra("a", 5.0), with_extra("b", 5.0))
    assert (other.initial_weights, other.is_equal) == (False, False)
    other = compare_rows(with_extra("a", 5.0), with_extra("a", 6.0))
    assert (other.evaluations, other.equal_evaluations, other.is_equal) == (1, 0, False)


def drift(kind: str, path: str, **more: Any) -> Drift:
    return Drift(kind=Kind(kind), path=path, before="1", now="2", **more)


ALL = [drift(kind.value, f"of {kind.value}") for kind in reversed(Kind)]


@pytest.mark.parametrize("gone", range(len(Kind)))
def test_causes_in_their_order(gone: int) -> None:
    """Config, data, code, versions, hardware, threads; a host is no cause."""
    kinds = list(Kind)[gone:]
    found = likeliest_cause(
        [d for d in ALL if d.kind in kinds], compare_rows(steps(1.0), steps(2.0))
    )
    wanted = None if kinds == [Kind.host] else kinds[0]
    assert (None if found is None else found.kind) is wanted


def test_what_differs_first_says_where_to_look() -> None:
    config = drift("config", "optim.learning_rate")
    drifts = [config, drift("config", "seed"), drift("data", "a.txt"), drift("code", "run.py")]
    loss = compare_rows(steps(1.0), steps(2.0))
    samples = compare_rows(steps(1.0), steps(1.0, samples="t"))
    weights = replace(loss, initial_weights=False)

    def cause(given: list[Drift], agreement: Agreement) -> str:
        found = likeliest_cause(given, agreement)
        assert found is not None
        return found.path

    assert cause(drifts, loss) == "seed"
    assert cause([config, drift("data", "a.txt")], loss) == "optim.learning_rate"
    assert cause([config, drift("data", "a.txt")], samples) == "a.txt"
    assert cause([config, drift("config", "model.hidden_size")], weights) == "model.hidden_size"
    assert cause([config, drift("config", "batch.micro_batch_size")], samples).startswith("batch")
    quiet = [drift("config", "monitor.csv", harmless=True), drift("host", "host")]
    assert likeliest_cause(quiet, loss) is None


# The station


def write_run(folder: Path, rows: list[Row], *words: str) -> RunDir:
    folder.mkdir()
    run_dir = RunDir(folder)
    run_dir.snapshot.write_text(render_snapshot(compose_run(["debug=smoke", *words])))
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.provenance.write_text(render_provenance(dict(MADE.provenance)))
    run_dir.plan.write_text(json.dumps({"corpus": CORPUS}))
    return run_dir


def reproduction_of(
    of: RunDir, *drifts: Drift, policy: DriftPolicy = DriftPolicy.warn
) -> Reproduction:
    return Reproduction(of=of, policy=policy, drifts=drifts, unknown=list_unknown(read_made(of)))


def test_a_run_directory_tells_what_it_was_made_with(tmp_path: Path) -> None:
    of = write_run(tmp_path / "of", [], "seed=7")
    of.data_files.parent.mkdir()
    of.data_files.write_text(json.dumps({"text": {"a": "1"}, "other": 5}))
    found = read_made(of)
    assert (found.config["seed"], found.plan["corpus"]["sources"]) == (7, [SOURCE])
    assert found.files == {"text": {"a": "1"}}
    for file in (of.snapshot, of.plan, of.provenance, of.data_files):
        file.write_text("[" * 100_000)
    assert read_made(of) == Made()


TOLD = [
    pytest.param(
        steps(2.0, 1.0),
        [],
        Status.reproduced,
        "reproduced: bitwise equal to OF in all 2 steps: loss, gradient norm and sample ids",
        id="equal",
    ),
    pytest.param(
        steps(2.0),
        [],
        Status.reproduced,
        "reproduced: bitwise equal to OF in the 1 steps that both have (2 there, 1 here): loss,"
        " gradient norm and sample ids",
        id="shorter",
    ),
    pytest.param(
        steps(2.0, 1.5),
        [drift("versions", "torch")],
        Status.diverged,
        "diverged from OF at step 2: loss 1 -> 1.5 (a difference of 0.5, 0.5 of it); bitwise equal"
        " up to step 1\nthe likeliest cause (versions): torch: 1 -> 2",
        id="diverged",
    ),
    pytest.param(
        steps(2.0, 1.5),
        [drift("host", "host")],
        Status.diverged,
        "diverged from OF at step 2: loss 1 -> 1.5 (a difference of 0.5, 0.5 of it); bitwise equal"
        " up to step 1\nnothing has drifted: the device or a library may not be deterministic",
        id="no-cause",
    ),
    pytest.param(
        [],
        [],
        Status.completed,
        "nothing to compare with: OF has no steps that can be read",
        id="nothing",
    ),
]


@pytest.mark.parametrize(("rows", "drifts", "status", "told"), TOLD)
def test_how_far_two_runs_are_equal_is_told_and_written(
    tmp_path: Path, rows: list[Row], drifts: list[Drift], status: Status, told: str
) -> None:
    of = write_run(tmp_path / "of", steps(2.0, 1.0))
    run_dir = write_run(tmp_path / "now", rows)
    reproduction = reproduction_of(of, *drifts)
    begin(reproduction, run_dir)
    assert json.loads(run_dir.reproduction.read_text())["status"] is None
    told = told.replace("OF", str(of.path))
    assert finish(reproduction, run_dir) == (status, told)
    written = json.loads(run_dir.reproduction.read_text())
    assert (written["status"], written["told"]) == (status.value, told)
    assert [item["path"] for item in written["drift"]] == [item.path for item in drifts]
    page = render_report(run_dir)
    assert told.splitlines()[0].replace("->", "-&gt;") in page
    assert all(item.path in page for item in drifts)


def test_a_run_whose_files_are_lost_compares_with_nothing(tmp_path: Path) -> None:
    of = RunDir(tmp_path / "gone")
    run_dir = write_run(tmp_path / "now", steps(1.0))
    assert finish(reproduction_of(of), run_dir)[0] is Status.completed
    of.path.mkdir()
    for text in ("5\n", "{\n", '{"step": "x", "sample_hash": 1}\n', '[{"rolled_back_from": 1}]\n'):
        of.metrics.write_text(text)
        assert finish(reproduction_of(of), run_dir)[0] is Status.completed


def test_drift_is_shown_in_three_groups(tmp_path: Path) -> None:
    lines: list[str] = []
    of = RunDir(tmp_path)
    many = [drift("host", f"h{number}") for number in range(17)]
    shown = Reproduction(
        of=of,
        policy=DriftPolicy.warn,
        drifts=[drift("config", "seed", asked=True), *many],
        unknown=["plan.json"],
    )
    show_drift(shown, say=lines.append)
    assert lines == [
        f"drift since {tmp_path} was made",
        "  can change results:",
        "    config: seed: 1 -> 2 (asked for on the command line)",
        "  can change bits: none",
        "  harmless:",
        *(f"    host: h{number}: 1 -> 2" for number in range(15)),
        "    and 2 more, in reproduction.json",
        "  can't be compared: plan.json",
    ]


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Reproduction | None]:
    """Looks at the drift of a run of seed 7 at another seed, on another processor."""

    def find(
        policy: str, origins: dict[str, str], *, reproduces: bool = True, resumes: bool = False
    ) -> Reproduction | None:
        of = RunDir(tmp_path / "of")
        if not of.path.exists():
            write_run(of.path, steps(1.0), "seed=7")
        run = compose_run(["debug=smoke", "seed=8"])
        run = replace(run, drift=DriftPolicy(policy))
        if reproduces:
            run = replace(run, reproduce_of=str(of.path))
        if resumes:
            run = replace(run, resume=replace(run.resume, run_dir="auto"))
        plan: Any = type("NoPlan", (), {"corpus": None})
        return find_reproduction(
            run,
            plan,
            RunDir(tmp_path / "now"),
            provenance=dict(MADE.provenance) | {"cpu": "B"},
            files={},
            origins=origins,
        )

    return find


FROM_SNAPSHOT = {"seed": "command line", "data": "snapshot.yaml", "model": "snapshot.yaml"}


def test_drift_that_was_not_asked_for_is_refused(look: Callable[..., Reproduction]) -> None:
    with pytest.raises(UserError) as caught:
        look("error", FROM_SNAPSHOT)
    assert str(caught.value) == "cpu: was A (got B); to go on all the same, drift=warn"
    with pytest.raises(UserError, match="seed: was 7"):
        look("error", FROM_SNAPSHOT | {"seed": "snapshot.yaml"})
    found = look("warn", FROM_SNAPSHOT)
    assert [(item.path, item.asked) for item in found.drifts] == [("seed", True), ("cpu", False)]
    assert look("off", FROM_SNAPSHOT).drifts == []


def test_an_interrupted_reproduction_stays_one(
    look: Callable[..., Reproduction | None], tmp_path: Path
) -> None:
    assert look("warn", {}, reproduces=False) is None
    assert look("warn", {}, reproduces=False, resumes=True) is None
    begun = look("warn", FROM_SNAPSHOT)
    assert begun is not None
    (tmp_path / "now").mkdir()
    begin(
        replace(begun, policy=DriftPolicy.error, drifts=begun.drifts[:1]), RunDir(tmp_path / "now")
    )
    with pytest.raises(UserError, match=r"^cpu: was A"):  # its policy is the one it began with
        look("warn", {"seed": "snapshot.yaml"}, reproduces=False, resumes=True)


def test_secrets_of_an_old_run_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "opaque-v4lue")
    run_dir = write_run(tmp_path / "now", steps(1.0))
    leaking = drift("threads", "environment variable X")
    begin(reproduction_of(RunDir(tmp_path), replace(leaking, before="opaque-v4lue")), run_dir)
    assert "opaque" not in run_dir.reproduction.read_text()
