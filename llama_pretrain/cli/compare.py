"""`python -m llama_pretrain compare`: runs side by side."""

import argparse
from pathlib import Path

from llama_pretrain.cli.terminal import say, say_problems, terminal_width
from llama_pretrain.config.problems import UserError


def add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand and its arguments."""
    parser = commands.add_parser(
        "compare",
        help="what differs between runs, their curves and their numbers",
        description="Runs side by side: settings and provenance that differ, losses, time to a"
        " loss, tokens/s, memory, and the curves laid over each other.",
    )
    parser.add_argument("run", nargs="+", type=Path, help="run directories, two or more")
    parser.add_argument(
        "--loss",
        type=float,
        help="the evaluation loss whose time is told (default: the worst of the runs' last ones)",
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
    parser.set_defaults(do=compare_command)


def compare_command(arguments: argparse.Namespace) -> int:
    """Print the comparison. Exit code 2 if there is nothing to compare."""
    # YAML and more, which `list` does without.
    from llama_pretrain.runs.compare import final_losses, load_runs
    from llama_pretrain.runs.compare_text import render_json, render_text

    if len(arguments.run) < 2:
        say("error: name two runs or more", error=True)
        return 2
    try:
        runs = load_runs(arguments.run)
    except UserError as error:
        say_problems(error)
        return 2
    losses = final_losses(runs)
    loss = arguments.loss if arguments.loss is not None else max(losses, default=None)
    if arguments.json:
        say(render_json(runs, loss=loss))
    else:
        for line in render_text(runs, loss=loss, width=terminal_width()):
            say(line)
    if arguments.html is not None:
        from llama_pretrain.files import write_text
        from llama_pretrain.runs.compare_page import render_comparison

        try:
            write_text(arguments.html, render_comparison(runs, loss=loss))
        except OSError as error:
            say(f"error: {arguments.html} can't be written: {error.strerror}", error=True)
            return 2
        say(f"page: {arguments.html}", error=arguments.json)
    return 0
