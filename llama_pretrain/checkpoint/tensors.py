"""Checkpoint tensors on disk: fragments of parameters and of their optimizer state.

Each rank writes the ranges of flattened parameters that it owns, into one safetensors file. A
reader asks for any range of any parameter and gets it from the files that hold it, which an index
names. So a checkpoint can be read by any number of ranks, at any ZeRO stage, or without ranks, and
a rank of a thousand opens the few files that it needs.
"""

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama_pretrain.checkpoint.manifest import INDEX, MANIFEST, STATE, rank_file
from llama_pretrain.files import read_json

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


Piece = tuple[int, int, int]
"""First element, number of elements, and the rank whose file has them."""


def build_index(sizes: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Where the pieces of each parameter and of its state are; equal places are stored once.

    Args:
        sizes: number of elements by name of each tensor that a rank has written, by rank.
    """
    pieces: dict[str, list[Piece]] = {}
    for rank, written in enumerate(sizes):
        for key, numel in written.items():
            tensor, _, start = key.rpartition(":")
            pieces.setdefault(tensor, []).append((int(start), numel, rank))
    layouts: dict[tuple[Piece, ...], int] = {}
    tensors = {
        tensor: layouts.setdefault(tuple(sorted(places)), len(layouts))
        for tensor, places in pieces.items()
    }
    return {"tensors": tensors, "layouts": list(layouts)}


def _kinds_in(tensors: Iterable[str], name: str) -> list[str]:
    known = (tensor.rpartition(":") for tensor in tensors)
    return [kind for owner, _, kind in known if owner == name]


class StoredState:
    """Reads a checkpoint folder. Use it in a `with` block: it keeps files open.

    Args:
        rank: the reader's. What it has written itself it finds without the index.
    """

    def __init__(self, folder: Path, *, rank: int | None = None):
        self.folder = folder
        self.values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        """state.json: everything that is not a tensor."""
        self.shapes: dict[str, list[int]] = self.values["parameters"]
        self._stack = ExitStack()
        self.files: dict[int, Any] = {}
        """Those that are open, by rank."""
        self._own = {} if rank is None else self._list_own(rank)

    def _list_own(self, rank: int) -> dict[str, list[Piece]]:
        """The pieces in one rank's file."""
        found: dict[str, list[Piece]] = {}
        for key, numel in self._sizes(rank).items():
            tensor, _, start = key.rpartition(":")
            found.setdefault(tensor, []).append((int(start), numel, rank))
        return {tensor: sorted(pieces) for tensor, pieces in found.items()}

    @cached_property
    def _all(self) -> dict[str, list[Piece]]:
        """The pieces in all files, from the index."""
        try:
            listed = INDEX in (read_json(self.folder / MANIFEST) or {"files": [INDEX]})["files"]
            index = (read_json(self.folder / INDEX) if listed else None) or self._scan()
            layouts = [
                [(int(first), int(numel), int(rank)) for first, numel, rank in pieces]
                for pieces in index["layouts"]
            ]
            return {tensor: layouts[number] for tensor, number in index["tensors"].items()}
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.folder / INDEX} is damaged: {error!r}") from error

    def _scan(self) -> dict[str, Any]:
        """The index of a checkpoint that has none: of an earlier version."""
        sizes: list[dict[str, int]] = []
        while written := self._sizes(len(sizes)):
            sizes.append(written)
        return build_index(sizes)

    def _sizes(self, rank: int) -> dict[str, int]:
        """Numbers of elements of the tensors in a rank's file; none if there is no file."""
        if not (self.folder / rank_file(rank)).is_file():
            return {}
        file = self._open(rank)
        return {key: file.get_slice(key).get_shape()[0] for key in file.keys()}  # noqa: SIM118

    def __enter__(self) -> "StoredState":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.files.clear()

    def kinds(self, name: str) -> list[str]:
        """The kinds of a parameter's fragments."""
        return _kinds_in(self._own, name) or _kinds_in(self._all, name)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """A range of a flattened parameter: (numel,) on the CPU.

        Raises:
            ValueError: if the files do not hold all of it.
        """
        tensor = f"{name}:{kind}"
        own = self._own.get(tensor, [])
        whole = any(first <= start and start + numel <= first + size for first, size, _ in own)
        pieces = own if whole else self._all.get(tensor, [])
        result: Tensor | None = None
        missing = numel
        copied: list[tuple[int, int]] = []
        longest = max((size for _, size, _ in pieces), default=0)
        for begin, size, rank in pieces[bisect_left(pieces, start - longest, key=itemgetter(0)) :]:
            if begin >= start + numel:
                break
            first, last = max(start, begin), min(start + numel, begin + size)
            if first >= last or (first, last) in copied:  # several ranks may hold a fragment
                continue
            stored = self._open(rank).get_slice(fragment_key(name, kind, begin))
            values = stored[first - begin : last - begin]
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
        found: Tensor | None = None
        if key in self._sizes(rank):
            found = self._open(rank).get_tensor(key)
        return found

    def _open(self, rank: int) -> Any:
        if rank not in self.files:
            opened = safe_open(self.folder / rank_file(rank), framework="pt")
            self.files[rank] = self._stack.enter_context(opened)
        return self.files[rank]
