"""Copies of tokens on a node's own disk, for ranks whose shared file system is slow."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llama_pretrain.data.meta import META, TokensMeta, read_meta, write_meta
from llama_pretrain.files import flock, hash_file
from llama_pretrain.plan.plan import Corpus

CHUNK = 1 << 26
POLL_S = 0.2


def copy_corpus(corpus: Corpus, cache: Path, *, beat: Callable[[], None]) -> Corpus:
    """A corpus whose tokens are read from `cache`, where they are copied once on each node.

    Every rank calls it: the first one of a node copies, the others wait.

    Args:
        beat: called again and again meanwhile.

    Raises:
        OSError: if there is no room, or a copy differs from what was read.
    """
    sources = [
        replace(
            source,
            tokens_dir=str(_copy(Path(source.tokens_dir), cache, source.data_hash[:16], beat)),
        )
        for source in corpus.sources
    ]
    return replace(corpus, sources=sources)


def _copy(folder: Path, cache: Path, name: str, beat: Callable[[], None]) -> Path:
    """Copy a directory of tokens, unless it is there. Returns where it is then."""
    target, partial = cache / "tokens" / name, cache / "tokens" / f".partial-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".lock-{name}", beat):
        if (target / META).is_file():
            return target
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        meta = read_meta(folder, path="data")
        write_meta(partial, _copy_files(meta, folder, partial, beat))
        partial.rename(target)
    return target


def _copy_files(
    meta: TokensMeta, folder: Path, target: Path, beat: Callable[[], None]
) -> TokensMeta:
    """Copy the files that a meta.json names. Returns the one of the copies."""
    names: dict[str, str] = {}
    splits = {}
    for split, tokens in meta.splits.items():
        for extent in tokens.extents:
            if extent.file not in names:
                names[extent.file] = f"{len(names):05}-{Path(extent.file).name}"
                _copy_file(folder / extent.file, target / names[extent.file], beat)
        extents = [replace(extent, file=names[extent.file]) for extent in tokens.extents]
        splits[split] = replace(tokens, extents=extents)
    return replace(meta, splits=splits)


def _copy_file(source: Path, copy: Path, beat: Callable[[], None]) -> None:
    """Copy a file, and check the copy's SHA-256.

    Raises:
        OSError: if it differs.
    """
    digest = hashlib.sha256()
    with source.open("rb") as reader, copy.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            beat()
        writer.flush()
        os.fsync(writer.fileno())
    if hash_file(copy) != digest.hexdigest():
        raise OSError(f"{copy} differs from {source}, of which it is a copy")


@contextmanager
def _locked(path: Path, beat: Callable[[], None]) -> Iterator[None]:
    with path.open("w") as lock:
        while True:
            with contextlib.suppress(BlockingIOError):
                flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            beat()
            time.sleep(POLL_S)
        yield
