"""The corpus of a run: its tokenizer, the tokens of its sources, and what the plan needs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.data import IN_PLACE, Data, DataName, Packing, Source, named_sources
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.tokenizer import TokenizerName
from llama_pretrain.data.existing import prepare_existing
from llama_pretrain.data.meta import HELDOUT, TRAIN, Split, TokensMeta, read_meta
from llama_pretrain.data.packed import open_rows
from llama_pretrain.data.pool import Report
from llama_pretrain.data.prepare import prepare_text, sample_texts
from llama_pretrain.data.sources import TextSource, open_source
from llama_pretrain.data.tokenizer import (
    TrainedTokenizer,
    find_tokenizer,
    import_tokenizer,
    open_tokenizer,
)
from llama_pretrain.plan.plan import Corpus, SourceTokens


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
            folder = prepare_text(run.data, texts[name], tokenizer, cache_dir, report)
            meta = read_meta(folder, path=paths[name])
        else:
            folder = prepare_existing(
                config,
                paths[name],
                tokenizer,
                cache_dir,
                report,
                heldout_fraction=run.data.heldout_fraction,
            )
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
