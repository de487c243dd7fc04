"""Signs of life: each rank counts its progress in one small file, and the parent reads it.

A file, because it outlives whoever writes it and needs no connection that could hang as well.
"""

import math
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SLOT = struct.Struct("<qqd")
STARTED = 3
"""Beats before there is anything to lose: begun, met the others, built the engine."""


@dataclass(frozen=True)
class Beat:
    """How far a rank has come."""

    pid: int
    """0 before the rank has begun."""
    count: int
    at: float
    """On this machine's monotonic clock, in seconds; infinite when the rank has done its work."""

    @property
    def finished(self) -> bool:
        """Whether the rank needs nothing any more."""
        return math.isinf(self.at)


class Heartbeat:
    """One rank's slot."""

    def __init__(self, path: Path, rank: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._offset, self._count = rank * SLOT.size, 0
        self.beat()

    def beat(self) -> None:
        """Say that something has been done: a micro batch, a batch of an evaluation, a file."""
        self._write(time.monotonic())

    def finish(self) -> None:
        """Say that this rank has done its work, and that its end is no death."""
        self._write(math.inf)

    def _write(self, at: float) -> None:
        self._count += 1
        os.pwrite(self._file, SLOT.pack(os.getpid(), self._count, at), self._offset)


def read_beats(path: Path, *, world_size: int) -> list[Beat]:
    """Where each rank is."""
    content = path.read_bytes() if path.is_file() else b""
    content = content.ljust(world_size * SLOT.size, b"\0")
    return [Beat(*SLOT.unpack_from(content, rank * SLOT.size)) for rank in range(world_size)]
