"""The settings of a run that differ from the default run, each with its origin."""

from collections.abc import Iterable, Mapping

from rich.table import Table

from llama_pretrain.config.fields import yaml_text
from llama_pretrain.config.origins import default_files, origin_of
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import SNAPSHOT_NAME, to_plain
from llama_pretrain.config.validate import flatten
from llama_pretrain.console.output import out, styled


def show_config(run: ResolvedRun, origins: Mapping[str, str]) -> None:
    """Settings that an option, an overlay or the command line has changed."""
    hidden = {*default_files(), f"{SNAPSHOT_NAME}.yaml"}
    rows = [
        (path, yaml_text(value), origin)
        for path, value in flatten(to_plain(run))
        if (origin := origin_of(path, origins)) is not None
        and origin not in hidden
        and path != "resume.run_dir"  # null again once the run continues
        and not origin.startswith(("chosen:", "derived:"))
    ]
    if not rows:
        out.print("config: all settings are the defaults")
        return
    table = Table(title="config", title_justify="left", box=None, pad_edge=False, show_header=False)
    for style in ("cyan", "green", "dim"):
        table.add_column(style=style, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def show_warnings(problems: Iterable[Problem]) -> None:
    """Settings that have no effect in this run, one a line."""
    for problem in problems:
        out.print(styled("warning", "yellow"), str(problem), soft_wrap=True)
