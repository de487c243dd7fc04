"""Checkpoint tensors on disk: fragments of parameters and of their optimizer state.

Each rank writes the ranges of flattened parameters that it owns, into one safetensors file. A
reader asks for any range of any parameter and gets it from the files that hold it. So a checkpoint
can be read by any number of ranks, at any ZeRO stage, or without ranks.
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
from torch import Tensor

from llama_pretrain.checkpoint.manifest import STATE, rank_file

LOGITS = "logits.safetensors"
"""The training engine's logits for a few tokens; an export is compared with them."""
WEIGHT = "weight"
"""The kind of a fragment of the parameter itself, in its master precision. Other kinds have the
optimizer's names: exp_avg, exp_avg_sq, momentum_buffer, ..."""
TRAINED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's types by the names of config group `precision`."""
STORED_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def fragment_key(name: str, kind: str, start: int) -> str:
    """The name of a fragment in its file: parameter, kind, first element."""
    return f"{name}:{kind}:{start}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file and flush it to disk. Returns its size and SHA-256.

    Unlike safetensors' own `save_file`, it hashes while it writes and releases the GIL between
    tensors, so that training continues during an asynchronous save.
    """
    return write_and_hash(path, _serialize(tensors))


def write_and_hash(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file and flush it to disk. Returns its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _serialize(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the header, then one tensor after another."""
    header, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = STORED_DTYPES[tensor.dtype], list(tensor.shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer


@dataclass(frozen=True)
class _Location:
    file: str
    key: str
    start: int
    numel: int


class StoredState:
    """Reads a checkpoint folder. Use it in a `with` block: it keeps files open."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        """state.json: everything that is not a tensor."""
        self.shapes: dict[str, list[int]] = self.values["parameters"]
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._locations: dict[tuple[str, str], list[_Location]] = {}
        for path in sorted(folder.glob(rank_file(0).replace("00000", "*"))):
            file = self._open(path.name)
            for key in file.keys():  # noqa: SIM118  # not a mapping
                name, kind, start = key.rsplit(":", 2)
                numel = file.get_slice(key).get_shape()[0]
                location = _Location(path.name, key, int(start), numel)
                self._locations.setdefault((name, kind), []).append(location)

    def __enter__(self) -> "StoredState":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    def kinds(self, name: str) -> list[str]:
        """The kinds of a parameter's fragments."""
        return [kind for owner, kind in self._locations if owner == name]

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """A range of a flattened parameter: (numel,) on the CPU.

        Raises:
            ValueError: if the files do not hold all of it.
        """
        result: Tensor | None = None
        missing = numel
        copied: list[tuple[int, int]] = []
        for place in self._locations.get((name, kind), []):
            first, last = max(start, place.start), min(start + numel, place.start + place.numel)
            if first >= last or (first, last) in copied:  # several ranks may hold a fragment
                continue
            stored = self._open(place.file).get_slice(place.key)
            values = stored[first - place.start : last - place.start]
            if result is None:
                result = torch.empty(numel, dtype=values.dtype)
            result[first - start : last - start] = values
            copied.append((first, last))
            missing -= last - first
        if result is None or missing:
            raise ValueError(f"{self.folder} lacks {missing} elements of {name} ({kind})")
        return result

    def weight(self, name: str) -> Tensor:
        """A whole parameter in its master precision and its shape."""
        shape = self.shapes[name]
        return self.read(name, WEIGHT, 0, torch.Size(shape).numel()).view(shape)

    def tensor(self, rank: int, key: str) -> Tensor | None:
        """A tensor that belongs to a rank and not to a parameter; `None` if it wrote none."""
        name, kind, _ = key.rsplit(":", 2)
        for place in self._locations.get((name, kind), []):
            if place.file == rank_file(rank):
                found: Tensor = self._open(place.file).get_tensor(place.key)
                return found
        return None

    def _open(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(self.folder / name, framework="pt")
            self._files[name] = self._stack.enter_context(opened)
        return self._files[name]
