"""Commands about an existing run: `resume`, `reproduce` and `run`, from words to a Run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_pretrain.config.command_line import parse_command_line
from llama_pretrain.config.compose import CONF, list_groups
from llama_pretrain.config.compose import compose_run as compose_in
from llama_pretrain.config.from_snapshot import find_unfinished, words_for_hydra
from llama_pretrain.config.origins import trace_settings
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import SNAPSHOT_NAME, load_snapshot, render_snapshot, to_plain
from llama_pretrain.config.validate import flatten, validate_run
from llama_pretrain.config.zero import Zero
from llama_pretrain.plan.batch import solve_batch
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.resolve import resolve
from tests.conftest import compose_run

Started = Callable[..., Path]


@pytest.fixture
def started(tmp_path: Path) -> Started:
    """Writes the run directory of a run that these words have started."""

    def write(*words: str, name: str = "run") -> Path:
        run = resolve(compose_run(["debug=smoke", *words]), detect_machine())
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "snapshot.yaml").write_text(render_snapshot(run))
        (folder / "plan.json").write_text(json.dumps({"batch": {"micro_batch_size": 2}}))
        return folder

    return write


def rewrite(tmp_path: Path, *words: str) -> list[str]:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return words_for_hydra(parse_command_line(words), scratch=scratch)


def compose_words(tmp_path: Path, *words: str) -> Run:
    """The run that such a command line composes to, before choices are made."""
    overrides = [
        word for word in rewrite(tmp_path, *words)[4:] if not word.lstrip("+~").startswith("hydra")
    ]
    return compose_in(overrides, folder=tmp_path / "scratch", name=SNAPSHOT_NAME)


def problems_with(*words: str) -> list[str]:
    """What is wrong with the words of a command."""
    return [str(problem) for problem in parse_command_line(words).problems]


def resolved(run: Run) -> ResolvedRun:
    """With choices made, and no rule broken."""
    found = resolve(run, detect_machine())
    assert list(validate_run(found)) == []
    return found


CASES = yaml.safe_load((Path(__file__).parent / "from_snapshot.yaml").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["command"])
def test_settings_of_a_command_about_a_run(
    started: Started, tmp_path: Path, case: dict[str, Any]
) -> None:
    folder = started(*case["started"].split())
    words = case["command"].replace("DIR", str(folder)).split()
    run = compose_words(tmp_path, *words)
    for made, key in ((run, "run"), (resolved(run) if "resolved" in case else run, "resolved")):
        values, wanted = dict(flatten(to_plain(made))), case.get(key, {})
        for path, value in wanted.items():
            expected = value.replace("DIR", str(folder)) if isinstance(value, str) else value
            assert values[path] == expected, path


def test_an_option_replaces_a_section_of_a_snapshot(started: Started, tmp_path: Path) -> None:
    folder = started("zero=stage3", "zero.sub_group_size=7", "seed=9")
    run = compose_words(tmp_path, f"resume={folder}", "zero=stage1")
    before = load_snapshot(folder / "snapshot.yaml")
    assert before.zero.sub_group_size == 7
    assert run.zero == Zero(stage=1)
    assert resolved(run).zero.reduce_bucket_size == 500_000_000
    assert (run.seed, run.model, run.optim) == (9, before.model, before.optim)


def test_a_reproduction_knows_whose_it_is(started: Started, tmp_path: Path) -> None:
    """By a value, not by a word: a sweep's folders are named by the words."""
    folder = started("seed=5")
    words = rewrite(tmp_path, f"reproduce={folder}", "-m", "seed=1,2", "--package", "model")
    assert sorted(words[4:7]) == ["--multirun", "--package", "model"]
    assert not any(str(folder) in word for word in words)
    odd = started(name="it's odd")
    assert compose_words(tmp_path, f"run={odd}").of_run == str(odd)
    for name in ("a ${b}", "a'b\"c"):
        with pytest.raises(UserError, match="has a path that a config cannot hold"):
            rewrite(tmp_path, f"reproduce={started(name=name)}")


def test_conf_does_not_come_before_a_snapshot(started: Started, tmp_path: Path) -> None:
    """Hydra looks for the primary config in the main folder first: it is the scratch folder."""
    words = rewrite(tmp_path, f"resume={started()}")
    assert words[:2] == ["--config-path", str(tmp_path / "scratch")]
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["snapshot.yaml"]


def test_every_group_can_be_chosen(started: Started, tmp_path: Path) -> None:
    folder = started()
    options = {group: sorted((CONF / group).glob("*.yaml"))[0].stem for group in list_groups()}
    assert len(options) == 13
    words = [f"{group}={option}" for group, option in options.items()]
    compose_words(tmp_path, f"reproduce={folder}", *words)


