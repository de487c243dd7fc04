"""The config as a tree."""

from typing import Any

from rich.markup import escape
from rich.tree import Tree

from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.console.output import out


def show_config(run: Run) -> None:
    """The composed config as a tree."""
    tree = Tree("[bold]config[/]", guide_style="dim")
    values, defaults = to_plain(run), to_plain(DeepSpeed())
    # Twelve sections of DeepSpeed that are rarely touched: only what differs.
    changed = {key: value for key, value in values["deepspeed"].items() if value != defaults[key]}
    values["deepspeed"] = changed or "all at their defaults"
    _grow(tree, values)
    out.print(tree)


def _grow(tree: Tree, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            _grow(tree.add(f"[bold cyan]{key}[/]"), value)
        else:
            tree.add(f"{key}: [green]{escape(_plain(value))}[/]")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
