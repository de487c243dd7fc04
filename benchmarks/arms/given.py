"""What each competitor is given: its rows in our order, the first weights, the learning rates.

    python benchmarks/arms/given.py RUN_DIR MODEL_DIR

writes the first weights of a run of ours as a Hugging Face model, which competitors then read.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from llama_pretrain.config.precision import PrecisionName
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.data.dataset import create_pretrain_dataset
from llama_pretrain.data.loader import TrainSampler, build_loader
from llama_pretrain.data.order import SampleOrder
from llama_pretrain.plan.plan import TrainingPlan, load_plan
from llama_pretrain.runs.layout import RunDir


def read_run(run_dir: RunDir) -> tuple[Run, TrainingPlan]:
    """What a run of ours was told, and what follows."""
    return load_snapshot(run_dir.snapshot), load_plan(run_dir.plan)


def in_bf16(run: Run) -> bool:
    """Whether a run of ours trains in bf16; unasked, not on a CPU without instructions for it."""
    assert run.precision.name in (PrecisionName.bf16, PrecisionName.fp32)
    return run.precision.name == PrecisionName.bf16


def batches_of(
    run: Run, plan: TrainingPlan, *, rank: int, world_size: int
) -> Iterator[dict[str, Any]]:
    """The micro batches of one rank, in the order in which our own run trains on them."""
    rows = create_pretrain_dataset(
        plan.corpus,
        "train",
        sequence_length=run.data.sequence_length,
        limits=[run.data.limit_train_sequences] * len(plan.corpus.sources),
    )
    sampler = TrainSampler(
        order=SampleOrder(plan.sampling, num_sequences=rows.num_sequences, seed=run.seed),
        batches=[range(plan.steps.last)],
        global_batch_size=plan.batch.global_batch_size,
        rank=rank,
        world_size=world_size,
    )
    size = plan.batch.micro_batch_size
    yield from build_loader(rows, sampler, micro_batch_size=size, num_workers=0)


def learning_rates(run: Run, plan: TrainingPlan) -> Callable[[int], float]:
    """The share of the peak learning rate at each step, counted from 0, as our own run has it."""
    from llama_pretrain.train.optimizer import learning_rate_factor

    return learning_rate_factor(run.schedule, plan.steps)


def read_words(about: str | None) -> argparse.Namespace:
    """The command line of a competitor: run_dir, model_dir, steps_file, and whether to compile."""
    parser = argparse.ArgumentParser(description=about)
    for name in ("run_dir", "model_dir", "steps_file"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


class StepFile:
    """One line a step: its number, the loss over all ranks, and the clock at its end."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8") if dist.get_rank() == 0 else None
        self._step = 0

    def write(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Every rank calls it, with the mean of its own targets."""
        mean = loss.detach().double() / dist.get_world_size()
        dist.all_reduce(mean)
        self._step += 1
        row = {"step": self._step, "loss": mean.item(), "learning_rate": learning_rate}
        if loss.device.type == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
        if self._file is not None:
            self._file.write(json.dumps({**row, "seconds": time.perf_counter()}) + "\n")
            self._file.flush()


def write_model(run_dir: RunDir, target: Path) -> None:
    """Write the first weights of a run as a Hugging Face model in fp32."""
    from llama_pretrain.train.model import build_llama_config, build_model

    run, plan = read_run(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir.tokenizer)
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    config = build_llama_config(
        run.model,
        vocab_size=plan.vocab_size,
        special_ids={name: getattr(tokenizer, name) for name in special},
    )
    ds_config = json.loads(run_dir.ds_config.read_text(encoding="utf-8"))
    build_model(config, seed=run.seed, weights=None, ds_config=ds_config).save_pretrained(target)


if __name__ == "__main__":
    write_model(RunDir(Path(sys.argv[1])), Path(sys.argv[2]))
