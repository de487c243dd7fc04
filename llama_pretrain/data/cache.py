"""The cache: folders named by a hash of what goes into them, each made by one process."""

import fcntl
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.data.pool import Report


@contextmanager
def claim(recipe: Any, cache_dir: Path, report: Report) -> Iterator[tuple[Path, Path, str]]:
    """The folder that a recipe names, one to make it in, and the recipe's hash.

    Whoever else wants the same data waits here until it is there.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    tokens = cache_dir / "tokens"
    target, partial = tokens / digest[:16], tokens / f".partial-{digest[:16]}"
    tokens.mkdir(parents=True, exist_ok=True)
    with (tokens / f".lock-{digest[:16]}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say("another process is preparing the same data: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield target, partial, digest


@contextmanager
def disk_problems(cache_dir: str) -> Iterator[None]:
    """Tell as the user's problem a file that may not be read, or a cache that can't be written.

    Raises:
        UserError: in place of the system's and sqlite's errors.
    """
    try:
        yield
    except OSError as error:
        message = f"{error.strerror}: {error.filename}"
        raise UserError([Problem(path="data", message=message)]) from error
    except sqlite3.Error as error:
        message = f"its hashes.sqlite can't be used: {error} (got {cache_dir})"
        hint = "delete that file, or name a folder that can be written to"
        raise UserError([Problem(path="data.cache_dir", message=message, hint=hint)]) from error
