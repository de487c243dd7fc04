"""Make the tokens that a run reads, once: a cache addressed by what goes into it."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_pretrain.config.data import Data, DataName, Packing, Source, TokenizerName
from llama_pretrain.config.data_rules import IN_PLACE, named_sources
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.schema import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.data.encode import (
    EncodeJob,
    EncodeTask,
    TaskResult,
    encode_task,
    encode_texts,
    task_marker,
)
from llama_pretrain.data.existing import ExistingTokens, open_existing
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
    read_meta,
    write_meta,
)
from llama_pretrain.data.packed import open_rows, token_dtype
from llama_pretrain.data.pool import Report, run_tasks
from llama_pretrain.data.read import COMPRESSED, Document
from llama_pretrain.data.sources import TextSource, check_unchanged, open_source
from llama_pretrain.data.tokenizer import (
    TrainedTokenizer,
    find_tokenizer,
    import_tokenizer,
    open_tokenizer,
)
from llama_pretrain.plan.plan import Corpus, SourceTokens

MIN_DOCUMENTS_TO_JUDGE = 1000
"""Before so many documents a share of unreadable ones says little."""
DECODED_TOKENS = 1_000_000
"""Held-out tokens that are decoded to know their bytes, where there is no text."""
COMPRESSION = 4
"""Text is taken to be so many times the size of its compressed file."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A source's folder of tokens."""

    name: str
    path: str
    """Of its settings: `data` or `data.sources.NAME`."""
    folder: Path
    meta: TokensMeta


def prepare_corpus(run: Run, *, report: Report) -> Corpus:
    """The corpus of a run, prepared now or found in the cache.

    Raises:
        UserError: if the corpus can't be read or is too short, or the tokenizer doesn't fit.
    """
    return describe_corpus(run, *prepare_sources(run, report=report))


def prepare_sources(run: Run, *, report: Report) -> tuple[TrainedTokenizer, list[Prepared]]:
    """The tokenizer of a run and the tokens of each of its sources, in their order."""
    cache_dir = Path(run.data.cache_dir).expanduser().resolve()
    configs = named_sources(run.data)
    mixed = run.data.name is DataName.mixture
    paths = {name: f"data.sources.{name}" if mixed else "data" for name in configs}
    texts = {
        name: _open_texts(config, paths[name], run.data, cache_dir, report)
        for name, config in configs.items()
        if config.name not in IN_PLACE
    }
    ready = {
        name: _open_prepared(config, paths[name], run.data)
        for name, config in configs.items()
        if config.name is DataName.prepared
    }
    tokenizer = _choose_tokenizer(run, texts, ready, cache_dir, report)
    prepared = []
    for name, config in configs.items():
        if name in ready:
            folder, meta = ready[name]
        elif name in texts:
            folder = _prepare_text(run.data, texts[name], tokenizer, cache_dir, report)
            meta = read_meta(folder, path=paths[name])
        else:
            folder = _prepare_existing(run, config, paths[name], tokenizer, cache_dir, report)
            meta = read_meta(folder, path=paths[name])
        prepared.append(Prepared(name=name, path=paths[name], folder=folder, meta=meta))
    return tokenizer, prepared


def _open_texts(
    config: Source, path: str, data: Data, cache_dir: Path, report: Report
) -> list[tuple[TextSource, float]]:
    """The files of a source, and those to hold out, each with the share that is held out."""

    def opened(heldout: bool) -> TextSource:
        return open_source(config, path=path, cache_dir=cache_dir, heldout=heldout, report=report)

    if not config.heldout_paths:
        return [(opened(heldout=False), data.heldout_fraction)]
    return [(opened(heldout=False), 0.0), (opened(heldout=True), 1.0)]


