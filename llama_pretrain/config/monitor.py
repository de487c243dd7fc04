"""The config group `monitor`: where metrics go beside metrics.jsonl."""

from typing import Annotated

from llama_pretrain.config.fields import UsedWhen, schema


@schema
class Monitor:
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = True
    """Event files in tensorboard/ of the run directory."""
    csv: bool = False
    """metrics.csv in the run directory: one line a step."""
    wandb: bool = False
    """Weights & Biases (needs the extra `wandb`)."""
    wandb_project: Annotated[str, UsedWhen("monitor.wandb", (True,))] = "llama-pretrain"
    """Project of Weights & Biases; the key comes from its own login, never from the config."""
    timings: bool = False
    """Print how long each phase from the command to the end of the first step took; metrics.jsonl
    and report.html always have it."""
