"""`python -m llama_pretrain compare`: runs side by side."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from llama_pretrain.cli.plot import plot
from llama_pretrain.cli.terminal import Columns, say, say_problems, table_lines, terminal_width
from llama_pretrain.config.problems import UserError
from llama_pretrain.files import write_text
from llama_pretrain.runs.comparison import Comparison, group, load_runs
from llama_pretrain.runs.metrics import curve
from llama_pretrain.runs.units import printable

PLOT_WIDTH, PLOT_HEIGHT = 72, 14
MANY = 12
"""Differences of a group from which only their number is printed."""
MAX_LENGTH = 160
"""Characters of a value; JSON has the rest."""


def add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "compare",
        help="what differs between runs, their curves and their numbers",
        description="Runs side by side: options and provenance that differ, losses, time to a"
        " loss, tokens/s, memory, and overlaid curves.",
    )
    parser.add_argument("run", nargs="+", type=Path, help="run directories, two or more")
    parser.add_argument(
        "--loss",
        type=float,
        help="the evaluation loss whose time is compared (default: the worst of the runs' last)",
    )
    parser.add_argument(
        "--html",
        nargs="?",
        const=Path("compare.html"),
        type=Path,
        metavar="FILE",
        help="write a page too (default: compare.html)",
    )
    parser.add_argument("--json", action="store_true", help="JSON, for scripts")
    parser.add_argument(
        "--verbose", action="store_true", help="every difference, instead of a line for many"
    )
    parser.set_defaults(do=compare_command)


def compare_command(arguments: argparse.Namespace) -> int:
    """Print the comparison. Exit code 2 if there is nothing to compare."""
    if len(arguments.run) < 2:
        say("error: name two runs or more", error=True)
        return 2
    try:
        comparison = Comparison(
            load_runs(arguments.run), loss=arguments.loss, verbose=arguments.verbose
        )
    except UserError as error:
        say_problems(error)
        return 2
    if arguments.json:
        say(json.dumps(comparison.to_json(), indent=2))
    else:
        for line in render_text(comparison, width=terminal_width()):
            say(line)
    if arguments.html is not None:
        try:
            write_text(arguments.html, comparison.to_html())
        except OSError as error:
            say(f"error: {arguments.html} cannot be written: {error.strerror}", error=True)
            return 2
        say(f"page: {arguments.html}", error=arguments.json)
    return 0


def render_text(comparison: Comparison, *, width: int | None) -> Iterator[str]:
    """The comparison as lines; none but a path is wider than the terminal."""
    letters = comparison.letters
    for run in comparison.runs:
        yield printable(f"{run.letter}  {run.contents.dir.path}")
    yield from (f"note: {text}" for text in comparison.notes)
    for title, found in (("config", comparison.config), ("provenance", comparison.provenance)):
        yield ""
        if not found:
            yield f"{title}: nothing differs"
            continue
        rows = []
        for name, differences in group(found):
            if len(differences) > MANY and not comparison.verbose:
                counted = f"  {name}: {len(differences)} differ (--verbose lists them)"
                rows.append([counted, *([""] * len(letters))])
                continue
            rows.append([f"  {name}", *([""] * len(letters))])
            rows += [
                [f"    {texts[0]}", *(text[:MAX_LENGTH] for text in texts[1:])]
                for texts in differences
            ]
        yield from table_lines(Columns([title, *letters], fold=letters), rows, width=width)
    yield ""
    columns = Columns(["numbers", *letters], numbers=letters, fold=letters)
    yield from table_lines(columns, comparison.numbers(), width=width)
    for title, name in (("evaluation loss", "eval_loss"), ("training loss", "loss")):
        curves = {run.letter: curve(run.contents.rows, name) for run in comparison.runs}
        drawn = plot(curves, width=min(width or PLOT_WIDTH, PLOT_WIDTH), height=PLOT_HEIGHT)
        if drawn:
            yield from ("", f"{title}, nats per token (# = several runs)", *drawn)
