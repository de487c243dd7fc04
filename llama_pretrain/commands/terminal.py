"""What subcommands print with."""

import shutil
import sys


def say(text: str, *, error: bool = False) -> None:
    """Lines on standard output, or on standard error; letters that it lacks become `?`."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), file=stream)


def terminal_width() -> int | None:
    """Columns of the terminal; `None` in a pipe, where lines stay whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
