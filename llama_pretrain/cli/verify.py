"""`python -m llama_pretrain verify`: whether a run directory is whole."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from llama_pretrain.cli.terminal import Columns, say, table_lines, terminal_width

MARKS = {"pass": "ok", "fail": "FAIL", "absent": "-"}


FILES = ("snapshot.yaml", "plan.json", "status.json", "metrics.jsonl")
"""A folder with none of them is no run."""


def add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand and its arguments."""
    parser = commands.add_parser(
        "verify",
        help="whether a run directory is whole, from snapshot to export",
        description="Reads every file of a run directory and checks that it is as it was written"
        " and agrees with the others. Exit code 0 if all is well, 1 if a check fails.",
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--deep", action="store_true", help="read all tokens that it was trained on, too"
    )
    parser.add_argument("--json", action="store_true", help="JSON, for scripts")
    parser.set_defaults(do=verify_command)


def verify_command(arguments: argparse.Namespace) -> int:
    """Print a line for each check. Exit code 1 if one fails, 2 if there is no run."""
    if not any((arguments.run / name).is_file() for name in FILES):
        say(f"error: {arguments.run} is no run directory", error=True)
        return 2
    from llama_pretrain.cli.integrity import iter_failures, verify_run  # pydantic, numpy

    checks = verify_run(arguments.run, deep=arguments.deep)
    failures = list(iter_failures(checks))
    if arguments.json:
        say(json.dumps([asdict(check) for check in checks], indent=2))
        return 1 if failures else 0
    rows = [(MARKS[check.result.value], check.name, check.text) for check in checks]
    columns = Columns(("", "what", "found"), fold=("found",))
    for line in table_lines(columns, rows, width=terminal_width()):
        say(line)
    say("")
    fail = "fails" if len(failures) == 1 else "fail"
    count = f"{len(failures)} of {len(checks)} checks {fail}"
    say(count if failures else f"whole: {len(checks)} checks, none fails")
    return 1 if failures else 0
