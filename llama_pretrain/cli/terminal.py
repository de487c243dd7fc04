"""What subcommands print with."""

import shutil
import sys

from llama_pretrain.config.problems import UserError


def say(text: str, *, error: bool = False) -> None:
    """Lines on standard output, or on standard error; letters that it lacks become `?`."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), file=stream)


def say_problems(error: UserError) -> None:
    """A user's mistakes, one a line."""
    for problem in error.problems:
        say(f"error: {problem}", error=True)


def terminal_width() -> int | None:
    """Columns of the terminal; `None` in a pipe, where lines stay whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
