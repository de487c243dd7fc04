"""What each arm is given: sequences in our order, initial weights, learning rates.

    python benchmarks/arms/inputs.py RUN_DIR MODEL_DIR

writes the initial weights of a run of ours as a Hugging Face model, which the other arms load.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from llama_pretrain.config.precision import PrecisionName
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.data.dataset import create_pretrain_dataset
from llama_pretrain.data.loader import TrainSampler, build_loader
from llama_pretrain.data.order import SampleOrder
from llama_pretrain.plan.plan import load_plan
from llama_pretrain.plan.schedule import learning_rate_factor
from llama_pretrain.runs.layout import RunDir


class Inputs:
    """The command line of an arm, and the run of ours that it names."""

    def __init__(self) -> None:
        self.run_dir = RunDir(Path(sys.argv[1]))
        self.model_dir, self.steps_file = Path(sys.argv[2]), Path(sys.argv[3])
        self.compile = "--compile" in sys.argv
        self._step = 0
        self.run, self.plan = load_snapshot(self.run_dir.snapshot), load_plan(self.run_dir.plan)
        assert self.run.precision.name in (PrecisionName.bf16, PrecisionName.fp32)
        self.in_bf16 = self.run.precision.name == PrecisionName.bf16

    def micro_batches(self, *, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """The micro batches of one rank, in the order of our run."""
        data, plan = self.run.data, self.plan
        dataset = create_pretrain_dataset(
            plan.corpus, "train", sequence_length=data.sequence_length, limits=[None]
        )
        sampler = TrainSampler(
            order=SampleOrder(
                plan.sampling, num_sequences=dataset.num_sequences, seed=self.run.seed
            ),
            batches=[range(plan.steps.last)],
            global_batch_size=plan.batch.global_batch_size,
            rank=rank,
            world_size=world_size,
        )
        size = plan.batch.micro_batch_size
        yield from build_loader(dataset, sampler, micro_batch_size=size, num_workers=0)

    def learning_rate_factor(self) -> Callable[[int], float]:
        """The share of the peak learning rate at each step, counted from 0."""
        return learning_rate_factor(self.run.schedule, self.plan.steps)

    def write_step(self, loss: torch.Tensor) -> None:
        """Write a line with the mean loss over all ranks, which all call it with their own."""
        mean = loss.detach().double() / dist.get_world_size()
        dist.all_reduce(mean)
        self._step += 1
        row = {"step": self._step, "loss": mean.item()}
        if loss.device.type == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
        if dist.get_rank() == 0:
            with self.steps_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def write_model(run_dir: RunDir, target: Path) -> None:
    """Write the initial weights of a run as a Hugging Face model in fp32."""
    from llama_pretrain.train.model import build_llama_config, build_model

    run, plan = load_snapshot(run_dir.snapshot), load_plan(run_dir.plan)
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
