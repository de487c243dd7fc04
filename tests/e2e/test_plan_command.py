"""task=plan and task=probe, as a user calls them."""

import json
import re

import pytest

from tests.conftest import Runner

SMALL_GPU = "launch.device_memory=100MiB"


def test_a_sweep_of_plans_is_one_table(runner: Runner) -> None:
    words = ["debug=smoke", "batch.global_batch_size=4", "zero=stage1,stage3"]
    done = runner.bare("-m", "task=plan", *words, "batch.micro_batch_size=1,3", expect=1)
    lines = [line for line in done.output.splitlines() if "zero=" in line]
    assert len(lines) == 4
    fitting = [line for line in lines if "batch.micro_batch_size=1" in line]
    assert all(re.search(r"1 x 2 x 2 .* MiB .*yes", line) for line in fitting)
    refused = [line for line in lines if "batch.micro_batch_size=3" in line]
    assert all("must be a multiple of" in line for line in refused)
    assert "Traceback" not in done.output


def test_what_does_not_fit_is_planned_and_not_started(runner: Runner) -> None:
    planned = runner("task=plan", SMALL_GPU)
    assert "does not fit in 100 MiB" in planned.output
    refused = runner(SMALL_GPU, expect=1)
    text = r"launch.device_memory: a rank needs about 0\.\d GiB, and its device has 0\.1 GiB"
    assert re.search(text, refused.output)
    assert not refused.run_dir.path.exists()
    started = runner("launch.device_memory=2GiB", "train.max_steps=1")
    assert len(started.losses) == 1


def test_what_fits(runner: Runner) -> None:
    done = runner("task=plan", "plan.fit=2GiB", "model=60m", "batch.global_batch_size=64")
    table = done.output[done.output.index("what fits in 2GiB") :]
    assert "batch.micro_batch_size=32" in table.splitlines()[2]


def test_a_large_machine_on_paper(runner: Runner) -> None:
    words = ["task=plan", "launch.nodes=128", "launch.num_processes=8", "model=llama3_70b"]
    words += ["zero=stage3", "plan.tokens_per_s=1e6", "plan.price_per_device_hour=2"]
    done = runner.bare(*words)
    assert "1024 sequences = 1 micro x 1 accumulated x 1024 ranks" in done.output
    assert "68,900,104 parameters" in done.output
    assert re.search(r"a rank sends [\d.]+ GiB a step, [\d.]+ GiB of it between", done.output)
    assert "(3P)" in done.output
    assert re.search(r"hours at 1,000,000 tokens/s, .* device-hours, [\d.,]+ in money", done.output)


def test_probe_says_how_long_the_run_would_take(runner: Runner) -> None:
    done = runner("task=probe", "plan.probe_steps=4", "train.max_steps=1000")
    assert len(done.losses) == 4
    speeds = sorted(row["tokens_per_s"] for row in done.rows("loss")[2:])
    match = re.search(r"plan\.tokens_per_s=(\d+)", done.output)
    assert match is not None
    assert speeds[0] * 0.99 <= float(match[1]) <= speeds[-1] * 1.01
    assert "1,000 steps of 256 tokens" in done.output
    summary = done.rows("peak_above_imports_bytes")[0]
    assert summary["planned_memory_bytes"] > summary["peak_above_imports_bytes"] > 0


def test_plan_json_says_where_each_value_is_from(runner: Runner) -> None:
    words = ["zero=stage2", "train.max_steps=1", "batch.micro_batch_size=2", "debug=smoke"]
    done = runner(*words, "zero.allgather_bucket_size=7_000_000")
    plan = json.loads(done.run_dir.plan.read_text())
    config = json.loads(done.run_dir.ds_config.read_text())
    sources = plan["deepspeed_sources"]
    for key, source in (
        ("zero_optimization.stage", "zero/stage2.yaml"),
        ("zero_optimization.allgather_bucket_size", "command line"),
        ("train_micro_batch_size_per_gpu", "command line"),
        ("gradient_accumulation_steps", "derived: "),
        ("zero_optimization.reduce_bucket_size", "derived: hidden_size^2"),
        ("wall_clock_breakdown", "default"),
    ):
        assert sources[key].startswith(source), key
    leaves = {f"zero_optimization.{key}" for key in config["zero_optimization"]}
    assert leaves <= sources.keys()
    again = runner.bare(f"reproduce={done.run_dir.path}", "task=plan", run_dir=done.run_dir)
    assert "snapshot.yaml" in again.output


@pytest.mark.parametrize("task", ["plan", "probe"])
def test_one_problem_is_told_once(runner: Runner, task: str) -> None:
    done = runner(f"task={task}", "optim.learning_rate=-1", expect=1)
    assert done.output.count("optim.learning_rate: must be greater than 0") == 1
