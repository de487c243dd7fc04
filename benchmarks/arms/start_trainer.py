"""One rank of a script around transformers' Trainer, as one would write it, for one step.

    torchrun --nproc-per-node 2 benchmarks/arms/start_trainer.py RECIPE.json DONE

It writes the time at which the first optimizer step ended to DONE.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset

RECIPE = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
DONE = Path(sys.argv[2])


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """The sequences in a file of uint16."""

    def __init__(self) -> None:
        tokens, length = np.memmap(RECIPE["tokens"], np.uint16, "r"), RECIPE["sequence_length"]
        self._sequences = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._sequences[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class WriteFirstStep(transformers.TrainerCallback):
    """Writes when the first step ended."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and state.is_world_process_zero:
            DONE.write_text(repr(time.time()))


transformers.set_seed(RECIPE["seed"])
transformers.Trainer(
    model=transformers.LlamaForCausalLM(transformers.LlamaConfig(**RECIPE["model"])),
    args=transformers.TrainingArguments(
        output_dir=f"{DONE}.output",
        deepspeed=RECIPE["ds_config"],
        bf16=RECIPE["bf16"],
        use_cpu=True,
        per_device_train_batch_size=RECIPE["micro_batch_size"],
        max_steps=1,
        learning_rate=RECIPE["learning_rate"],
        save_strategy="no",
        report_to="tensorboard",
        disable_tqdm=True,
    ),
    train_dataset=Sequences(),
    callbacks=[WriteFirstStep()],
).train()
