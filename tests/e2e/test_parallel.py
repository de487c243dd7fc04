"""Ranks that share sequences compute what one rank computes that has them whole."""

import itertools
from typing import Any

import pytest

from llama_pretrain.checkpoint.manifest import newest_of, read_manifest
from llama_pretrain.runs.metrics import evaluations, read_metrics, steps
from tests.conftest import Command, Runner

WORDS = (
    "precision=fp32",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=2",
    "train.max_steps=4",
    "train.eval_every_steps=null",
    "launch.threads_per_process=1",
)


def numbers(run: Command) -> list[Any]:
    rows = read_metrics(run.run_dir.metrics)
    trained = [(row.step, row.loss, row.grad_norm or 0.0, row.sample_hash) for row in steps(rows)]
    return [*trained, *((row.step, row.eval_loss, 0.0, "") for row in evaluations(rows))]


def assert_same(ours: Command, whole: Command, *, loss: float = 1e-6, norm: float = 1e-5) -> None:
    for one, other in itertools.zip_longest(numbers(ours), numbers(whole)):
        assert (one[0], one[3]) == (other[0], other[3])
        assert one[1] == pytest.approx(other[1], rel=loss)
        assert one[2] == pytest.approx(other[2], rel=norm)


def test_ranks_that_share_documents_equal_one_rank(runner: Runner) -> None:
    words = (*WORDS, "data.document_mask=true", "train.gradient_checkpointing=true")
    whole = runner(*words, "launch.num_processes=1")
    shared = runner(*words, "zero=stage3", "launch.num_processes=4",
                    "launch.sequence_parallel_size=2")  # fmt: skip
    assert_same(shared, whole)
    assert "8 sequences = 2 micro x 2 accumulated x 2 x 2 ranks that share" in shared.output


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("mask", ["true", "false"])
def test_every_kernel_of_attention_can_share(runner: Runner, kernel: str, mask: str) -> None:
    words = (*WORDS, f"kernels.attention={kernel}", f"data.document_mask={mask}")
    whole = runner(*words, "launch.num_processes=1")
    shared = runner(*words, "launch.num_processes=4", "launch.sequence_parallel_size=4")
    assert_same(shared, whole)


@pytest.mark.slow
def test_16_bits_and_lengths_that_grow_can_be_shared(runner: Runner) -> None:
    stages = "data.stages=[{from_tokens:0,sequence_length:32},{from_tokens:1024}]"
    words = (*WORDS, stages, "precision=bf16", "optim=muon", "zero=stage2")
    whole = runner(*words, "launch.num_processes=1")
    shared = runner(*words, "launch.num_processes=2", "launch.sequence_parallel_size=2")
    assert_same(shared, whole, loss=1e-3, norm=2e-2)


@pytest.mark.slow
def test_a_checkpoint_loads_with_other_ranks_that_share(runner: Runner) -> None:
    words = (
        *WORDS,
        "checkpoint.every_steps=1",
        "schedule=constant",
        "batch.gradient_accumulation_steps=null",
    )
    whole = runner(*words, "launch.num_processes=1")
    run = runner(*words, "zero=stage2", "launch.num_processes=4",
                 "launch.sequence_parallel_size=2", "train.max_steps=2")  # fmt: skip
    for steps_done, stage, ranks, sharing in ((3, 3, 2, 2), (4, 0, 4, 4)):
        run = runner.bare(
            f"resume={run.run_dir.path}",
            f"train.max_steps={steps_done}",
            f"zero.stage={stage}",
            f"launch.num_processes={ranks}",
            f"launch.sequence_parallel_size={sharing}",
            run_dir=run.run_dir,
        )
        newest = newest_of(run.run_dir.checkpoints)
        assert newest is not None
        assert read_manifest(newest).world_size == ranks
    ours = [row for row in numbers(run) if row[2]]
    for one, other in zip(ours, numbers(whole), strict=False):
        assert one[3] == other[3]
        assert one[1] == pytest.approx(other[1], rel=1e-5)
        assert one[2] == pytest.approx(other[2], rel=1e-4)
    assert len(ours) == 4
