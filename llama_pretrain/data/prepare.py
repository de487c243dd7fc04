"""Make the tokens of text, once: both passes, restarts, and what is told of them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from llama_pretrain.config.data import Data, Packing
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.data.cache import claim
from llama_pretrain.data.encode import (
    BATCH_CHARACTERS,
    EncodeJob,
    EncodeTask,
    TaskResult,
    encode_task,
    encode_texts,
    task_marker,
)
from llama_pretrain.data.gather import (
    GatherJob,
    ShardResult,
    gather_shard,
    plan_shards,
    shard_marker,
)
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
from llama_pretrain.data.packed import token_dtype
from llama_pretrain.data.pool import Report, run_tasks
from llama_pretrain.data.read import COMPRESSED, Document
from llama_pretrain.data.sources import File, TextSource, check_unchanged
from llama_pretrain.data.tokenizer import (
    TrainedTokenizer,
)
from llama_pretrain.files import write_text

MIN_DOCUMENTS_TO_JUDGE = 1000
"""Before so many documents a share of unreadable ones says little."""
COMPRESSION = 4
"""Text is taken to be so many times the size of its compressed file."""


def sample_texts(
    sources: list[tuple[TextSource, float]], *, num_bytes: int, keep_heldout: bool = False
) -> Iterator[str]:
    """Training documents from all over the sources, about so many bytes of them."""
    whole = sum(source.num_bytes for source, share in sources if share < 1)
    found = False
    for source, share in sources:
        if share == 1:
            continue
        threshold = 0 if keep_heldout else int(share * (1 << 64))
        for spans in source.tasks():
            left = num_bytes * sum(span.size for span in spans) / max(1, whole)
            for piece in _training_pieces(source, spans, threshold):
                found = True
                yield piece
                left -= len(piece.encode("utf-8"))
                if left <= 0:
                    break
    if not found and not keep_heldout:  # a corpus of few documents, all of them held out
        yield from sample_texts(sources, num_bytes=num_bytes, keep_heldout=True)


def _training_pieces(source: TextSource, spans: list[Any], threshold: int) -> Iterator[str]:
    """Texts that are not held out; of long ones a piece at a time: learning takes memory, too."""
    for text in _task_texts(source, spans):
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if int.from_bytes(digest[:8], "big") >= threshold:
            for start in range(0, len(text), BATCH_CHARACTERS):
                yield text[start : start + BATCH_CHARACTERS]


def _task_texts(source: TextSource, spans: list[Any]) -> Iterator[str]:
    for span in spans:
        for record in source.read(span):
            if isinstance(record, Document) and record.text and not record.text.isspace():
                yield record.text


def prepare_text(
    data: Data,
    sources: list[tuple[TextSource, float]],
    tokenizer: TrainedTokenizer,
    cache_dir: Path,
    report: Report,
) -> Path:
    """Encode a source's documents, unless the cache has them. Returns the folder."""
    row_tokens = data.sequence_length + 1 if data.packing is Packing.best_fit else None
    recipe = {
        "format": FORMAT,
        "sources": [(source.fingerprint, share) for source, share in sources],
        "tokenizer": (tokenizer.digest, tokenizer.eos_id),  # tokenizer.json doesn't say the latter
        "options": (data.shuffle_seed, data.deduplicate, data.on_error.value, row_tokens),
    }
    with claim(recipe, cache_dir, report) as (target, partial, digest):
        if (target / META).is_file():
            return target
        files = [file for source, _ in sources for file in source.files]
        if not (partial / META).is_file():
            _forget_other_files(partial, files)
            splits, notes, skipped = _encode_all(
                data, sources, tokenizer, partial, row_tokens, report
            )
            check_unchanged(files, path=f"{sources[0][0].path}.paths")
            shutil.copytree(tokenizer.folder, partial / "tokenizer", dirs_exist_ok=True)
            meta = TokensMeta(
                format=FORMAT,
                data_hash=digest,
                tokenizer_hash=tokenizer.digest,
                vocab_size=tokenizer.size,
                eos_id=tokenizer.eos_id,
                dtype=token_dtype(tokenizer.size),
                row_tokens=row_tokens,
                splits=splits,
                files=[(str(file.path), file.size, file.digest) for file in files],
                notes=notes,
                skipped=skipped,
            )
            write_meta(partial, meta)
            report.say(_summary(meta))
        shutil.rmtree(partial / "parts", ignore_errors=True)
        for marker in (*partial.glob("*-*.json"), partial / "files"):
            marker.unlink(missing_ok=True)
        os.rename(partial, target)
    return target


