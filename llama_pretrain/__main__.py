"""`python -m llama_pretrain`: commands about existing runs. Runs are started by run.py."""

import argparse
import os
import sys
from collections.abc import Sequence

from llama_pretrain.cli.compare import add_compare
from llama_pretrain.cli.leaderboard import add_leaderboard
from llama_pretrain.cli.list_runs import add_list
from llama_pretrain.cli.verify import add_verify


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets `do`, a function of the arguments that returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_pretrain",
        description="Look at existing runs. To train: python run.py --help.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_list(commands)
    add_compare(commands)
    add_leaderboard(commands)
    add_verify(commands)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says. Returns the exit code: 2 for wrong usage."""
    arguments = build_parser().parse_args(words)
    try:
        code: int = arguments.do(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
