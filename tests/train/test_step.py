"""How often a step makes the host wait for its device, besides DeepSpeed's own step."""

import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_pretrain.plan.batch import BatchPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.train import step as step_module
from llama_pretrain.train.progress import Progress
from llama_pretrain.train.step import train_step
from tests.machines import plan_for_cluster
from tests.train.engines import BATCH_SIZE, RANK, build_small_engine, random_batches

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__")
"""Methods of a tensor that wait until the device has computed it."""
PACKAGE = Path(step_module.__file__).parent


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that collects our functions that read a tensor, in order."""
    found: list[str] = []

    def recorded(name: str, read: Any) -> Any:
        def method(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            caller = traceback.extract_stack(limit=2)[0]
            if Path(caller.filename).parent == PACKAGE:
                found.append(f"{caller.name}: {name}")
            return read(tensor, *args, **more)

        return method

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, recorded(name, getattr(torch.Tensor, name)))
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("spike", ["none", "skip"])
@pytest.mark.usefixtures("process_group")
def test_a_step_waits_once_for_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulation: int, spike: str
) -> None:
    """After the update; before it only if the loss decides on the step. Ids are on the host."""
    engine = build_small_engine(1, bf16=True)
    stage = SimpleNamespace(sequence_length=random_batches(1)[0]["input_ids"].shape[1])
    batch_plan = BatchPlan(
        global_batch_size=BATCH_SIZE * accumulation, micro_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    sampling = SimpleNamespace(stage_at=lambda sample: stage)
    training: Any = SimpleNamespace(
        run=plan_for_cluster(f"train.spike={spike}"),
        plan=SimpleNamespace(batch=batch_plan, sampling=sampling),
        rank=RANK,
        run_dir=RunDir(tmp_path),
        engine=engine,
        split=nullcontext,
        train_set=SimpleNamespace(masked=False),
    )
    monkeypatch.setattr(engine, "gradient_accumulation_steps", lambda: accumulation)
    batches = [
        {**batch, "sample_id": torch.arange(2 * number, 2 * number + 2)}
        for number, batch in enumerate(random_batches(accumulation))
    ]
    found = record_reads(monkeypatch)
    saver: Any = SimpleNamespace(written=False)
    result = train_step(training, iter(batches), Progress(), saver, saved_at=0.0)
    assert result.finite
    ids = ["train_step: numpy"] * accumulation
    shared, norm = "_read: tolist", "apply_update: __float__"
    assert found == ids + ([norm, shared] if spike == "none" else [shared, norm])
