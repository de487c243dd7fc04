"""`python -m llama_pretrain leaderboard`: the jobs of a sweep, the best first."""

import argparse
from pathlib import Path

from llama_pretrain.cli.terminal import say
from llama_pretrain.config.problems import UserError


def add_leaderboard(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "leaderboard",
        help="the jobs of a sweep, the best first",
        description="Show the jobs of a sweep, the best first, and rewrite results.jsonl,"
        " results.csv, report.html and hparams/, even while it runs.",
    )
    parser.add_argument(
        "sweep",
        nargs="?",
        type=Path,
        default=Path("outputs/sweeps"),
        metavar="SWEEP",
        help="a sweep's folder, or one with sweeps in it: the newest (default: outputs/sweeps)",
    )
    parser.set_defaults(do=show_leaderboard)


def show_leaderboard(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 2 if there is no sweep."""
    from llama_pretrain.sweep.results import conclude_newest  # Hydra: not for other commands

    try:
        conclude_newest(arguments.sweep)
    except UserError as error:
        say(f"error: {error}", error=True)
        return 2
    return 0
