"""Existing tokens, read where they are: Megatron's files and headerless ones."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_pretrain.config.data import DataName, Source
from llama_pretrain.config.problems import Problem, refuse
from llama_pretrain.data.cache import Cache, data_error
from llama_pretrain.data.hashing import File, hash_files
from llama_pretrain.data.meta import (
    FORMAT,
    HELDOUT,
    META,
    TRAIN,
    Extent,
    TokensMeta,
    cut_extents,
    make_split,
    write_meta,
)
from llama_pretrain.data.packed import read_index
from llama_pretrain.data.sources import list_files
from llama_pretrain.data.tokenizer import TrainedTokenizer

KNOWN_HEADERS = {
    b"\x93NUMPY": ("is a .npy array with a header", "Write it with array.tofile(FILE)"),
    (20240520).to_bytes(4, "little"): (
        "begins with llm.c's header of 1,024 bytes",
        "Remove it with tail -c +1025",
    ),
}
SCAN_TOKENS = 1 << 22
DECODED_TOKENS = 1_000_000
"""Held-out tokens that are decoded to estimate the bytes of text per token."""


@dataclass(frozen=True, kw_only=True)
class ExistingTokens:
    """The valid files of a source."""

    files: list[File]
    extents: list[Extent]
    dtype: str
    documents: int | None


def prepare_existing(
    config: Source,
    path: str,
    tokenizer: TrainedTokenizer,
    cache: Cache,
    *,
    heldout_fraction: float,
) -> Path:
    """Validate existing tokens and write a meta.json that refers to them. Returns its directory.

    Raises:
        UserError: for files that are truncated, of another type or of another tokenizer.
    """
    whole = _open_existing(config, path, tokenizer, cache, heldout=False)
    files, other = list(whole.files), None
    if config.heldout_paths:
        other = _open_existing(config, path, tokenizer, cache, heldout=True)
        files += other.files
    listed = [(str(file.path), file.size, file.digest) for file in files]
    recipe = {
        "format": FORMAT,
        "files": listed,
        "tokenizer": (tokenizer.digest, tokenizer.eos_id),
        "options": ("apart" if other else heldout_fraction, whole.dtype),
    }
    with cache.claim(recipe) as (target, partial, digest):
        if (target / META).is_file():
            return target
        if other is None:  # the end of each file is held out
            cuts = [(e, int(e.tokens * (1 - heldout_fraction))) for e in whole.extents]
            sides = [cut_extents([extent], tokens) for extent, tokens in cuts]
            train = [extent for head, _ in sides for extent in head]
            heldout = [extent for _, tail in sides for extent in tail]
        elif other.dtype == whole.dtype:
            train, heldout = whole.extents, other.extents
        else:
            message = f"must have the type of {path}.paths, {whole.dtype} (got {other.dtype})"
            raise data_error(f"{path}.heldout_paths", message)
        num_bytes = int(
            _bytes_per_token(heldout, whole.dtype, tokenizer) * sum(e.tokens for e in heldout)
        )
        splits = {
            TRAIN: make_split(train, whole.documents, None),
            HELDOUT: make_split(heldout, other.documents if other else None, num_bytes),
        }
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tokenizer.folder, partial / "tokenizer")
        meta = TokensMeta(
            format=FORMAT,
            data_hash=digest,
            tokenizer_hash=tokenizer.digest,
            vocab_size=tokenizer.size,
            eos_id=tokenizer.eos_id,
            dtype=whole.dtype,
            sequence_tokens=None,
            splits=splits,
            files=listed,
        )
        write_meta(partial, meta)
        os.rename(partial, target)
    return target


def _open_existing(
    config: Source, path: str, tokenizer: TrainedTokenizer, cache: Cache, *, heldout: bool
) -> ExistingTokens:
    """Find the token files of `paths` or `heldout_paths` and check every id in them."""
    name = "heldout_paths" if heldout else "paths"
    option = f"{path}.{name}"
    paths = list_files(getattr(config, name), path=option)
    documents: int | None = None
    if config.name is DataName.megatron:
        paths = [file for file in paths if file.suffix != ".idx"]
        found = list(_read_indexes(paths, option, tokenizer))
        dtypes = sorted({dtype for dtype, _, _ in found})
        if len(dtypes) > 1:
            message = f"must have one type of token ids (got {', '.join(dtypes)})"
            raise data_error(option, message, "Make each type a source of a mixture")
        dtype, sizes = dtypes[0], [tokens for _, tokens, _ in found]
        documents = sum(count for _, _, count in found)
    elif config.dtype is None:
        raise data_error(f"{path}.dtype", "is required with data=tokens")
    else:
        dtype = config.dtype.value
        _check_dtype(dtype, path, tokenizer)
        refuse(_check_headerless(paths, option, dtype))
        sizes = [file.stat().st_size // np.dtype(dtype).itemsize for file in paths]
    files = hash_files(paths, cache)
    _check_ids(files, option, dtype, tokenizer, cache)
    extents = [
        Extent(file=str(file.path), first=0, tokens=tokens)
        for file, tokens in zip(files, sizes, strict=True)
    ]
    return ExistingTokens(files=files, extents=extents, dtype=dtype, documents=documents)


def _read_indexes(
    paths: Sequence[Path], option: str, tokenizer: TrainedTokenizer
) -> Iterator[tuple[str, int, int]]:
    """Type, tokens and documents of each .bin according to its .idx."""
    for file in paths:
        index_file = file.with_suffix(".idx")
        if not index_file.is_file():
            hint = "Add data=tokens for files without an index"
            raise data_error(option, f"{file} requires {index_file.name} beside it", hint)
        try:
            index = read_index(index_file)
        except ValueError as error:
            raise data_error(option, str(error)) from error
        expected, size = index.tokens * np.dtype(index.dtype).itemsize, file.stat().st_size
        if size != expected:
            message = f"{file} must have {expected:,} bytes according to its index (got {size:,})"
            raise data_error(option, message, "The file may be truncated")
        lengths = index.first_lengths
        tokens = np.fromfile(file, index.dtype, int(lengths.sum()))
        ends = tokens[np.cumsum(lengths) - 1] if len(lengths) else tokens
        wrong = ends[ends != tokenizer.eos_id]
        if len(wrong):
            message = (
                f"{file}: documents must end with the tokenizer's end-of-text token"
                f" {tokenizer.eos_id} (got {int(wrong[0])} in {len(wrong)} of the first"
                f" {len(ends)})"
            )
            hint = "Use the tokenizer that made the tokens, and write them with --append-eod"
            raise data_error(option, message, hint)
        yield index.dtype, index.tokens, index.documents


def _check_dtype(dtype: str, path: str, tokenizer: TrainedTokenizer) -> None:
    largest = np.iinfo(dtype).max
    if tokenizer.size - 1 > largest:
        message = (
            f"{dtype} holds ids up to {largest:,}, but the tokenizer has {tokenizer.size:,} tokens:"
            " larger ids wrapped around when the file was written"
        )
        raise data_error(f"{path}.dtype", message, "Write the tokens as uint32")


def _check_headerless(paths: Sequence[Path], option: str, dtype: str) -> Iterator[Problem]:
    width = np.dtype(dtype).itemsize
    for file in paths:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
        for magic, (message, hint) in KNOWN_HEADERS.items():
            if start.startswith(magic):
                yield Problem(path=option, message=f"{file} {message}", hint=hint)
        if size == 0 or size % width:
            message = f"{file} must have a multiple of {width} bytes for {dtype} (got {size:,})"
            hint = "The file may be truncated or have a header"
            yield Problem(path=option, message=message, hint=hint)


def _check_ids(
    files: Sequence[File], option: str, dtype: str, tokenizer: TrainedTokenizer, cache: Cache
) -> None:
    """Check every id: one outside of the vocabulary would stop training midway."""
    done, total = 0, sum(file.size for file in files)
    with cache.report.progress("checking tokens", total) as show:
        for file in files:
            position = 0
            with file.path.open("rb") as opened:
                while len(tokens := np.fromfile(opened, dtype, SCAN_TOKENS)):
                    if int(tokens.max()) >= tokenizer.size or int(tokens.min()) < 0:
                        place = int(np.argmax((tokens >= tokenizer.size) | (tokens < 0)))
                        message = (
                            f"{file.path}: token {position + place:,} must be below the"
                            f" tokenizer's size {tokenizer.size:,} (got {int(tokens[place])})"
                        )
                        hint = "Use the tokenizer and the dtype that the file was written with"
                        raise data_error(option, message, hint)
                    position += len(tokens)
                    done += tokens.nbytes
                    show(done, 0)


def _bytes_per_token(extents: list[Extent], dtype: str, tokenizer: TrainedTokenizer) -> float:
    """Bytes of text per token, measured on the first DECODED_TOKENS."""
    num_bytes = tokens = 0
    for extent in cut_extents(extents, DECODED_TOKENS)[0]:
        offset = extent.first * np.dtype(dtype).itemsize
        ids = np.fromfile(extent.file, dtype, extent.tokens, offset=offset)
        text = tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True)
        num_bytes += len(text.encode("utf-8"))
        tokens += len(ids)
    return num_bytes / max(1, tokens)
