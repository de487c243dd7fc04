"""Prepare the tokens of text in two passes that resume after an interruption."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from llama_pretrain.config.data import Data, Packing
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.data.cache import Cache, data_error
from llama_pretrain.data.encode import (
    BATCH_CHARACTERS,
    MAX_LISTED,
    EncodeJob,
    EncodeTask,
    TaskResult,
    digest_text,
    encode_task,
    encode_texts,
    heldout_threshold,
)
from llama_pretrain.data.gather import GatherJob, Shard, ShardResult, gather_shard, plan_shards
from llama_pretrain.data.hashing import File, check_unchanged
from llama_pretrain.data.meta import (
    FORMAT,
    HELDOUT,
    META,
    TRAIN,
    Extent,
    Split,
    TokensMeta,
    cut_extents,
    make_split,
    write_meta,
)
from llama_pretrain.data.packed import token_dtype
from llama_pretrain.data.pool import run_tasks
from llama_pretrain.data.read import COMPRESSED
from llama_pretrain.data.text import Span, TextSource
from llama_pretrain.data.tokenizer import TrainedTokenizer
from llama_pretrain.files import read_json, write_text

MIN_DOCUMENTS_TO_JUDGE = 1000
"""The share of unreadable documents is checked from here on."""
COMPRESSION = 4
"""Assumed ratio of the size of text to that of its compressed file."""
SAMPLE_CHARACTERS = 100_000
"""Text that is encoded to estimate the disk space."""

Sources = Sequence[tuple[TextSource, float]]
"""The readers of one source, each with its held-out share."""
Result = TypeVar("Result")


def sample_texts(sources: Sources, *, num_bytes: int, keep_heldout: bool = False) -> Iterator[str]:
    """About `num_bytes` of training documents from everywhere in the sources."""
    total = sum(source.num_bytes for source, share in sources if share < 1)
    found = False
    for source, share in sources:
        if share == 1:
            continue
        threshold = 0 if keep_heldout else heldout_threshold(share)
        for spans in source.tasks():
            left = num_bytes * sum(span.size for span in spans) / max(1, total)
            for piece in _training_pieces(source, spans, threshold):
                found = True
                yield piece
                left -= len(piece.encode("utf-8"))
                if left <= 0:
                    break
    if not found and not keep_heldout:  # all of a few documents may be held out
        yield from sample_texts(sources, num_bytes=num_bytes, keep_heldout=True)


def _training_pieces(source: TextSource, spans: list[Span], threshold: int) -> Iterator[str]:
    """Documents that are not held out, cut because training a tokenizer takes memory, too."""
    for text in source.texts(spans):
        if digest_text(text.encode("utf-8"))[1] >= threshold:
            for start in range(0, len(text), BATCH_CHARACTERS):
                yield text[start : start + BATCH_CHARACTERS]


def prepare_text(data: Data, sources: Sources, tokenizer: TrainedTokenizer, cache: Cache) -> Path:
    """Encode the documents of a source, unless the cache has them. Returns the directory.

    Raises:
        UserError: for unreadable documents, a corpus without text, or a full disk.
    """
    sequence_tokens = data.sequence_length + 1 if data.packing is Packing.best_fit else None
    recipe = {
        "format": FORMAT,
        "sources": [(source.fingerprint, share) for source, share in sources],
        "tokenizer": (tokenizer.digest, tokenizer.eos_id),  # tokenizer.json does not name eos_id
        "options": (data.shuffle_seed, data.deduplicate, data.on_error.value, sequence_tokens),
    }
    with cache.claim(recipe) as (target, partial, digest):
        if (target / META).is_file():
            return target
        if not (partial / META).is_file():
            files = [file for source, _ in sources for file in source.files]
            _discard_outdated(partial, files)
            encoding = _Encoding(
                data=data,
                sources=sources,
                tokenizer=tokenizer,
                cache=cache,
                partial=partial,
                sequence_tokens=sequence_tokens,
            )
            splits, notes, skipped = encoding.run()
            check_unchanged(files, path=f"{encoding.path}.paths")
            shutil.copytree(tokenizer.folder, partial / "tokenizer", dirs_exist_ok=True)
            meta = TokensMeta(
                format=FORMAT,
                data_hash=digest,
                tokenizer_hash=tokenizer.digest,
                vocab_size=tokenizer.size,
                eos_id=tokenizer.eos_id,
                dtype=token_dtype(tokenizer.size),
                sequence_tokens=sequence_tokens,
                splits=splits,
                files=[(str(file.path), file.size, file.digest) for file in files],
                notes=notes,
                skipped=skipped,
            )
            write_meta(partial, meta)
            cache.report.say(_summarize(meta))
        shutil.rmtree(partial / "parts", ignore_errors=True)
        for marker in (*partial.glob("*-*.json"), *partial.glob(".*.tmp"), partial / "files"):
            marker.unlink(missing_ok=True)
        os.rename(partial, target)
    return target


def _discard_outdated(partial: Path, files: list[File]) -> None:
    """Discard the work of an interrupted preparation if a file was written to since.

    The directory's name has the hash of the present contents, but a file that was changed and
    restored may have had others in between.
    """
    stamps = json.dumps([(str(file.path), file.size, file.time) for file in files])
    marker = partial / "files"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != stamps:
        shutil.rmtree(partial, ignore_errors=True)
        write_text(marker, stamps)


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    """Both passes over one source."""

    data: Data
    sources: Sources
    tokenizer: TrainedTokenizer
    cache: Cache
    partial: Path
    sequence_tokens: int | None

    @property
    def path(self) -> str:
        """Of the source's options."""
        return self.sources[0][0].path

    @property
    def parts_dir(self) -> Path:
        return self.partial / "parts"

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return np.dtype(token_dtype(self.tokenizer.size)).itemsize

    @property
    def processes(self) -> int:
        return self.data.prepare_processes or len(os.sched_getaffinity(0))

    def run(self) -> tuple[dict[str, Split], dict[str, int], list[str]]:
        """The splits, counts, and documents that were skipped."""
        self.parts_dir.mkdir(parents=True, exist_ok=True)
        results = self._encode_parts()
        self._check_faults(results)
        if not any(result.documents for result in results):
            source = self.sources[0][0]
            files = ", ".join(str(file.path) for file in source.files[:3])
            message = f"the corpus has no text (read {files or source.config.dataset})"
            raise data_error(self.path, message)
        shards = self._write_shards(results)
        splits = {}
        for split in (TRAIN, HELDOUT):
            found = {shard.name: done for shard, done in shards if shard.split == split}
            splits[split] = make_split(
                [Extent(file=f"{n}.bin", first=0, tokens=s.tokens) for n, s in found.items()],
                documents=sum(shard.documents for shard in found.values()),
                num_bytes=sum(shard.bytes for shard in found.values()),
            )
        notes = {
            "blank": sum(result.blank for result in results),
            "duplicate": sum(shard.duplicates for _, shard in shards),
            "cut_to_32_MB": sum(result.cut for result in results),
            "unreadable": sum(result.faults for result in results),
            "truncated_documents": sum(shard.cut for _, shard in shards),
            "padding_tokens": sum(shard.padding for _, shard in shards),
        }
        say = self.cache.report.say
        first_blank = next((r.first_blank for r in results if r.first_blank), "")
        if first_blank:
            say(f"ignored {notes['blank']:,} blank documents (the first: {first_blank})")
        skipped = _list_faults(results)
        if skipped:
            say(f"skipped {notes['unreadable']:,} unreadable documents:")
            for text in skipped:
                say(f"  {text}")
        return _split_tail(splits, self.data.heldout_fraction, self.sequence_tokens), notes, skipped

    def _encode_parts(self) -> list[TaskResult]:
        """The first pass, except for the tasks that an interrupted one has completed."""
        tasks: list[EncodeTask] = []
        for place, (source, _) in enumerate(self.sources):
            for spans in source.tasks():
                tasks.append(EncodeTask(number=len(tasks), source=place, spans=spans))
        results = [_read_result(self.parts_dir, task.name, TaskResult) for task in tasks]
        todo = [task for task, result in zip(tasks, results, strict=True) if result is None]
        if len(todo) < len(tasks):
            done = len(tasks) - len(todo)
            self.cache.report.say(f"resuming: {done} of {len(tasks)} tasks are already encoded")
        self._check_space(todo)
        job = EncodeJob(
            sources=list(self.sources),
            tokenizer_dir=self.tokenizer.folder,
            folder=self.parts_dir,
            shuffle_seed=self.data.shuffle_seed,
            deduplicate=self.data.deduplicate,
            on_error=self.data.on_error,
        )
        total = sum(span.size for task in todo for span in task.spans)
        with self.cache.report.progress("encoding", total) as show:
            running = run_tasks(encode_task, job, todo, processes=self.processes, show=show)
            with closing(running):  # an error stops the processes
                for place, result in running:
                    results[todo[place].number] = result
                    known = [result for result in results if result is not None]
                    if sum(result.documents for result in known) >= MIN_DOCUMENTS_TO_JUDGE:
                        self._check_faults(known)
        return [result for result in results if result is not None]

    def _write_shards(self, results: list[TaskResult]) -> list[tuple[Shard, ShardResult]]:
        """The second pass, except for the shards that an interrupted one has completed."""
        parts = sorted(part for result in results for part in result.parts)
        by_key = self.data.shuffle_seed is not None
        shards = plan_shards(self.parts_dir, parts, by_key=by_key)
        job = GatherJob(
            parts_dir=self.parts_dir,
            parts=parts,
            folder=self.partial,
            dtype=token_dtype(self.tokenizer.size),
            eos_id=self.tokenizer.eos_id,
            sequence_tokens=self.sequence_tokens,
            deduplicate=self.data.deduplicate,
        )
        done = [_read_result(self.partial, shard.name, ShardResult) for shard in shards]
        todo = [number for number, result in enumerate(done) if result is None]
        total = sum(result.tokens for result in results) * self.width
        with self.cache.report.progress("writing shards", total) as show:
            running = run_tasks(
                gather_shard,
                job,
                [shards[number] for number in todo],
                # Starting a process takes a second.
                processes=max(1, min(self.processes, len(todo) // 4)),
                show=lambda read, _: show(read, 0),
            )
            with closing(running):
                for place, result in running:
                    done[todo[place]] = result
        return [(s, result) for s, result in zip(shards, done, strict=True) if result is not None]

    def _check_faults(self, results: list[TaskResult]) -> None:
        """Refuse a corpus with too many unreadable documents."""
        limit = self.data.max_error_fraction
        faults = sum(result.faults for result in results)
        total = faults + sum(result.documents for result in results)
        if faults <= limit * total:
            return
        message = f"{faults / total:.2%} of documents are unreadable, {faults:,} of {total:,}"
        problem = Problem(path="data.max_error_fraction", message=f"{message} (got {limit:g})")
        listed = [Problem(path=self.path, message=text) for text in _list_faults(results)]
        raise UserError([problem, *listed])

    def _check_space(self, tasks: list[EncodeTask]) -> None:
        """Refuse to start without disk space for parts and shards, estimated from a sample."""
        size, sample = 0, ""
        for task in tasks:
            source, _ = self.sources[task.source]
            for text in source.texts(task.spans) if not sample else ():
                sample += text[:SAMPLE_CHARACTERS]
                if len(sample) >= SAMPLE_CHARACTERS:
                    break
            for span in task.spans:
                file = source.files[span.file].path if source.files else Path()
                size += span.size * (COMPRESSION if file.suffix in COMPRESSED else 1)
        if not sample:
            return
        ids = next(encode_texts(self.tokenizer.backend, [sample]))
        needed = int(2.1 * size * self.width * len(ids) / len(sample.encode("utf-8")))
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            message = (
                f"preparing {size / 1e9:.2f} GB of text requires about {needed / 1e9:.2f} GB, but"
                f" {free / 1e9:.2f} GB are free (got {self.cache.folder})"
            )
            hint = "Free disk space, or choose another directory"
            raise data_error("data.cache_dir", message, hint)


def _read_result(folder: Path, name: str, kind: type[Result]) -> Result | None:
    """The result of a task or shard; `None` if it is not complete."""
    values = read_json(folder / f"{name}.json")
    return None if values is None else kind(**values)


def _list_faults(results: list[TaskResult]) -> list[str]:
    return [text for result in results for text in result.listed][:MAX_LISTED]


def _split_tail(
    splits: dict[str, Split], heldout_fraction: float, sequence_tokens: int | None
) -> dict[str, Split]:
    """Hold out the end of the tokens if all documents are on one side, e.g. a single book."""
    if splits[TRAIN].tokens and splits[HELDOUT].tokens:
        return splits
    whole = splits[TRAIN] if splits[TRAIN].tokens else splits[HELDOUT]
    unit = sequence_tokens or 1
    head = int(whole.tokens * (1 - heldout_fraction)) // unit * unit
    sides = {}
    for name, extents in zip((TRAIN, HELDOUT), cut_extents(whole.extents, head), strict=True):
        tokens = sum(extent.tokens for extent in extents)
        documents = whole.documents if name == TRAIN else 0
        sides[name] = make_split(extents, documents, (whole.bytes or 0) * tokens // whole.tokens)
    return sides


def _summarize(meta: TokensMeta) -> str:
    documents = sum(split.documents or 0 for split in meta.splits.values())
    tokens = sum(split.tokens for split in meta.splits.values())
    num_bytes = sum(split.bytes or 0 for split in meta.splits.values())
    text = f"{documents:,} documents, {tokens:,} tokens, {num_bytes / tokens:.2f} bytes per token"
    if meta.notes["duplicate"]:
        text += f", {meta.notes['duplicate']:,} duplicates dropped"
    if meta.sequence_tokens:
        padding = meta.notes["padding_tokens"] / tokens
        text += (
            f", {meta.notes['truncated_documents']:,} longer than a sequence, {padding:.2%} padding"
        )
    return text
