"""How often a step makes the host wait for its device, beside DeepSpeed's own step."""

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_pretrain.plan.batch import BatchPlan
from llama_pretrain.train import step as step_module
from llama_pretrain.train.progress import Progress
from llama_pretrain.train.step import train_step
from tests.conftest import compose_run
from tests.test_train import random_batches
from tests.test_train_state import RANK, engine_at

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__")
"""Methods of a tensor that wait until the device has computed it."""
PACKAGE = Path(step_module.__file__).parent


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Functions of ours that read a tensor, in their order, as they do."""
    found: list[str] = []

    def watched(name: str, read: Any) -> Any:
        def method(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            caller = traceback.extract_stack(limit=2)[0]
            if Path(caller.filename).parent == PACKAGE:
                found.append(f"{caller.name}: {name}")
            return read(tensor, *args, **more)

        return method

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("spike", ["none", "skip"])
@pytest.mark.usefixtures("process_group")
def test_a_step_waits_once_and_when_all_is_done(
    monkeypatch: pytest.MonkeyPatch, accumulation: int, spike: str
) -> None:
    """Sample ids are the host's own. Of a spike the loss decides, so it is read before."""
    engine = engine_at(1, bf16=True)
    stage = SimpleNamespace(sequence_length=random_batches(1)[0]["input_ids"].shape[1])
    training: Any = SimpleNamespace(
        run=compose_run([f"train.spike={spike}"]),
        plan=SimpleNamespace(
            batch=BatchPlan(
                global_batch_size=2 * accumulation,
                micro_batch_size=2,
                gradient_accumulation_steps=accumulation,
            ),
            sampling=SimpleNamespace(stage_at=lambda sample: stage),
        ),
        rank=RANK,
        engine=engine,
        train_set=SimpleNamespace(masked=False),
    )
    monkeypatch.setattr(engine, "gradient_accumulation_steps", lambda: accumulation)
    batches = [
        {**batch, "sample_id": torch.arange(2 * number, 2 * number + 2)}
        for number, batch in enumerate(random_batches(accumulation))
    ]
    found = watch_reads(monkeypatch)
    saver: Any = SimpleNamespace(written=False)
    result = train_step(training, iter(batches), Progress(), saver, saved_at=0.0)
    assert result.finite
    ids = ["train_step: numpy"] * accumulation
    sums, norm = "_read: tolist", "apply_update: __float__"
    assert found == ids + ([norm, sums] if spike == "none" else [sums, norm])
