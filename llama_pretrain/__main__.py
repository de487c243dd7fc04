"""`python -m llama_pretrain`: commands about existing runs. Runs are started by run.py."""

import argparse
import sys
from collections.abc import Sequence

from llama_pretrain.cli.checkpoint import add_checkpoint
from llama_pretrain.cli.compare import add_compare
from llama_pretrain.cli.leaderboard import add_leaderboard
from llama_pretrain.cli.list_runs import add_list
from llama_pretrain.cli.verify import add_verify
from llama_pretrain.process import ignore_lost_output


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets `do`, a function of the arguments that returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_pretrain",
        description="Look at existing runs, and ask running ones for a checkpoint. To train:"
        " python run.py --help.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_list(commands)
    add_compare(commands)
    add_leaderboard(commands)
    add_verify(commands)
    add_checkpoint(commands)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says. Returns the exit code: 2 for wrong usage."""
    if words is None:  # in a process of its own
        ignore_lost_output()
    arguments = build_parser().parse_args(words)
    try:
        return int(arguments.do(arguments))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
