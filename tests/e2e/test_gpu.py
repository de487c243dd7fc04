"""What needs a GPU: `python -m pytest -m gpu`. docs/gpu.md says what has been run."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llama_pretrain.plan.machine import detect_machine
from tests.conftest import Command, Runner
from tests.e2e.test_parity import LONG, SHARDED, at_stage, train_shape
from tests.e2e.test_resume import forget_after, numbers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

SAME = (*LONG, "launch.num_processes=1", "batch.micro_batch_size=4")
ON_GPU = (*SAME, "launch.device=cuda")
FP32, HALF = 1e-3, 2e-2
"""Nats between the losses of a step on a GPU and on a CPU: fp32's rounding, and 16 bits'."""


def train(runner: Runner, *overrides: str) -> Command:
    return runner(*ON_GPU, *overrides)


@pytest.fixture(scope="module")
def on_cpu(shared_runner: Runner) -> Command:
    return shared_runner(*SAME, "launch.device=cpu", "precision=fp32", "optim=torch_adamw")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optim", ["torch_adamw", "fused_adam"])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", FP32), ("bf16", HALF), ("fp16", HALF)]
)
def test_losses_on_a_gpu_are_those_of_the_cpu(
    runner: Runner, on_cpu: Command, stage: int, optim: str, precision: str, tolerance: float
) -> None:
    on_gpu = train(runner, *at_stage(stage), f"precision={precision}", f"optim={optim}")
    assert on_gpu.losses == pytest.approx(on_cpu.losses, abs=tolerance)


@pytest.mark.skipif(not detect_machine().has_libaio, reason="there is no libaio here")
def test_weights_on_a_disk_train_as_on_the_cpu(
    runner: Runner, on_cpu: Command, tmp_path: Path
) -> None:
    disk = f"zero.offload_param.nvme_path={tmp_path}"
    done = train(runner, "zero=stage3_nvme", disk, "precision=bf16")
    assert done.losses == pytest.approx(on_cpu.losses, abs=HALF)


CHOICES = {
    **{name: f"zero={name}" for name in ("stage2_offload", "stage3_offload", "superoffload")},
    "zeropp": "zero=zeropp",
    "autocast": "precision=bf16_autocast",
    "plain": "kernels=plain",
    "chunked": "kernels.loss=chunked",
    "compiled": "kernels=compiled",
    "compiled_model": "kernels=compiled kernels.compile=model",
    "flex": "kernels.attention=flex_attention",
    "flash": "kernels.attention=flash_attention_2",
    "liger": "kernels=liger",
}
NEEDED = {"flash": "flash_attn", "liger": "liger_kernel"}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_train_as_the_cpu_does(runner: Runner, on_cpu: Command, name: str) -> None:
    if name in NEEDED and find_spec(NEEDED[name]) is None:
        pytest.skip(f"{NEEDED[name]} is not installed")
    done = train(runner, "precision=bf16", *CHOICES[name].split())
    # Weights in 8 bits and gradients in 4 are farther off.
    tolerance = 5 * HALF if name == "zeropp" else HALF
    assert done.losses == pytest.approx(on_cpu.losses, abs=tolerance)


def test_lion_trains_as_the_cpu_does(runner: Runner) -> None:
    settings = ("optim=lion", "optim.learning_rate=3e-4", "precision=fp32")
    on_cpu = runner(*SAME, "launch.device=cpu", *settings)
    assert train(runner, *settings).losses == pytest.approx(on_cpu.losses, abs=FP32)


def test_lamb_learns(runner: Runner) -> None:
    losses = train(runner, "optim=lamb", "zero=stage0", "precision=bf16").losses
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "words",
    [
        *("zero=stage1 precision=bf16", "zero=stage1 precision=fp16"),
        *("zero=stage2_offload precision=bf16", "zero=stage0 precision=fp32 optim=torch_adamw"),
        f"{SHARDED} precision=bf16 model.attention_dropout=0.1",
    ],
)
def test_resume_equals_the_uninterrupted_run(runner: Runner, words: str) -> None:
    """To the bit, as on a CPU; with a checkpoint that is written beside the training."""
    saves = ("checkpoint.every_steps=10", "checkpoint.asynchronous=true")
    cut = train(runner, *words.split(), *saves)
    whole = numbers(cut)
    forget_after(cut, step=14)
    resumed = runner.bare(f"resume={cut.run_dir.path}", run_dir=cut.run_dir)
    assert "resuming from step-00000010" in resumed.output
    assert numbers(resumed) == whole


def test_the_default_choices_of_a_gpu(runner: Runner) -> None:
    done = runner("launch.num_processes=1", "checkpoint.export=true")
    assert "cuda, bf16, torch_adamw, ZeRO stage 1" in done.output
    assert (done.run_dir.export / "config.json").is_file()
    evaluated = runner.bare("task=evaluate", f"run={done.run_dir.path}")
    assert f"{done.rows('eval_loss')[-1]['eval_loss']:.3f}" in evaluated.output


def test_a_profile_has_kernels_of_the_gpu(runner: Runner) -> None:
    done = train(runner, "train.profile_steps=2")
    (trace,) = (done.run_dir.path / "profile").glob("*.json*")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


@pytest.mark.parametrize("zero", ["stage1", "stage3"])
def test_memory_is_as_planned(runner: Runner, zero: str) -> None:
    """Of a model that is large beside what libraries take."""
    words = (
        f"model=350m model.vocab_size=4096 data.sequence_length=512 zero={zero} precision=bf16"
        " batch.global_batch_size=16 batch.micro_batch_size=16 train.max_steps=3"
        " train.eval_sequences=2"
    )
    done = train_shape(runner, *words.split())
    (last,) = done.rows("peak_memory_bytes")
    planned, measured = last["planned_memory_bytes"], last["peak_memory_bytes"]
    assert planned == pytest.approx(measured, rel=0.15)