def _open_prepared(config: Source, path: str, data: Data) -> tuple[Path, TokensMeta]:
    if len(config.paths) != 1:
        message = f"should be one folder (got {config.paths})"
        hint = "make each a source of a mixture"
        raise UserError([Problem(path=f"{path}.paths", message=message, hint=hint)])
    folder = Path(config.paths[0]).expanduser().resolve()
    meta = read_meta(folder, path=f"{path}.paths")
    packed = meta.row_tokens is not None
    if packed != (data.packing is Packing.best_fit):
        message = f"{folder} is packed {'best_fit' if packed else 'concatenate'}"
        message += f" (got {data.packing.value})"
        raise UserError([Problem(path="data.packing", message=message, hint="set it to that")])
    if meta.row_tokens is not None and meta.row_tokens != data.sequence_length + 1:
        message = f"{folder} is packed for rows of {meta.row_tokens - 1} tokens"
        hint = f"set it to {meta.row_tokens - 1}, or prepare the text again"
        message += f" (got {data.sequence_length})"
        raise UserError([Problem(path="data.sequence_length", message=message, hint=hint)])
    return folder, meta


def _choose_tokenizer(
    run: Run,
    texts: Mapping[str, list[tuple[TextSource, float]]],
    ready: Mapping[str, tuple[Path, TokensMeta]],
    cache_dir: Path,
    report: Report,
) -> TrainedTokenizer:
    """The one tokenizer of a run.

    Raises:
        UserError: naming both hashes where tokens were made with another.
    """
    if run.tokenizer.name is TokenizerName.pretrained:
        tokenizer = open_tokenizer(import_tokenizer(run.tokenizer, cache_dir=cache_dir))
    elif ready:
        tokenizer = open_tokenizer(next(iter(ready.values()))[0] / "tokenizer")
    else:
        sources = [pair for pairs in texts.values() for pair in pairs]
        tokenizer = find_tokenizer(
            run.tokenizer,
            recipe=[source.fingerprint for source, _ in sources] + [run.data.on_error.value],
            texts=lambda: sample_texts(sources, num_bytes=run.tokenizer.sample_bytes),
            cache_dir=cache_dir,
            report=report.say,
        )
    for folder, meta in ready.values():
        if meta.tokenizer_hash != tokenizer.digest:
            message = (
                f"{folder} was made with tokenizer {meta.tokenizer_hash[:16]},"
                f" and this is {tokenizer.digest[:16]} ({tokenizer.folder})"
            )
            hint = f"set tokenizer=pretrained tokenizer.path={folder / 'tokenizer'}"
            raise UserError([Problem(path="tokenizer", message=message, hint=hint)])
    if tokenizer.size > run.model.vocab_size and not run.model.resize_embeddings:
        message = f"has {tokenizer.size} tokens, more than model.vocab_size={run.model.vocab_size}"
        hint = f"set model.vocab_size={tokenizer.size}, or model.resize_embeddings=true"
        raise UserError([Problem(path="tokenizer", message=message, hint=hint)])
    return tokenizer


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
            for text in _task_texts(source, spans):
                raw = text.encode("utf-8")
                if int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") < threshold:
                    continue
                found = True
                yield text
                left -= len(raw)
                if left <= 0:
                    break
    if not found and not keep_heldout:  # a corpus of few documents, all of them held out
        yield from sample_texts(sources, num_bytes=num_bytes, keep_heldout=True)


def _task_texts(source: TextSource, spans: list[Any]) -> Iterator[str]:
    for span in spans:
        for record in source.read(span):
            if isinstance(record, Document) and record.text and not record.text.isspace():
                yield record.text


