"""What needs a GPU: `python -m pytest -m gpu`. docs/gpu.md says what has been run."""

import pytest
import torch

from tests.conftest import Runner
from tests.e2e.test_parity import LONG, at_stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("precision", "optim", "tolerance"),
    [
        ("fp32", "torch_adamw", 1e-3),
        ("fp32", "fused_adam", 1e-3),
        ("bf16", "fused_adam", 2e-2),
        ("fp16", "fused_adam", 2e-2),
    ],
)
def test_losses_on_a_gpu_are_those_of_the_cpu(
    runner: Runner, stage: int, precision: str, optim: str, tolerance: float
) -> None:
    same = (*LONG, "launch.num_processes=1", "batch.micro_batch_size=4")
    on_cpu = runner(*same, "launch.device=cpu", "precision=fp32", "optim=torch_adamw")
    on_gpu = runner(
        *same,
        "launch.device=cuda",
        *at_stage(stage),
        f"precision={precision}",
        f"optim={optim}",
        timeout_s=900,
    )
    assert on_gpu.losses == pytest.approx(on_cpu.losses, abs=tolerance)


@pytest.mark.parametrize("zero", ["stage2_offload", "stage3_offload"])
def test_offload_trains_on_a_gpu(runner: Runner, zero: str) -> None:
    done = runner("launch.device=cuda", "launch.num_processes=1", f"zero={zero}", timeout_s=900)
    assert len(done.losses) == 3


def test_the_default_choices_of_a_gpu(runner: Runner) -> None:
    done = runner("launch.num_processes=1", "checkpoint.export=true", timeout_s=900)
    assert "cuda, bf16, fused_adam, ZeRO stage 1" in done.output
    assert (done.run_dir.export / "config.json").is_file()
