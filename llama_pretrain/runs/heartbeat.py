"""Signs of life: each rank counts its progress in one small file, and the parent reads it.

A file, because it outlives whoever writes it and needs no connection that could hang as well.
"""

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SLOT = struct.Struct("<qqd")


@dataclass(frozen=True)
class Beat:
    """How far a rank has come."""

    pid: int
    """0 before the rank has begun."""
    count: int
    at: float
    """On this machine's monotonic clock, in seconds."""


class Heartbeat:
    """One rank's slot."""

    def __init__(self, path: Path, rank: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._offset, self._count = rank * SLOT.size, 0
        self.beat()

    def beat(self) -> None:
        """Say that something has been done: a micro batch, a batch of an evaluation, a file."""
        self._count += 1
        content = SLOT.pack(os.getpid(), self._count, time.monotonic())
        os.pwrite(self._file, content, self._offset)


def read_beats(path: Path, *, world_size: int) -> list[Beat]:
    """Where each rank is."""
    content = path.read_bytes() if path.is_file() else b""
    content = content.ljust(world_size * SLOT.size, b"\0")
    return [Beat(*SLOT.unpack_from(content, rank * SLOT.size)) for rank in range(world_size)]