def test_only_our_own_options_are_read(started: Started, tmp_path: Path) -> None:
    folder = started()
    for place in (folder, tmp_path):
        (place / "zero").mkdir(exist_ok=True)
        (place / "zero" / "stage1.yaml").write_text("stage: 2\nsub_group_size: 666\n")
        (place / "zero" / "evil.yaml").write_text("stage: 2\n")
    run = compose_words(tmp_path, f"reproduce={folder}", "zero=stage1")
    assert run.zero == Zero(stage=1)
    assert problems_with(f"reproduce={folder}", "zero=evil")[0].startswith(
        "zero: has no option 'evil'. "
    )


def test_wrong_words_are_reported_with_the_right_options(started: Started) -> None:
    assert problems_with(f"resume={started()}", "zero=stage4", "seed=x") == [
        (
            "zero: has no option 'stage4'. Did you mean zero=stage3? Options: stage0, stage1,"
            " stage2, stage2_offload, stage3, stage3_nvme, stage3_offload, superoffload, zeropp."
        ),
        "seed: must be a valid integer (got x)",
    ]


@pytest.mark.parametrize("word", ["experiment=llama2_7b", "debug=smoke", "sweep=stages"])
def test_overlays_need_a_config(started: Started, word: str) -> None:
    key = word.partition("=")[0]
    assert problems_with(f"reproduce={started()}", word) == [
        f"{key}: a snapshot has no options (got {word}). Set values one by one: SETTING=VALUE."
    ]


def test_where_settings_of_an_option_are_from() -> None:
    origins = trace_settings(["zero=stage2_offload", "seed=3"], {})
    assert origins["zero.stage"] == "zero/stage2_offload.yaml"
    assert "zero.sub_group_size" not in origins
    assert origins["seed"] == "command line"
    assert origins["optim.name"] == "snapshot.yaml"


