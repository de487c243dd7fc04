"""SHA-256 of input files, remembered between runs."""

import os
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.problems import Problem, refuse
from llama_pretrain.data.cache import Cache
from llama_pretrain.files import hash_file


@dataclass(frozen=True, kw_only=True)
class File:
    """A file as it was when it was hashed."""

    path: Path
    size: int
    time: int
    """Modification time in ns."""
    digest: str


def hash_files(paths: Sequence[Path], cache: Cache) -> list[File]:
    """Hash files in parallel; those with an unchanged size and modification time are not read."""
    with closing(_open_database(cache.folder)) as database, database:
        hashed: dict[Path, File] = {}
        missing: dict[Path, int] = {}
        for path in paths:
            query = "SELECT size, time, digest FROM hashes WHERE path = ?"
            row = database.execute(query, (str(path),)).fetchone()
            stat = path.stat()
            if row is not None and row[:2] == (stat.st_size, stat.st_mtime_ns):
                hashed[path] = File(path=path, size=row[0], time=row[1], digest=row[2])
            else:
                missing[path] = stat.st_size
        done, progress = 0, cache.report.progress("hashing files", sum(missing.values()))
        with ThreadPoolExecutor() as pool, progress as show:  # hashlib releases the GIL
            for file in pool.map(_hash, missing):
                hashed[file.path] = file
                done += file.size
                show(done, 0)
                row = (str(file.path), file.size, file.time, file.digest)
                database.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", row)
    return [hashed[path] for path in paths]


def _open_database(folder: Path) -> sqlite3.Connection:
    """The hashes of the cache; a copy in memory if the cache cannot be written."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hashes.sqlite"
    shared = os.access(path if path.exists() else folder, os.W_OK) and os.access(folder, os.W_OK)
    database = sqlite3.connect(path if shared else ":memory:", timeout=60)
    if not shared and path.is_file():
        with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as stored:
            stored.backup(database)
    database.execute(
        "CREATE TABLE IF NOT EXISTS hashes"
        " (path TEXT PRIMARY KEY, size INTEGER, time INTEGER, digest TEXT)"
    )
    return database


def _hash(path: Path) -> File:
    stat = path.stat()  # before reading, so that a later change is noticed
    return File(path=path, size=stat.st_size, time=stat.st_mtime_ns, digest=hash_file(path))


def check_unchanged(files: Sequence[File], *, path: str) -> None:
    """Refuse files that changed while they were read.

    Raises:
        UserError: naming each of them.
    """
    refuse(
        Problem(path=path, message=f"{file.path} changed while it was read")
        for file in files
        if not file.path.is_file()
        or (file.path.stat().st_size, file.path.stat().st_mtime_ns) != (file.size, file.time)
    )
