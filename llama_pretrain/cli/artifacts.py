"""Checks of what a run directory refers to and contains: tokens, checkpoints, the export."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from llama_pretrain.checkpoint.manifest import find_fault, read_manifest
from llama_pretrain.cli.run_files import (
    AbsentError,
    BrokenError,
    Files,
    assert_same,
    read_json_of,
)
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.snapshot import config_hash
from llama_pretrain.data.meta import HELDOUT, META, TRAIN, read_meta
from llama_pretrain.data.packed import open_sequences
from llama_pretrain.files import hash_file
from llama_pretrain.runs.metrics import read_metrics, steps

PROOF = "export.json"
CHUNK = 1 << 22
"""Tokens that are read at a time."""


def check_tokens(files: Files, *, deep: bool) -> str:
    """The folders of tokens, where they are still here: their hash, and that no file is short."""
    there = [
        source for source in files.plan.corpus.sources if (Path(source.tokens_dir) / META).is_file()
    ]
    if not there:
        raise AbsentError("no longer in the cache; the next run prepares them again")
    for source in there:
        folder = Path(source.tokens_dir)
        try:
            meta = read_meta(folder, path="data")
        except UserError as error:
            raise BrokenError(error.problems[0].message) from error
        assert_same(f"{folder}/{META}", meta.data_hash, source.data_hash)
        length = files.run.data.sequence_length
        for split, wanted in ((TRAIN, source.train_sequences), (HELDOUT, source.heldout_sequences)):
            try:
                found = len(open_sequences(folder, meta, split, sequence_length=length))
            except (ValueError, OSError) as error:
                raise BrokenError(f"{split} of {source.name}: {error}") from error
            if found != wanted:
                raise BrokenError(f"{split} of {source.name} has {found:,} rows, not {wanted:,}")
            if deep:
                _read_tokens(folder, meta, split, name=source.name)
    missing = len(files.plan.corpus.sources) - len(there)
    text = "every token read" if deep else "by size; --deep reads them"
    return f"{len(there)} folder{'s' if len(there) > 1 else ''} {text}" + (
        f", {missing} not here" if missing else ""
    )


def _read_tokens(folder: Path, meta: Any, split: str, *, name: str) -> None:
    """Every id is one of the vocabulary, and documents end as often as there are documents."""
    ends = 0
    for extent in meta.splits[split].extents:
        path, width = folder / extent.file, np.dtype(meta.dtype).itemsize
        for first in range(extent.first, extent.first + extent.tokens, CHUNK):
            count = min(CHUNK, extent.first + extent.tokens - first)
            ids = np.fromfile(path, meta.dtype, count, offset=first * width)
            if len(ids) < count or ids.min() < 0 or ids.max() >= meta.vocab_size:
                raise BrokenError(f"{split} of {name}: {path} has ids outside of the vocabulary")
            ends += int((ids == meta.eos_id).sum())
    documents = meta.splits[split].documents
    ours = all(not Path(extent.file).is_absolute() for extent in meta.splits[split].extents)
    if ours and meta.sequence_tokens is None and documents is not None and ends != documents:
        raise BrokenError(f"{split} of {name} has {ends:,} ends of documents, not {documents:,}")


def check_checkpoint(files: Files, folder: Path) -> str:
    """Its files are as they were written, and it is of this run: same config, data and batch."""
    fault = find_fault(folder, config_hash=config_hash(files.run))
    if fault is not None:
        raise BrokenError(fault)
    manifest = read_manifest(folder)
    tokenizer = files.plan.corpus.tokenizer_hash
    if manifest.data.get("tokenizer") != tokenizer:
        raise BrokenError("is of another run: its tokenizer differs")
    hashes = {row.step: row.sample_hash for row in steps(files.rows)}
    if manifest.step not in hashes:
        raise BrokenError(f"is of step {manifest.step:,}, which metrics.jsonl does not have")
    if hashes[manifest.step] != manifest.sample_hash:
        raise BrokenError("is of another run: its last batch differs from that of metrics.jsonl")
    own = read_metrics(folder / "metrics.jsonl")
    if steps(own) != [row for row in steps(files.rows) if row.step <= manifest.step]:
        raise BrokenError("is of another run: its losses differ from those of metrics.jsonl")
    size = sum(int(size) for size, _ in manifest.files.values())
    return f"{len(manifest.files)} files, {size:,} bytes, all with their hashes"


def check_export(files: Files) -> str:
    """Its files have the hashes that its proof names, and its logits were near enough."""
    folder = files.dir.export
    if not folder.is_dir():
        raise AbsentError("the run has none")
    proof = read_json_of(folder / PROOF)
    named = proof.get("files")
    if not isinstance(named, dict) or not named:
        raise BrokenError(f"{PROOF} lists no files")
    for name, digest in named.items():
        path = folder / str(name)
        if Path(name).name != name or path.is_symlink():
            raise BrokenError(f"{name} is outside the directory")
        if not path.is_file():
            raise BrokenError(f"{name} is missing")
        assert_same(name, hash_file(path), str(digest))
    others = sorted(path.name for path in folder.iterdir() if path.name not in (PROOF, *named))
    if others:
        raise BrokenError(f"{PROOF} does not list {others[0]}")
    if not proof.get("logit_difference", math.inf) <= proof.get("logit_tolerance", 0):
        raise BrokenError(f"{PROOF}: the logits differ by more than its tolerance")
    step, checkpoint = proof.get("step"), str(proof.get("checkpoint"))
    if step not in {row.step for row in steps(files.rows)}:
        raise BrokenError(f"is of step {step}, which metrics.jsonl does not have")
    kept = (files.dir.checkpoints / checkpoint).is_dir()
    return f"{len(named)} files of {checkpoint}" + ("" if kept else ", which was deleted")
