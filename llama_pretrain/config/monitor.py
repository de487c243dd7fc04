"""The config group `monitor`: where metrics go beside metrics.jsonl."""

from llama_pretrain.config.fields import schema


@schema
class Monitor:
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = True
    """Event files in tensorboard/ of the run directory."""
    csv: bool = False
    """metrics.csv in the run directory: one row a step."""
    wandb: bool = False
    """Weights & Biases (needs the extra `wandb`)."""
    wandb_project: str = "llama-pretrain"
    """Project of Weights & Biases; the key comes from its own login, never from here."""
    timings: bool = False
    """Show on the terminal where the seconds went from the command to the end of the first step,
    by phase; metrics.jsonl and report.html have them always."""
