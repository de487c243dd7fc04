"""Tokens that exist already, read where they lie: Megatron's files, and files without a header."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_pretrain.config.data import DataName
from llama_pretrain.config.data import Source as SourceConfig
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.data.cache import claim
from llama_pretrain.data.meta import (
    FORMAT,
    HELDOUT,
    META,
    TRAIN,
    Extent,
    Split,
    TokensMeta,
    cut_extents,
    write_meta,
)
from llama_pretrain.data.packed import read_index
from llama_pretrain.data.pool import Report
from llama_pretrain.data.sources import File, hash_files, list_files
from llama_pretrain.data.tokenizer import TrainedTokenizer

KNOWN_HEADERS = {
    b"\x93NUMPY": "is a .npy array with a header; write it without: array.tofile(FILE)",
    (20240520).to_bytes(4, "little"): "begins with llm.c's header of 1,024 bytes; cut it off:"
    " tail -c +1025",
}
SCAN_TOKENS = 1 << 22
DECODED_TOKENS = 1_000_000
"""Held-out tokens that are decoded to know their bytes, where there is no text."""


@dataclass(frozen=True, kw_only=True)
class ExistingTokens:
    """The files of one source, checked."""

    files: list[File]
    extents: list[Extent]
    dtype: str
    documents: int | None


def open_existing(
    config: SourceConfig,
    *,
    path: str,
    tokenizer: TrainedTokenizer,
    cache_dir: Path,
    heldout: bool,
    report: Report,
) -> ExistingTokens:
    """Find token files and check every id in them.

    Args:
        path: of the source's settings.
        heldout: of `heldout_paths` instead of `paths`.

    Raises:
        UserError: for files that are cut short, of another kind, or of another tokenizer.
    """
    setting = f"{path}.{'heldout_paths' if heldout else 'paths'}"
    paths = list_files(config.heldout_paths if heldout else config.paths, path=setting)
    if config.name is DataName.megatron:
        paths = [p for p in paths if p.suffix != ".idx"]
        found = list(_megatron(paths, setting, tokenizer))
        dtypes = sorted({dtype for dtype, _, _ in found})
        if len(dtypes) > 1:
            message = f"the files have different types: {', '.join(dtypes)}"
            hint = "make each kind a source of a mixture"
            raise UserError([Problem(path=setting, message=message, hint=hint)])
        dtype = dtypes[0]
        sizes = [tokens for _, tokens, _ in found]
        documents = sum(count for _, _, count in found)
    else:
        assert config.dtype is not None
        dtype, documents = config.dtype.value, None
        _check_dtype(dtype, path, tokenizer)
        refuse(_check_headerless(paths, setting, dtype))
        sizes = [p.stat().st_size // np.dtype(dtype).itemsize for p in paths]
    files = hash_files(paths, cache_dir=cache_dir, report=report)
    with report.progress("checking tokens", sum(file.size for file in files)) as show:
        _scan(files, setting, dtype, tokenizer, show)
    extents = [
        Extent(file=str(file.path), first=0, tokens=tokens)
        for file, tokens in zip(files, sizes, strict=True)
    ]
    return ExistingTokens(files=files, extents=extents, dtype=dtype, documents=documents)


def _megatron(
    paths: Sequence[Path], setting: str, tokenizer: TrainedTokenizer
) -> Iterator[tuple[str, int, int]]:
    """Type, tokens and documents of each .bin, as its .idx says."""
    for file in paths:
        index_file = file.with_suffix(".idx")
        if not index_file.is_file():
            message = f"{file} has no {index_file.name} beside it"
            hint = "for files without an index, add data=tokens"
            raise UserError([Problem(path=setting, message=message, hint=hint)])
        try:
            index = read_index(index_file)
        except ValueError as error:
            raise UserError([Problem(path=setting, message=str(error))]) from error
        wanted = index.tokens * np.dtype(index.dtype).itemsize
        size = file.stat().st_size
        if size != wanted:
            message = f"{file} has {size:,} bytes where its index says {wanted:,}"
            raise UserError([Problem(path=setting, message=message, hint="it was cut short")])
        _check_ends(file, index.dtype, index.first_lengths.tolist(), setting, tokenizer)
        yield index.dtype, index.tokens, index.documents


def _check_ends(
    file: Path, dtype: str, lengths: Sequence[int], setting: str, tokenizer: TrainedTokenizer
) -> None:
    """Refuse documents that don't end with the tokenizer's end-of-text token."""
    tokens = np.fromfile(file, dtype, sum(lengths))
    ends = tokens[np.cumsum(lengths) - 1] if len(lengths) else tokens
    other = ends[ends != tokenizer.eos_id]
    if len(other):
        message = (
            f"{file}: {len(other)} of the first {len(ends)} documents end with token"
            f" {int(other[0])}, not with the tokenizer's end-of-text token {tokenizer.eos_id}"
        )
        hint = "give the tokenizer that made them, and write them with --append-eod"
        raise UserError([Problem(path=setting, message=message, hint=hint)])


def _check_dtype(dtype: str, path: str, tokenizer: TrainedTokenizer) -> None:
    largest = np.iinfo(dtype).max
    if tokenizer.size - 1 > largest:
        message = (
            f"{dtype} holds ids up to {largest:,}, and the tokenizer has {tokenizer.size:,} tokens:"
            " larger ids have wrapped around where such a file was written"
        )
        raise UserError(
            [Problem(path=f"{path}.dtype", message=message, hint="write the tokens as uint32")]
        )


def _check_headerless(paths: Sequence[Path], setting: str, dtype: str) -> Iterator[Problem]:
    width = np.dtype(dtype).itemsize
    for file in paths:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
        for magic, text in KNOWN_HEADERS.items():
            if start.startswith(magic):
                yield Problem(path=setting, message=f"{file} {text}")
        if size == 0 or size % width:
            message = f"{file} has {size:,} bytes, which is no number of {dtype} tokens"
            yield Problem(path=setting, message=message, hint="it was cut short, or has a header")


def _scan(
    files: Sequence[File],
    setting: str,
    dtype: str,
    tokenizer: TrainedTokenizer,
    show: Callable[[int, int], None],
) -> None:
    """Look at every id: one outside the vocabulary would end a run in the middle."""
    done = 0
    for file in files:
        at = 0
        with file.path.open("rb") as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while len(tokens := np.fromfile(opened, dtype, SCAN_TOKENS)):
                if int(tokens.max()) >= tokenizer.size or int(tokens.min()) < 0:
                    wrong = (tokens >= tokenizer.size) | (tokens < 0)
                    place = int(np.argmax(wrong))
                    message = (
                        f"{file.path}: token {at + place:,} is {int(tokens[place])}, and the"
                        f" tokenizer has {tokenizer.size:,} tokens"
                    )
                    hint = "give the tokenizer and the dtype that the file was written with"
                    raise UserError([Problem(path=setting, message=message, hint=hint)])
                at += len(tokens)
                done += tokens.nbytes
                show(done, 0)


def prepare_existing(
    config: SourceConfig,
    path: str,
    tokenizer: TrainedTokenizer,
    cache_dir: Path,
    report: Report,
    *,
    heldout_fraction: float,
) -> Path:
    """Check tokens that exist already and write down where they lie. Returns that folder."""

    def opened(heldout: bool) -> ExistingTokens:
        return open_existing(
            config,
            path=path,
            tokenizer=tokenizer,
            cache_dir=cache_dir,
            heldout=heldout,
            report=report,
        )

    whole = opened(heldout=False)
    apart = opened(heldout=True) if config.heldout_paths else None
    files = [*whole.files, *(apart.files if apart else [])]
    fraction = heldout_fraction
    recipe = {
        "format": FORMAT,
        "files": [(str(file.path), file.size, file.digest) for file in files],
        "tokenizer": (tokenizer.digest, tokenizer.eos_id),
        "options": ("apart" if apart else fraction, whole.dtype),
    }
    with claim(recipe, cache_dir, report) as (target, partial, digest):
        if (target / META).is_file():
            return target
        train, heldout = list(whole.extents), list(apart.extents) if apart else []
        if apart is None:  # the end of each file
            cut = [cut_extents([e], int(e.tokens * (1 - fraction))) for e in whole.extents]
            train = [extent for head, _ in cut for extent in head]
            heldout = [extent for _, tail in cut for extent in tail]
        elif apart.dtype != whole.dtype:
            message = f"have another type than {path}.paths: {apart.dtype}, not {whole.dtype}"
            raise UserError([Problem(path=f"{path}.heldout_paths", message=message)])
        splits = {
            name: Split(
                extents=extents,
                tokens=sum(extent.tokens for extent in extents),
                documents=count,
                bytes=None,
            )
            for name, extents, count in (
                (TRAIN, train, whole.documents),
                (HELDOUT, heldout, apart.documents if apart else None),
            )
        }
        bytes_a_token = _decode_some(heldout, whole.dtype, tokenizer)
        splits[HELDOUT] = replace(
            splits[HELDOUT], bytes=int(bytes_a_token * splits[HELDOUT].tokens)
        )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        meta = TokensMeta(
            format=FORMAT,
            data_hash=digest,
            tokenizer_hash=tokenizer.digest,
            vocab_size=tokenizer.size,
            eos_id=tokenizer.eos_id,
            dtype=whole.dtype,
            row_tokens=None,
            splits=splits,
            files=[(str(file.path), file.size, file.digest) for file in files],
        )
        shutil.copytree(tokenizer.folder, partial / "tokenizer")
        write_meta(partial, meta)
        os.rename(partial, target)
    return target


def _decode_some(extents: list[Extent], dtype: str, tokenizer: TrainedTokenizer) -> float:
    """Bytes of text a token, of the first held-out tokens."""
    head, _ = cut_extents(extents, DECODED_TOKENS)
    num_bytes = tokens = 0
    for extent in head:
        width = np.dtype(dtype).itemsize
        ids = np.fromfile(extent.file, dtype, extent.tokens, offset=extent.first * width)
        text = tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True)
        num_bytes += len(text.encode("utf-8"))
        tokens += len(ids)
    return num_bytes / max(1, tokens)
