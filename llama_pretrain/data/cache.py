"""The cache: folders named by a hash of what goes into them, each made by one process."""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