def _forget_other_files(partial: Path, files: list[File]) -> None:
    """Drop what an interrupted preparing has made of files that have been written to since.

    The hash that names the folder is of what they hold now; in between they may have held
    something else.
    """
    stamps = json.dumps([(str(file.path), file.size, file.time) for file in files])
    marker = partial / "files"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != stamps:
        shutil.rmtree(partial, ignore_errors=True)
        write_text(marker, stamps)


def _encode_all(
    data: Data,
    sources: list[tuple[TextSource, float]],
    tokenizer: TrainedTokenizer,
    partial: Path,
    row_tokens: int | None,
    report: Report,
) -> tuple[dict[str, Split], dict[str, int], list[str]]:
    """Both passes. Returns the splits, counts, and documents that were skipped."""
    parts_dir = partial / "parts"
    parts_dir.mkdir(parents=True, exist_ok=True)
    processes = data.prepare_processes or len(os.sched_getaffinity(0))
    job = EncodeJob(
        sources=sources,
        tokenizer_dir=tokenizer.folder,
        folder=parts_dir,
        shuffle_seed=data.shuffle_seed,
        deduplicate=data.deduplicate,
        on_error=data.on_error,
    )
    results = _encode_parts(job, data, partial, tokenizer, processes, report)
    path = sources[0][0].path
    _check_faults(results, data, path=path)
    if not any(result.documents for result in results):
        source = sources[0][0]
        files = ", ".join(str(file.path) for file in source.files[:3])
        message = f"the corpus has no text (read {files or source.config.dataset})"
        raise UserError([Problem(path=path, message=message)])
    parts = sorted(part for result in results for part in result.parts)
    shards = plan_shards(parts_dir, parts, by_key=data.shuffle_seed is not None)
    gather = GatherJob(
        parts_dir=parts_dir,
        parts=parts,
        folder=partial,
        dtype=token_dtype(tokenizer.size),
        eos_id=tokenizer.eos_id,
        row_tokens=row_tokens,
        deduplicate=data.deduplicate,
    )
    done = {
        shard.name: ShardResult(**json.loads(shard_marker(partial, shard).read_text()))
        for shard in shards
        if shard_marker(partial, shard).is_file()
    }
    todo = [shard for shard in shards if shard.name not in done]
    total = sum(result.tokens for result in results) * np.dtype(gather.dtype).itemsize
    with report.progress("writing shards", total) as show:
        finished = run_tasks(
            gather_shard,
            gather,
            todo,
            processes=max(1, min(processes, len(todo) // 4)),  # to start one takes a second
            show=lambda read, _: show(read, 0),
        )
        with closing(finished):
            for number, shard_result in finished:
                done[todo[number].name] = shard_result
    splits = {}
    for split in (TRAIN, HELDOUT):
        mine = {shard.name: done[shard.name] for shard in shards if shard.split == split}
        splits[split] = Split(
            extents=[
                Extent(file=f"{name}.bin", first=0, tokens=shard.tokens)
                for name, shard in mine.items()
            ],
            tokens=sum(shard.tokens for shard in mine.values()),
            documents=sum(shard.documents for shard in mine.values()),
            bytes=sum(shard.bytes for shard in mine.values()),
        )
    notes = {
        "blank": sum(result.blank for result in results),
        "duplicate": sum(shard.duplicates for shard in done.values()),
        "cut_to_32_MB": sum(result.cut for result in results),
        "unreadable": sum(result.faults for result in results),
        "cut_to_a_row": sum(shard.cut for shard in done.values()),
        "padding_tokens": sum(shard.padding for shard in done.values()),
    }
    first_blank = next((r.first_blank for r in results if r.first_blank), "")
    if first_blank:
        report.say(f"{notes['blank']:,} blank documents are left out (one: {first_blank})")
    skipped = [text for result in results for text in result.listed][:20]
    if skipped:
        report.say(f"{notes['unreadable']:,} documents can't be read and are left out:")
        for text in skipped:
            report.say(f"  {text}")
    return _split_tail(splits, data.heldout_fraction, row_tokens), notes, skipped


def _encode_parts(
    job: EncodeJob,
    data: Data,
    partial: Path,
    tokenizer: TrainedTokenizer,
    processes: int,
    report: Report,
) -> list[TaskResult]:
    """The first pass, but for the tasks that an earlier, interrupted one has done."""
    tasks: list[EncodeTask] = []
    for place, (source, _) in enumerate(job.sources):
        for spans in source.tasks():
            tasks.append(EncodeTask(number=len(tasks), source=place, spans=spans))
    results: dict[int, TaskResult] = {}
    for task in tasks:
        marker = task_marker(job.folder, task)
        if marker.is_file():
            results[task.number] = TaskResult(**json.loads(marker.read_text(encoding="utf-8")))
    todo = [task for task in tasks if task.number not in results]
    if results:
        report.say(f"going on: {len(results)} of {len(tasks)} parts are encoded already")
    total = sum(task.size for task in todo)
    _check_space(job, todo, tokenizer, partial)
    with report.progress("encoding", total) as show:
        finished = run_tasks(encode_task, job, todo, processes=processes, show=show)
        with closing(finished):  # a refusal here ends the processes
            for place, result in finished:
                results[todo[place].number] = result
                if sum(done.documents for done in results.values()) >= MIN_DOCUMENTS_TO_JUDGE:
                    _check_faults(list(results.values()), data, path=job.sources[0][0].path)
    return [results[number] for number in sorted(results)]


def _check_faults(results: list[TaskResult], data: Data, *, path: str) -> None:
    """Stop where too many documents can't be read."""
    faults = sum(result.faults for result in results)
    whole = faults + sum(result.documents for result in results)
    if faults <= data.max_error_fraction * whole:
        return
    listed = [text for result in results for text in result.listed][:20]
    message = (
        f"{faults:,} of {whole:,} documents can't be read, {faults / whole:.2%}"
        f" (got {data.max_error_fraction:g})"
    )
    problems = [Problem(path="data.max_error_fraction", message=message)]
    raise UserError(problems + [Problem(path=path, message=text) for text in listed])


def _check_space(
    job: EncodeJob, tasks: list[EncodeTask], tokenizer: TrainedTokenizer, partial: Path
) -> None:
    """Refuse to begin what the disk has no room for: parts and shards, each once.

    Tokens a byte are taken from the first text.
    """
    size, sample = 0, ""
    for task in tasks:
        source, _ = job.sources[task.source]
        if not sample:
            for text in _task_texts(source, task.spans):
                sample += text[:100_000]
                if len(sample) >= 100_000:
                    break
        for span in task.spans:
            packed = source.files and source.files[span.file].path.suffix in COMPRESSED
            size += span.size * (COMPRESSION if packed else 1)
    if not sample:
        return
    ids = next(encode_texts(tokenizer.backend, [sample]))
    width = np.dtype(token_dtype(tokenizer.size)).itemsize
    need = int(2.1 * size * width * len(ids) / len(sample.encode("utf-8")))
    free = shutil.disk_usage(partial).free
    if need > free:
        message = (
            f"preparing {size / 1e9:.2f} GB of text needs about {need / 1e9:.2f} GB there, and"
            f" {free / 1e9:.2f} GB are free (got {partial.parents[1]})"
        )
        hint = "make room, or name another folder"
        raise UserError([Problem(path="data.cache_dir", message=message, hint=hint)])


def _split_tail(
    splits: dict[str, Split], heldout_fraction: float, row_tokens: int | None
) -> dict[str, Split]:
    """Where all documents fell on one side (a corpus of one book, say): hold out the end."""
    if splits[TRAIN].tokens and splits[HELDOUT].tokens:
        return splits
    whole = splits[TRAIN] if splits[TRAIN].tokens else splits[HELDOUT]
    unit = row_tokens or 1
    head = int(whole.tokens * (1 - heldout_fraction)) // unit * unit
    sides = {}
    for name, extents in zip((TRAIN, HELDOUT), cut_extents(whole.extents, head), strict=True):
        tokens = sum(extent.tokens for extent in extents)
        num_bytes = None if whole.bytes is None else whole.bytes * tokens // whole.tokens
        documents = whole.documents if name == TRAIN else 0
        sides[name] = Split(extents=extents, tokens=tokens, documents=documents, bytes=num_bytes)
    return sides


def _summary(meta: TokensMeta) -> str:
    documents = sum(split.documents or 0 for split in meta.splits.values())
    tokens = sum(split.tokens for split in meta.splits.values())
    num_bytes = sum(split.bytes or 0 for split in meta.splits.values())
    text = f"{documents:,} documents, {tokens:,} tokens, {num_bytes / tokens:.2f} bytes a token"
    if meta.notes.get("duplicate"):
        text += f", {meta.notes['duplicate']:,} duplicates left out"
    if meta.row_tokens:
        share = meta.notes["padding_tokens"] / tokens
        text += f", {meta.notes['cut_to_a_row']:,} cut to a row, {share:.2%} padding"
    return text