ZEROS = [
    ["zero=stage0"],
    ["zero=stage1", "zero.round_robin_gradients=true"],
    ["zero=stage2_offload", "zero.allgather_bucket_size=100", "optim=cpu_adam"],
    ["zero=stage3_offload", "zero.offload_optimizer.ratio=0.5", "optim=cpu_adam"],
    ["zero=stage3", "zero.sub_group_size=99", "zero.overlap_comm=true"],
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("before", ZEROS, ids=" ".join)
def test_another_stage_keeps_what_it_reads(
    started: Started, tmp_path: Path, before: list[str], stage: int
) -> None:
    folder = started(*before)
    was = load_snapshot(folder / "snapshot.yaml").zero
    run = resolved(compose_words(tmp_path, f"resume={folder}", f"zero.stage={stage}"))
    assert run.zero.stage == stage
    assert (run.zero == was) is (stage == was.stage)
    if stage in (1, 2):
        assert run.zero.reduce_bucket_size == 500_000_000
        assert run.zero.round_robin_gradients == was.round_robin_gradients
        assert run.zero.offload_optimizer.device == was.offload_optimizer.device
        assert run.zero.allgather_bucket_size == was.allgather_bucket_size
    if stage == 3:
        assert run.zero.sub_group_size == was.sub_group_size
    if stage > 0:
        assert run.zero.overlap_comm == was.overlap_comm
    if stage == 0:
        assert run.zero.overlap_comm is None


def test_an_evaluation_has_a_directory_of_its_own(started: Started, tmp_path: Path) -> None:
    folder = started()
    words = rewrite(tmp_path, "task=evaluate", f"run={folder}", "launch.num_processes=3")
    assert f"of_run='{folder}'" in words
    place = next(word for word in words if word.startswith("hydra.run.dir="))
    assert place == f"hydra.run.dir='{folder}/evaluations/${{now:%Y-%m-%dT%H-%M-%S-%f}}'"


def test_export_and_generate_stay_in_the_run(started: Started, tmp_path: Path) -> None:
    folder = started()
    for task in ("export", "generate"):
        words = rewrite(tmp_path, f"task={task}", f"run={folder}")
        assert f"hydra.run.dir='{folder}'" in words
        with pytest.raises(
            UserError, match=rf"hydra\.run\.dir: is always the run's own directory with task={task}"
        ):
            rewrite(tmp_path, f"task={task}", f"run={folder}", "hydra.run.dir=x")
    for first in (f"run={folder}", f"reproduce={folder}"):  # before or after, what is given stays
        for words in ([first, "hydra.run.dir=x"], ["hydra.run.dir=x", first]):
            words = rewrite(tmp_path, "task=evaluate", *words)
            places = [word for word in words if word.startswith("hydra.run.dir=")]
            assert places == ["hydra.run.dir=x"]


def problems_of(run: Run) -> list[Problem]:
    return list(validate_run(run))


def test_a_task_on_an_existing_run_needs_one(started: Started, tmp_path: Path) -> None:
    assert [str(problem) for problem in problems_of(compose_run(["task=export"]))] == [
        "run: is required by task=export. Add run=DIR, the run directory."
    ]
    run = compose_words(tmp_path, f"run={started()}")
    assert [str(problem) for problem in problems_of(run)] == [
        (
            "task: must be export, evaluate or generate with run=DIR (got pretrain). To train, use"
            " resume=DIR or reproduce=DIR."
        )
    ]


@pytest.mark.parametrize("others", [("resume", "run"), ("reproduce", "run")])
def test_one_run_at_a_time(started: Started, others: tuple[str, ...]) -> None:
    folder = started()
    (problem,) = problems_with(*(f"{key}={folder}" for key in others))
    assert problem == f"{', '.join(others)}: cannot be combined. Keep one of them."


def set_status(folder: Path, status: str, *, at: int) -> None:
    (folder / "status.json").write_text(json.dumps({"status": status}))
    os.utime(folder / "snapshot.yaml", (at, at))


def test_auto_takes_the_newest_run_that_is_not_complete(
    started: Started,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, status, at in (
        ("2026-01-01/10-00-00", "preempted", 10),
        ("2026-01-02/10-00-00", "failed", 30),
        ("named", "stopped", 20),
        ("2026-01-03/10-00-00", "completed", 40),
        ("2026-01-05/10-00-00", "reproduced", 41),
        ("2026-01-06/10-00-00", "diverged", 42),
        ("sweeps/2026-01-04", "failed", 50),
        ("sweeps/2026-01-04/10-00-00/0-x", "failed", 50),
        ("named/evaluations/2026", "failed", 60),
    ):
        set_status(started(name=f"outputs/{name}"), status, at=at)
    newest = tmp_path / "outputs" / "2026-01-02" / "10-00-00"
    assert find_unfinished(tmp_path / "outputs") == newest
    (newest / "status.json").unlink()  # killed before it was written
    monkeypatch.chdir(tmp_path)
    words = rewrite(tmp_path, "resume=auto", "train.max_steps=9")
    assert f"resume.run_dir='{newest}'" in words
    assert f"hydra.run.dir='{newest}'" in words
    assert capsys.readouterr().out == f"resume=auto: {newest}\n"
    for folder in (newest, tmp_path / "outputs" / "2026-01-01" / "10-00-00"):
        (folder / "status.json").write_text('{"status": "completed"}')
    assert find_unfinished(tmp_path / "outputs") == tmp_path / "outputs" / "named"


def test_auto_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_unfinished(tmp_path)
    assert str(caught.value) == (
        f"resume: there is no unfinished run in {tmp_path}. Name its directory: resume=DIR; or"
        " start or resume in one: resume=auto hydra.run.dir=DIR."
    )


def test_auto_in_a_directory_is_a_run_of_the_command_line(tmp_path: Path) -> None:
    words: list[Any] = ["debug=smoke", "resume=auto", "hydra.run.dir=x", "zero=stage2"]
    assert rewrite(tmp_path, *words) == [
        "debug=smoke",
        "hydra.run.dir=x",
        "zero=stage2",
        "resume.run_dir=auto",
    ]


def sizes(run: Run) -> tuple[int | None, int | None, int | None]:
    batch = run.batch
    return batch.global_batch_size, batch.micro_batch_size, batch.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("ranks", "batch", "words", "expected"),
    [
        (2, ["batch.micro_batch_size=2"], [], (4, 2, 1)),
        (2, ["batch.micro_batch_size=2"], ["launch.num_processes=1"], (4, 2, 2)),
        (2, ["batch.micro_batch_size=2"], ["launch.num_processes=4"], (4, 1, 1)),
        (1, ["batch.global_batch_size=12", "batch.micro_batch_size=4"], ["launch.num_processes=2"],
         (12, 3, 2)),
        (1, ["batch.global_batch_tokens=768"], ["launch.num_processes=3"], (12, 4, 1)),
        (2, [], ["launch.num_processes=1"], (16, 8, 2)),
        (2, ["batch.micro_batch_size=2"], ["batch.micro_batch_size=1"], (4, 1, 2)),
        (2, ["batch.micro_batch_size=2"], ["batch.gradient_accumulation_steps=2"], (4, 1, 2)),
        (2, ["batch.micro_batch_size=2"], ["batch.global_batch_size=8"], (8, 2, 2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["resume", "reproduce"])
def test_the_global_batch_stays_when_ranks_change(
    started: Started,
    tmp_path: Path,
    kind: str,
    ranks: int,
    batch: list[str],
    words: list[str],
    expected: tuple[int, int, int],
) -> None:
    free = ["batch.global_batch_size=null", "batch.micro_batch_size=null"]
    folder = started(*free, "data.sequence_length=64", f"launch.num_processes={ranks}", *batch)
    assert None not in sizes(load_snapshot(folder / "snapshot.yaml"))
    run = resolved(compose_words(tmp_path, f"{kind}={folder}", *words))
    assert sizes(run) == expected


def test_ranks_that_do_not_divide_the_global_batch_are_refused(
    started: Started, tmp_path: Path
) -> None:
    folder = started("launch.num_processes=2", "batch.global_batch_size=4")
    run = resolve(
        compose_words(tmp_path, f"resume={folder}", "launch.num_processes=3"), detect_machine()
    )
    with pytest.raises(UserError, match=r"batch.global_batch_size: must be a multiple of"):
        solve_batch(run.batch, sequence_length=run.data.sequence_length, world_size=3)
