"""A script around transformers' Trainer, as one would write it; one rank of it, for a few steps.

    torchrun --nproc-per-node 2 benchmarks/arms/start_trainer.py RECIPE.json DONE

It writes the time at which the first optimizer step had ended into DONE.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of `length` tokens out of a file of uint16."""

    def __init__(self, path: str, *, length: int):
        self._tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self._length = length

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin = index * self._length
        row = self._tokens[begin : begin + self._length].astype(np.int64)
        ids = torch.from_numpy(row)
        return {"input_ids": ids, "labels": ids}


class TellFirstStep(TrainerCallback):
    """Writes down when the first step has ended."""

    def __init__(self, done: Path):
        self._done = done

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and state.is_world_process_zero:
            self._done.write_text(repr(time.time()))


def main() -> None:
    recipe = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    arguments = TrainingArguments(
        output_dir=f"{sys.argv[2]}.output",
        deepspeed=recipe["ds_config"],
        bf16=recipe["bf16"],
        use_cpu=True,
        per_device_train_batch_size=recipe["micro_batch_size"],
        max_steps=1,
        learning_rate=recipe["learning_rate"],
        save_strategy="no",
        report_to="tensorboard",
        disable_tqdm=True,
    )
    set_seed(recipe["seed"])
    trainer = Trainer(
        model=LlamaForCausalLM(LlamaConfig(**recipe["model"])),
        args=arguments,
        train_dataset=Rows(recipe["tokens"], length=recipe["sequence_length"]),
        callbacks=[TellFirstStep(Path(sys.argv[2]))],
    )
    trainer.train()


if __name__ == "__main__":
    main()
