"""The data cache: directories named by a hash of what they are made from."""

import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.files import flock, hash_text

ShowProgress = Callable[[int, int], None]
"""Takes the bytes read so far, and the bytes of text in them."""


class Report(Protocol):
    """Where data preparation reports what it does, e.g. console.DataReport."""

    def say(self, line: str) -> None:
        """Print one line."""

    def progress(self, what: str, total: int) -> AbstractContextManager[ShowProgress]:
        """Show a progress bar over `total` bytes to read."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The cache directory, and where its use is reported."""

    folder: Path
    report: Report

    @contextmanager
    def claim(self, recipe: Any) -> Iterator[tuple[Path, Path, str]]:
        """Lock the tokens that a recipe describes; a process that wants the same ones waits.

        Nothing is locked or written if they are complete: the cache may be read-only.

        Returns:
            The final directory, a partial one to build it in, and the recipe's hash.
        """
        digest = hash_text(json.dumps(recipe, sort_keys=True))
        tokens, name = self.folder / "tokens", digest[:16]
        if (tokens / name).is_dir():
            yield tokens / name, tokens / f".partial-{name}", digest
            return
        tokens.mkdir(parents=True, exist_ok=True)
        with (tokens / f".lock-{name}").open("w") as lock:
            try:
                flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.report.say("waiting for another process that prepares the same data")
                flock(lock.fileno(), fcntl.LOCK_EX)
            yield tokens / name, tokens / f".partial-{name}", digest


def data_error(path: str, message: str, hint: str = "") -> UserError:
    """One problem as an exception to raise."""
    return UserError([Problem(path=path, message=message, hint=hint)])


@contextmanager
def disk_problems(cache_dir: str) -> Iterator[None]:
    """Report unreadable files and a cache that cannot be written as the user's problem.

    Raises:
        UserError: in place of OSError and sqlite3.Error.
    """
    try:
        yield
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{place}"
        cache = Path(cache_dir).expanduser().resolve()
        failed = Path(os.fsdecode(error.filename or cache))
        if failed.is_relative_to(cache) or cache.is_relative_to(failed):  # a parent to be made
            hint = "Choose a directory that can be written, with room: data.cache_dir=DIR"
            raise data_error("data.cache_dir", message, hint) from error
        raise data_error("data", message) from error
    except sqlite3.Error as error:
        message = f"hashes.sqlite cannot be used: {error} (got {cache_dir})"
        hint = "Delete that file, or choose a directory that can be written"
        raise data_error("data.cache_dir", message, hint) from error
