"""The jobs of a sweep: which there are, what they are called, and which can run."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llama_pretrain.config.command_line import parse_command_line
from llama_pretrain.config.compose import CONF, register
from llama_pretrain.config.problems import UserError
from llama_pretrain.plan.machine import Machine
from llama_pretrain.sweep.directory import SweepDir, Verdict
from llama_pretrain.sweep.jobs import (
    Primary,
    SweepJob,
    check_job,
    compose_job,
    list_jobs,
    make_job,
    name_sweep,
    plan_on_data,
)
from tests.conftest import ROOT, SMALL
from tests.machines import LAPTOP

MACHINE = replace(LAPTOP, cores=2, memory_bytes=24 << 30, has_compiler=True)
PRIMARY = Primary(str(CONF), "config")
SWEEPS = sorted((ROOT / "sweeps" / "sweep").glob("*.yaml"))


@pytest.fixture(autouse=True)
def resolvers() -> None:
    register()


def jobs_of(*words: str) -> list[SweepJob]:
    """The jobs that these words list, with what `sweep=NAME` adds."""
    named = [word for word in words if word.startswith("sweep=")]
    params = compose_job(PRIMARY, named).hydra.sweeper.params
    listed = OmegaConf.to_container(params) if params else {}
    assert isinstance(listed, dict)
    return list_jobs(list(words), {str(key): value for key, value in listed.items()})


def check(*words: str, machine: Machine = MACHINE) -> list[SweepJob]:
    return [check_job(job, PRIMARY, machine) for job in jobs_of(*words)]


def plan(folder: Path, *words: str) -> list[SweepJob]:
    return [plan_on_data(job) for job in check(*words)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "seed=1,2"], True),
        (["--multirun", "seed=1,2"], True),
        (["sweep=seeds"], True),
        (["hydra.mode=MULTIRUN", "seed=1,2"], True),
        (["sweep=null"], False),
        (["seed=1"], False),
    ],
)
def test_what_is_a_sweep(words: list[str], expected: bool) -> None:
    assert parse_command_line(words).is_multirun == expected


def test_jobs_are_all_combinations_named_by_what_differs() -> None:
    jobs = jobs_of("zero=stage1,stage2", "seed=7", "batch.micro_batch_size=2,4")
    assert [job.label for job in jobs] == [
        "zero=stage1,batch.micro_batch_size=2",
        "zero=stage1,batch.micro_batch_size=4",
        "zero=stage2,batch.micro_batch_size=2",
        "zero=stage2,batch.micro_batch_size=4",
    ]
    assert jobs[2].settings == {"zero": "stage2", "batch.micro_batch_size": "2"}
    assert "seed=7" in jobs[2].words


def test_the_command_line_replaces_what_a_file_sweeps() -> None:
    jobs = jobs_of("sweep=batch_size", "batch.global_batch_size=4,6")
    assert [job.settings["batch.global_batch_size"] for job in jobs] == ["4", "6"]
    jobs = jobs_of("sweep=batch_size", "batch.global_batch_size=4", "seed=1,2")
    assert [job.settings for job in jobs] == [{"seed": "1"}, {"seed": "2"}]


def test_a_range_without_values_requires_a_sampler() -> None:
    with pytest.raises(UserError, match="hydra/sweeper=optuna"):
        jobs_of("optim.learning_rate=interval(1e-4,1e-2)")


def test_a_mistake_of_all_jobs_is_listed_once() -> None:
    words = ["-m", "optim.learning_rte=1", "zero=stage9", "seed=1,2"]
    problems = parse_command_line(words).problems
    assert sorted(problem.path for problem in problems) == ["optim.learning_rte", "zero"]


def test_each_job_is_checked_on_its_own() -> None:
    good, out_of_range, mistyped = check("optim.learning_rate=1e-3,-1,fast", "seed=1")
    assert good.verdict is Verdict.runs
    assert good.run is not None
    assert out_of_range.problem.startswith("optim.learning_rate: must be greater than 0 (got -1")
    assert "optim.learning_rate" in mistyped.problem
    assert {out_of_range.verdict, mistyped.verdict} == {Verdict.refused}


def test_what_does_not_fit_is_left_out_with_its_need() -> None:
    machine = replace(MACHINE, memory_bytes=2 << 30)
    small, large = check("model=tiny,130m", "batch.global_batch_size=8", machine=machine)
    assert small.verdict is Verdict.runs
    assert large.verdict is Verdict.unfit
    assert "1.0 GiB" in large.problem


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_job_of_a_shipped_sweep_can_be_planned(file: Path) -> None:
    if file.stem == "optuna_lr":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        job = make_job(0, [f"sweep={file.stem}", "optim.learning_rate=1e-3"], [])
        assert check_job(job, PRIMARY, MACHINE).problem == ""
        return
    jobs = check(f"sweep={file.stem}")
    assert len(jobs) > 2
    assert [job.problem for job in jobs if job.verdict is Verdict.refused] == []


def test_a_learning_rate_follows_the_batch() -> None:
    jobs = check("sweep=lr_by_batch_size", "optim.learning_rate=1e-3")
    rates = {job.label: job.run.optim.learning_rate for job in jobs if job.run is not None}
    label = "batch.global_batch_size=64,optim.scale_by_batch="
    assert rates[f"{label}none"] == 1e-3
    assert rates[f"{label}sqrt"] == 2e-3
    assert rates[f"{label}linear"] == 4e-3
    assert rates["batch.global_batch_size=16,optim.scale_by_batch=linear"] == 1e-3


def test_a_ladder_has_twenty_tokens_a_parameter() -> None:
    for job in check("sweep=model_ladder"):
        assert job.run is not None
        assert job.plan is not None
        assert job.run.train.max_tokens == 20 * job.plan.parameters.total


@pytest.fixture
def small(corpus: Path, cache_dir: Path) -> list[str]:
    return [*SMALL, f"data.paths=['{corpus}/*.py']", f"data.cache_dir={cache_dir}"]


def test_a_job_is_identified_by_its_config_and_its_data(
    small: list[str], corpus: Path, tmp_path: Path
) -> None:
    first, other = plan(tmp_path, *small, "seed=1,2")
    (again, _) = plan(tmp_path, *small, "seed=1,3")
    assert first.snapshot == again.snapshot != other.snapshot
    (longer,) = plan(tmp_path, *small, "seed=1,1", "train.max_steps=9")[:1]
    assert longer.snapshot != first.snapshot
    less = [f"data.paths=['{corpus}/m*.py']" if "data.paths" in w else w for w in small]
    assert plan(tmp_path, *less, "seed=1,2")[0].snapshot != first.snapshot
    # What the sweep does with its jobs is not part of them.
    assert plan(tmp_path, *small, "seed=1,2", "sweep.prune=true")[0].snapshot == first.snapshot
    # In another sweep it has another number, and the directory that it had before.
    folder = SweepDir(tmp_path)
    name = other.record(folder).folder
    assert name.startswith("01-seed=2-")
    (tmp_path / name).mkdir()
    assert plan(tmp_path, *small, "seed=2,5")[0].record(folder).folder == name


def test_a_job_with_too_little_data_is_refused(small: list[str], tmp_path: Path) -> None:
    words = ("batch.global_batch_size=4,65536", "batch.micro_batch_size=1")
    good, short = plan(tmp_path, *small, *words)
    assert good.verdict is Verdict.runs
    assert short.verdict is Verdict.refused
    assert "fewer than one global batch" in short.problem


def test_the_directory_follows_from_the_command() -> None:
    base = ["-m", "sweep=seeds", "seed=1,2"]
    name = name_sweep(base)
    assert Path(name).name.startswith("seeds-")
    assert name == name_sweep(["seed=1,2", "sweep=seeds", "--multirun", "hydra/launcher=joblib"])
    assert name != name_sweep([*base, "train.max_steps=3"])


def test_labels_shorten_what_a_sampler_has_drawn() -> None:
    words = ["optim.learning_rate=0.0031538471826636503", "seed=12345678901"]
    job = make_job(3, words, ["optim.learning_rate", "seed"])
    assert job.label == "optim.learning_rate=0.003154,seed=12345678901"
    assert job.settings["optim.learning_rate"] == "0.0031538471826636503"