def _prepare_text(
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
    with _claim(recipe, cache_dir, report) as (target, partial, digest):
        if (target / META).is_file():
            return target
        if not (partial / META).is_file():
            splits, notes, skipped = _encode_all(
                data, sources, tokenizer, partial, row_tokens, report
            )
            for source, _ in sources:
                check_unchanged(source.files, path=f"{source.path}.paths")
            files = [file for source, _ in sources for file in source.files]
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
        for marker in partial.glob("*-*.json"):
            marker.unlink()
        os.rename(partial, target)
    return target


@contextmanager
def _claim(recipe: Any, cache_dir: Path, report: Report) -> Iterator[tuple[Path, Path, str]]:
    """The folder that a recipe names, one to make it in, and the recipe's hash.

    Whoever else wants the same data waits here until it is there.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    tokens = cache_dir / "tokens"
    target, partial = tokens / digest[:16], tokens / f".partial-{digest[:16]}"
    tokens.mkdir(parents=True, exist_ok=True)
    with (tokens / f".lock-{digest[:16]}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say("another process is preparing the same data: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield target, partial, digest


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
            gather_shard, gather, todo, processes=processes, show=lambda read, _: show(read, 0)
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


def _prepare_existing(
    run: Run,
    config: Source,
    path: str,
    tokenizer: TrainedTokenizer,
    cache_dir: Path,
    report: Report,
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
    fraction = run.data.heldout_fraction
    recipe = {
        "format": FORMAT,
        "files": [(str(file.path), file.size, file.digest) for file in files],
        "tokenizer": (tokenizer.digest, tokenizer.eos_id),
        "options": ("apart" if apart else fraction, whole.dtype),
    }
    with _claim(recipe, cache_dir, report) as (target, partial, digest):
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


def describe_corpus(run: Run, tokenizer: TrainedTokenizer, prepared: list[Prepared]) -> Corpus:
    """What the plan needs to know of prepared sources.

    Raises:
        UserError: if one has too few tokens for a row, or its files were cut short since.
    """
    length = run.data.sequence_length
    sources = []
    for source in prepared:
        splits = source.meta.splits
        rows = {}
        for name, split in splits.items():
            try:
                rows[name] = len(
                    open_rows(source.folder, source.meta, name, sequence_length=length)
                )
            except (ValueError, OSError) as error:
                hint = f"delete {source.folder}: it is made again"
                problem = Problem(path=source.path, message=str(error), hint=hint)
                raise UserError([problem]) from error
            if rows[name] == 0:
                raise UserError([_too_short(source, name, split, run.data)])
        heldout = splits[HELDOUT]
        sources.append(
            SourceTokens(
                name=source.name,
                tokens_dir=str(source.folder),
                data_hash=source.meta.data_hash,
                train_rows=rows[TRAIN],
                train_tokens=splits[TRAIN].tokens,
                heldout_rows=rows[HELDOUT],
                heldout_bytes_per_token=(heldout.bytes or 0) / heldout.tokens,
            )
        )
    content = {"tokenizer": tokenizer.digest}
    content |= {source.path: source.meta.data_hash for source in prepared}
    fingerprint = dict(content)
    values = to_plain(run.data)
    for name in ("sequence_length", "limit_train_rows", "document_mask", "mixture_block", "stages"):
        fingerprint[f"data.{name}"] = json.dumps(values[name])
    if run.data.name is DataName.mixture:
        for name, config in run.data.sources.items():
            fingerprint[f"data.sources.{name}.weight"] = repr(config.weight)
    return Corpus(
        tokenizer_dir=str(tokenizer.folder),
        tokenizer_hash=tokenizer.digest,
        tokenizer_size=tokenizer.size,
        eos_id=tokenizer.eos_id,
        content_hash=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        fingerprint=fingerprint,
        sources=sources,
    )


def _too_short(source: Prepared, name: str, split: Split, data: Data) -> Problem:
    what = "training text" if name == TRAIN else "held-out text"
    message = (
        f"the {what} has {split.tokens} tokens, too few for one row of"
        f" {data.sequence_length} and the token after it"
    )
    hint = "give more text, or shorten data.sequence_length"
    if name == HELDOUT:
        hint += f", or raise data.heldout_fraction={data.heldout_fraction}"
    return Problem(path=source.path, message=message, hint=hint)
