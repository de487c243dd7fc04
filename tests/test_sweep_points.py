"""A sweep's command line: its points, their names and identities, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama_pretrain.config.compose import register
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.rewrite import is_sweep
from llama_pretrain.plan.machine import Machine
from llama_pretrain.sweep.command import run_sweep
from llama_pretrain.sweep.directory import SweepDir, Verdict
from llama_pretrain.sweep.points import (
    Command,
    Corpora,
    SweepPoint,
    check_point,
    explain_plugin,
    list_points,
    make_point,
    name_sweep,
    plan_point,
    read_command,
    sweep_folder,
)
from tests.conftest import ROOT, SMALL

MACHINE = Machine(
    cores=2,
    memory_bytes=24 << 30,
    num_gpus=0,
    gpu_name=None,
    gpu_memory_bytes=None,
    gpu_capability=None,
    cpu_bf16=False,
    cpu_intel=False,
    cpu_fast_bf16=True,
    has_compiler=True,
    has_libaio=False,
)
SWEEPS = sorted((ROOT / "sweeps" / "sweep").glob("*.yaml"))


@pytest.fixture(autouse=True)
def resolvers() -> None:
    register()


def command(*words: str) -> Command:
    return read_command(["-m", *words])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "seed=1,2"], True),
        (["--multirun", "seed=1,2"], True),
        (["sweep=seeds"], True),
        (["hydra.mode=MULTIRUN", "seed=1,2"], True),
        (["sweep=null"], False),
        (["seed=1"], False),
        (["-m", "seed=1,2", "--cfg", "job"], False),
    ],
)
def test_what_is_a_sweep(words: list[str], expected: bool) -> None:
    assert is_sweep(words) == expected


def test_points_are_all_combinations_by_what_differs() -> None:
    points = list_points(command("zero=stage1,stage2", "seed=7", "batch.micro_batch_size=2,4"))
    assert [point.label for point in points] == [
        "zero=stage1,batch.micro_batch_size=2",
        "zero=stage1,batch.micro_batch_size=4",
        "zero=stage2,batch.micro_batch_size=2",
        "zero=stage2,batch.micro_batch_size=4",
    ]
    assert points[2].settings == {"zero": "stage2", "batch.micro_batch_size": "2"}
    assert "seed=7" in points[2].words


def test_the_command_line_replaces_what_a_file_sweeps() -> None:
    points = list_points(command("sweep=batch_size", "batch.global_batch_size=4,6"))
    assert [point.settings["batch.global_batch_size"] for point in points] == ["4", "6"]
    points = list_points(command("sweep=batch_size", "batch.global_batch_size=4", "seed=1,2"))
    assert [point.settings for point in points] == [{"seed": "1"}, {"seed": "2"}]


def test_a_range_without_values_needs_a_sampler() -> None:
    with pytest.raises(UserError, match="hydra/sweeper=optuna"):
        list_points(command("optim.learning_rate=interval(1e-4,1e-2)"))


def test_what_is_wrong_with_all_points_is_told_once() -> None:
    with pytest.raises(UserError) as caught:
        command("optim.learning_rte=1", "zero=stage9", "seed=1,2")
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["zero", "optim.learning_rte"]


def test_a_launcher_that_is_not_there_names_its_extra() -> None:
    with pytest.raises(UserError) as caught:
        command("seed=1,2", "hydra/launcher=ray")
    (problem,) = caught.value.problems
    assert str(problem).startswith("hydra/launcher: there is no option 'ray'; options: basic")
    assert "provider" not in str(problem)
    for group, option, extra in (
        ("launcher", "joblib", "joblib"),
        ("launcher", "submitit_slurm", "slurm"),
        ("sweeper", "optuna", "optuna"),
        ("sweeper/sampler", "tpe", "optuna"),
    ):
        (problem,) = explain_plugin(f"Could not find 'hydra/{group}/{option}'")
        assert problem.hint == f"it comes with an extra: pip install -e '.[{extra}]'"
    assert explain_plugin("Could not find 'zero/stage8'") == []


def check(*words: str) -> list[SweepPoint]:
    told = command("debug=smoke", *words)
    return [check_point(point, told, MACHINE) for point in list_points(told)]


def test_each_point_is_checked_on_its_own() -> None:
    good, range_, typed, option = (
        check("optim.learning_rate=1e-3,-1,fast", "seed=1") + check("zero=stage8,stage8")[:1]
    )
    assert good.verdict is Verdict.runs
    assert good.run is not None
    assert range_.problem == "optim.learning_rate: should be greater than 0 (got -1.0)"
    assert typed.problem.startswith("optim.learning_rate: should be a number (got fast)")
    assert "there is no option 'stage8'" in option.problem
    assert {point.verdict for point in (range_, typed, option)} == {Verdict.refused}


def test_points_of_a_sweep_have_one_task() -> None:
    train, evaluate = check("task=pretrain,prepare")
    assert train.verdict is Verdict.runs
    assert evaluate.problem == "task: is the same for all points of a sweep (got prepare)"


def test_points_that_a_sampler_draws_are_not_planned_in_a_table() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["sweep=optuna_lr", "task=plan"]
    with pytest.raises(UserError, match="optuna draws them one by one"):
        run_sweep(words, command(*words))


def test_what_does_not_fit_is_left_out_with_its_need() -> None:
    machine = replace(MACHINE, memory_bytes=2 << 30)
    told = command("model=tiny,130m", "batch.global_batch_size=8")
    small, large = (check_point(point, told, machine) for point in list_points(told))
    assert small.verdict is Verdict.runs
    assert large.verdict is Verdict.unfit
    assert large.problem.endswith("GiB, and its device has 1.0 GiB")


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_point_of_a_shipped_sweep_can_be_planned(file: Path) -> None:
    words = [f"sweep={file.stem}"]
    if file.stem == "optuna_lr":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        told = command(*words)
        assert told.sweeper == "optuna"
        point = make_point(0, [*words, "optim.learning_rate=1e-3"], ["optim.learning_rate"])
        assert check_point(point, told, MACHINE).problem == ""
        return
    told = command(*words)
    points = [check_point(point, told, MACHINE) for point in list_points(told)]
    assert len(points) > 2
    assert [point.problem for point in points if point.verdict is Verdict.refused] == []


def test_the_rules_by_which_a_rate_follows_the_batch() -> None:
    told = command("sweep=lr_by_batch_size", "optim.learning_rate=1e-3")
    rates = {}
    for point in list_points(told):
        checked = check_point(point, told, MACHINE)
        assert checked.run is not None
        rates[checked.label] = checked.run.optim.learning_rate
    label = "batch.global_batch_size=64,optim.scale_by_batch="
    assert rates[f"{label}none"] == 1e-3
    assert rates[f"{label}sqrt"] == 2e-3
    assert rates[f"{label}linear"] == 4e-3
    assert rates["batch.global_batch_size=16,optim.scale_by_batch=linear"] == 1e-3


def test_a_ladder_has_twenty_tokens_a_parameter() -> None:
    told = command("sweep=model_ladder")
    for point in list_points(told):
        checked = check_point(point, told, MACHINE)
        assert checked.run is not None
        assert checked.plan is not None
        assert checked.run.train.max_tokens == 20 * checked.plan.parameters.total
        assert checked.run.train.tokens_per_parameter is None


@pytest.fixture
def small(corpus: Path, cache_dir: Path) -> list[str]:
    return [*SMALL, f"data.paths=['{corpus}/*.py']", f"data.cache_dir={cache_dir}"]


def plan(folder: Path, *words: str) -> list[SweepPoint]:
    told, corpora = command(*words), Corpora()
    points = [check_point(point, told, MACHINE) for point in list_points(told)]
    return [plan_point(point, corpora, SweepDir(folder)) for point in points]


def test_a_point_is_known_by_its_config_and_its_data(
    small: list[str], corpus: Path, tmp_path: Path
) -> None:
    first, other = plan(tmp_path, *small, "seed=1,2")
    (again, _) = plan(tmp_path, *small, "seed=1,3")
    assert first.digest == again.digest != other.digest
    (longer,) = plan(tmp_path, *small, "seed=1,1", "train.max_steps=9")[:1]
    assert longer.digest != first.digest
    less = [f"data.paths=['{corpus}/m*.py']" if "data.paths" in w else w for w in small]
    assert plan(tmp_path, *less, "seed=1,2")[0].digest != first.digest
    # What the sweep does with its points is no part of them.
    assert plan(tmp_path, *small, "seed=1,2", "sweep.prune=true")[0].digest == first.digest


def test_a_point_keeps_the_folder_that_it_had(small: list[str], tmp_path: Path) -> None:
    _, second = plan(tmp_path, *small, "seed=1,2")
    folder = SweepDir(tmp_path)
    name = second.record(folder).folder
    assert name == f"01-seed=2-{second.digest}"
    (tmp_path / name).mkdir()
    moved = plan(tmp_path, *small, "seed=2,5")[0]
    assert moved.record(folder).folder == name


def test_too_little_data_is_a_reason_of_its_own(small: list[str], tmp_path: Path) -> None:
    words = ("batch.global_batch_size=4,65536", "batch.micro_batch_size=1")
    good, short = plan(tmp_path, *small, *words)
    assert good.verdict is Verdict.runs
    assert short.verdict is Verdict.refused
    assert "fewer than one global batch (got 65536)" in short.problem


def test_the_folder_follows_from_the_command() -> None:
    base = ["-m", "sweep=seeds", "seed=1,2"]
    name = name_sweep(base)
    assert name.startswith("seeds-")
    assert name == name_sweep(["seed=1,2", "sweep=seeds", "--multirun", "hydra/launcher=joblib"])
    assert name != name_sweep([*base, "train.max_steps=3"])
    assert sweep_folder(command("seed=1,2"), base).path.name == name
    place = "hydra.sweep.dir=/somewhere/else"
    assert sweep_folder(command("seed=1,2", place), [*base, place]).path == Path("/somewhere/else")


def test_labels_shorten_what_a_sampler_has_drawn() -> None:
    words = ["optim.learning_rate=0.0031538471826636503", "seed=12345678901"]
    point = make_point(3, words, ["optim.learning_rate", "seed"])
    assert point.label == "optim.learning_rate=0.003154,seed=12345678901"
    assert point.settings["optim.learning_rate"] == "0.0031538471826636503"
