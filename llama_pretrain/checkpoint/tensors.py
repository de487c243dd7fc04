"""Pieces of parameters and of their optimizer state on disk, as a checkpoint holds them.

Every rank writes what it owns: ranges of flattened parameters, one safetensors file a rank. A
reader asks for any range of any parameter and gets it from whichever files have it, so a checkpoint
can be read by another number of ranks, at another ZeRO stage, or by no rank at all.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

STATE = "state.json"


LOGITS = "logits.safetensors"
"""What the training engine said to some tokens, to prove an export by."""


WEIGHT = "weight"
"""The kind of a piece that is of the parameter itself, in its master precision; others are called
as the optimizer calls them: exp_avg, exp_avg_sq, momentum_buffer, ..."""


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def piece_key(name: str, kind: str, start: int) -> str:
    """What a piece is called in its file: parameter, kind, first element."""
    return f"{name}:{kind}:{start}"


def rank_file(rank: int) -> str:
    """The file of one rank."""
    return f"rank{rank:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write a safetensors file and flush it to the disk. Returns its size and SHA-256.

    As safetensors' own `save_file` does, but with the hash taken on the way, and in steps that let
    other threads run.
    """
    return write_bytes(path, tensor_parts(tensors))


def tensor_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor after another."""
    header, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield from map(_bytes_of, tensors.values())


def write_bytes(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file and flush it to the disk. Returns its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer


@dataclass(frozen=True)
class _Place:
    file: str
    key: str
    start: int
    numel: int


class StoredState:
    """What a checkpoint folder holds. Use it in a `with` block: it keeps files open."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        """state.json: everything that is no tensor."""
        self.shapes: dict[str, list[int]] = self.values["parameters"]
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._places: dict[tuple[str, str], list[_Place]] = {}
        for path in sorted(folder.glob(rank_file(0).replace("00000", "*"))):
            for key, entry in _read_header(path).items():
                name, kind, start = key.rsplit(":", 2)
                place = _Place(path.name, key, int(start), entry["shape"][0])
                self._places.setdefault((name, kind), []).append(place)

    def __enter__(self) -> "StoredState":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    def kinds(self, name: str) -> list[str]:
        """Kinds of pieces of a parameter."""
        return [kind for owner, kind in self._places if owner == name]

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """A range of a flattened parameter: (numel,) on the CPU.

        Raises:
            ValueError: if no file has all of it.
        """
        result: torch.Tensor | None = None
        missing = numel
        done: list[tuple[int, int]] = []
        for place in self._places.get((name, kind), []):
            first, last = max(start, place.start), min(start + numel, place.start + place.numel)
            if first >= last or (first, last) in done:  # ranks may hold the same piece
                continue
            piece = self._open(place.file).get_slice(place.key)[
                first - place.start : last - place.start
            ]
            if result is None:
                result = torch.empty(numel, dtype=piece.dtype)
            result[first - start : last - start] = piece
            done.append((first, last))
            missing -= last - first
        if result is None or missing:
            raise ValueError(f"{self.folder} lacks {missing} elements of {name} ({kind})")
        return result

    def weight(self, name: str) -> torch.Tensor:
        """A whole parameter in its master precision and its shape."""
        shape = self.shapes[name]
        return self.read(name, WEIGHT, 0, torch.Size(shape).numel()).view(shape)

    def tensor(self, rank: int, key: str) -> torch.Tensor | None:
        """A tensor of one rank that is of no parameter, if that rank wrote it."""
        name, kind, _ = key.rsplit(":", 2)
        for place in self._places.get((name, kind), []):
            if place.file == rank_file(rank):
                found: torch.Tensor = self._open(place.file).get_tensor(place.key)
                return found
        return None

    def _open(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(self.folder / name, framework="pt")
            self._files[name] = self._stack.enter_context(opened)
        return self._files[name]


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header
