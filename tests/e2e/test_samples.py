"""Samples while training: they are there, and nothing else knows of them."""

from shlex import split
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.browser import PHONE, OpenPageFunction
from tests.conftest import Command, Runner
from tests.e2e.test_parity import at_stage
from tests.rows import json_rows

SAMPLED = split(
    "launch.num_processes=2 batch.micro_batch_size=1 model.attention_dropout=0.2 precision=fp32"
    " optim.learning_rate=3e-2 train.max_steps=4 train.eval_every_steps=2"
    " train.sample_prompt=import train.sample_tokens=6 checkpoint.every_steps=2"
)
TIMES = {
    *("start_seconds", "tokens_per_s", "mfu", "memory_bytes"),
    *("checkpoint_seconds", "checkpoint_stall_seconds"),
}


def numbers(done: Command) -> list[dict[str, Any]]:
    """All that is measured but times and memory, the run's last line left out.

    Lines of saves come last: when a save beside training is done is a matter of time.
    """
    rows = json_rows(done.run_dir.metrics)
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in sorted(rows, key=lambda row: "checkpoint" in row)
        if "finished" not in row
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_samples_change_no_number(runner: Runner, open_page: OpenPageFunction, stage: int) -> None:
    """With dropout, which a generator that was touched would change."""
    words = (*SAMPLED, *at_stage(stage), "checkpoint.at_end=true")
    sampled = runner(*words, "checkpoint.export=true")
    plain = runner(*words, "train.sample_prompt=''")
    assert len(sampled.losses) == 4
    assert numbers(sampled) == numbers(plain)
    assert not plain.run_dir.samples.exists()
    rows = json_rows(sampled.run_dir.samples)
    assert [(row["step"], row["tokens"]) for row in rows] == [(0, 0), (2, 512), (4, 1024)]
    assert all(row["prompt"] == "import" and row["text"].startswith("import") for row in rows)
    assert len({row["text"] for row in rows}) > 1
    opened = open_page(sampled.run_dir.report, width=PHONE)
    assert (opened.errors, opened.requests, opened.beyond()) == ([], [], [])
    headings = opened.page.locator("h3").all_text_contents()
    assert {"step 0, 0 tokens", "step 2, 512 tokens", "step 4, 1,024 tokens"} <= {*headings}
    # The exported model says the same as the engine has said.
    greedy = ("generate.temperature=0", "generate.prompt=import", "generate.num_tokens=6")
    said = runner.bare("task=generate", f"run={sampled.run_dir.path}", *greedy)
    assert said.output == rows[-1]["text"] + "\n"


@pytest.mark.slow
def test_a_resumed_run_writes_each_sample_once(runner: Runner) -> None:
    """Its last step is done again; and TensorBoard has the texts."""
    done = runner(*SAMPLED, "monitor=tensorboard")
    before = json_rows(done.run_dir.samples)
    assert [row["step"] for row in before] == [0, 2, 4]
    words = (f"resume={done.run_dir.path}", "train.max_steps=6")
    runner.bare(*words, run_dir=done.run_dir)
    rows = json_rows(done.run_dir.samples)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[:2] == before[:2]
    (resumed,) = done.rows("resumed")
    assert resumed["step"] == 2  # the last checkpoint
    assert f"step 2: resumed from here at {resumed['resumed']}" in done.run_dir.report.read_text()
    events = EventAccumulator(str(done.run_dir.tensorboard))
    events.Reload()
    texts = events.Tensors("sample/text_summary")
    assert [event.step for event in texts] == [0, 2, 4, 6]
