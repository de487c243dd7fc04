"""transformers' Trainer with our own run's DeepSpeed JSON: one rank of it.

    torchrun ... benchmarks/arms/trainer.py RUN_DIR MODEL_DIR STEPS_FILE [--compile]

Its defaults stay, but for what must be the same in all arms: the numbers of AdamW, the learning
rate of each step, the rows and their order, and no checkpoint.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks.arms.given import (
    StepFile,
    batches_of,
    in_bf16,
    learning_rates,
    read_run,
    read_words,
)
from llama_pretrain.config.run import Run
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """The micro batches of this rank."""

    def __init__(self, run: Run, plan: TrainingPlan):
        self._run, self._plan = run, plan

    def __iter__(self) -> Any:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        for batch in batches_of(self._run, self._plan, rank=rank, world_size=world_size):
            labels = batch["shift_labels"]
            # The loss reads shift_labels; labels say that there is to be one.
            yield {"input_ids": batch["input_ids"], "labels": labels, "shift_labels": labels}


class TimedTrainer(Trainer):
    """Trainer on given batches and learning rates, that writes a line a step."""

    def __init__(self, run: Run, plan: TrainingPlan, steps_file: Path, **words: Any):
        super().__init__(**words)
        self._run, self._plan, self._steps_file = run, plan, steps_file
        self._steps: StepFile | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's own batches, already whole."""
        return DataLoader(Batches(self._run, self._plan), batch_size=None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our own run's learning rates."""
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, learning_rates(self._run, self._plan))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *words: Any, **named: Any) -> torch.Tensor:
        """A step; what it returns is this rank's loss."""
        self.last_rate = self._get_learning_rate()
        self.last_loss = super().training_step(*words, **named)
        return self.last_loss

    def write_step(self) -> None:
        """Write the line of the step that has ended."""
        if self._steps is None:
            self._steps = StepFile(self._steps_file)
        self._steps.write(self.last_loss, self.last_rate)


def train(run_dir: RunDir, model_dir: Path, steps_file: Path, *, compiled: bool) -> None:
    """Train until the process is ended."""
    from transformers import TrainerCallback

    run, plan = read_run(run_dir)
    arguments = TrainingArguments(
        output_dir=str(steps_file.parent / f"{steps_file.stem}-output"),
        deepspeed=str(run_dir.ds_config),
        use_cpu=plan.device == "cpu",
        bf16=in_bf16(run),
        ddp_timeout=86_400,
        per_device_train_batch_size=plan.batch.micro_batch_size,
        max_steps=plan.steps.last,
        learning_rate=run.optim.learning_rate,
        adam_beta1=run.optim.betas[0],
        adam_beta2=run.optim.betas[1],
        adam_epsilon=run.optim.eps,
        weight_decay=run.optim.weight_decay,
        save_strategy="no",
        report_to="none",
        torch_compile=compiled,
    )
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    trainer = TimedTrainer(run, plan, steps_file, model=model, args=arguments)

    class Writes(TrainerCallback):
        """Writes a line when a step has ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            trainer.write_step()

    trainer.add_callback(Writes())
    trainer.train()


def main() -> None:
    given = read_words(__doc__)
    train(RunDir(given.run_dir), given.model_dir, given.steps_file, compiled=given.compile)


if __name__ == "__main__":
    main()
