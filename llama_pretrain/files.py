"""Files: atomic writes, reads of files that may be anything, SHA-256."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what the block writes there is flushed and renamed.

    Readers see the old file or the new one. If the block fails, the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unpredictable and new: a link that somebody has put there is not followed.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flock(descriptor: int, operation: int) -> bool:
    """Take a lock of flock(2). False on a file system without such locks, as some shared ones.

    Raises:
        BlockingIOError: with LOCK_NB, if another process holds it.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return False
    return True


@contextmanager
def locking(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder's lock; the system releases it however the process ends.

    Raises:
        BlockingIOError: without `wait`, if another process or another part of this one holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, values: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


MAX_BYTES = 1 << 30
"""Of a file that is read at once: the metrics of some three million steps."""
MAX_JSON_BYTES = 1 << 26
MAX_DIGITS = 20
"""Of an integer in JSON: 64 bits."""


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Open a file that must be a regular one: a pipe would block for ever.

    A link is followed for reading only.

    Raises:
        OSError: if it is none.
    """
    follow = 0 if flags & os.O_ACCMODE == os.O_RDONLY else os.O_NOFOLLOW
    descriptor = os.open(path, flags | follow | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def read_regular(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The contents of a regular file.

    Raises:
        OSError: if it is none, or has more bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"has more than {max_bytes:,} bytes", str(path))
    return content


def parse_json(content: bytes | str) -> Any:
    """JSON of a file that may be anything.

    Raises:
        ValueError: if it is not JSON, is nested too deeply, or has a number that is too long.
    """
    try:
        return json.loads(content, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"has a number of {len(text)} digits")
    return int(text)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; `None` if the file is missing, unreadable or damaged."""
    try:
        values = parse_json(read_regular(path, max_bytes=MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def hash_bytes(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes."""
    return hash_bytes(text.encode("utf-8"))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
