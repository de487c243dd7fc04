"""One rank of transformers' Trainer with the DeepSpeed JSON of our run.

    torchrun ... benchmarks/arms/trainer.py RUN_DIR MODEL_DIR STEPS_FILE [--compile]

Its defaults stay, except for what must be the same in all arms: AdamW's settings, the learning rate
of each step, the sequences and their order, and no checkpoint.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.arms.inputs import Inputs


class MicroBatches(IterableDataset[dict[str, torch.Tensor]]):
    """The micro batches of this rank."""

    def __init__(self, inputs: Inputs):
        self._inputs = inputs

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        for batch in self._inputs.micro_batches(rank=rank, world_size=world_size):
            labels = batch["shift_labels"]
            # The loss reads shift_labels; the model computes one only if there are labels.
            yield {"input_ids": batch["input_ids"], "labels": labels, "shift_labels": labels}


class TimedTrainer(Trainer):
    """Trainer on given batches and learning rates, which remembers this rank's last loss."""

    inputs: Inputs
    last_loss: torch.Tensor

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(MicroBatches(self.inputs), batch_size=None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, self.inputs.learning_rate_factor())
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *words: Any, **named: Any) -> torch.Tensor:
        self.last_loss = super().training_step(*words, **named)
        return self.last_loss


class WriteSteps(TrainerCallback):
    """Writes a line when a step has ended."""

    def __init__(self, trainer: TimedTrainer):
        self._trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer.inputs.write_step(self._trainer.last_loss)


def main() -> None:
    """Train until the process is killed."""
    inputs = Inputs()
    plan, optim = inputs.plan, inputs.run.optim
    arguments = TrainingArguments(
        output_dir=str(inputs.steps_file.with_suffix(".output")),
        deepspeed=str(inputs.run_dir.ds_config),
        use_cpu=plan.device == "cpu",
        bf16=inputs.in_bf16,
        ddp_timeout=86_400,
        per_device_train_batch_size=plan.batch.micro_batch_size,
        max_steps=plan.steps.last,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        save_strategy="no",
        report_to="none",
        torch_compile=inputs.compile,
    )
    model = LlamaForCausalLM.from_pretrained(inputs.model_dir, dtype=torch.float32)
    trainer = TimedTrainer(model=model, args=arguments)
    trainer.inputs = inputs
    trainer.add_callback(WriteSteps(trainer))
    trainer.train()


if __name__ == "__main__":
    main()
