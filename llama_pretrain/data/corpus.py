"""The corpus of a run: its tokenizer, and the tokens of its sources."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.data import IN_PLACE, Data, DataName, Packing, Source, named_sources
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.tokenizer import TokenizerName
from llama_pretrain.data.cache import Cache, Report, data_error
from llama_pretrain.data.existing import prepare_existing
from llama_pretrain.data.meta import HELDOUT, TRAIN, TokensMeta, read_meta
from llama_pretrain.data.packed import open_sequences
from llama_pretrain.data.prepare import Sources, prepare_text, sample_texts
from llama_pretrain.data.sources import open_source
from llama_pretrain.data.tokenizer import (
    TrainedTokenizer,
    find_tokenizer,
    import_tokenizer,
    open_tokenizer,
)
from llama_pretrain.files import hash_text
from llama_pretrain.plan.plan import Corpus, SourceTokens


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A source's directory of tokens."""

    name: str
    path: str
    """Of its options: `data` or `data.sources.NAME`."""
    folder: Path
    meta: TokensMeta


def prepare_corpus(run: ResolvedRun, *, report: Report) -> Corpus:
    """The corpus of a run, from the cache if it is there.

    Raises:
        UserError: if the corpus cannot be read or is too short, or the tokenizer does not fit.
    """
    return describe_corpus(run, *prepare_sources(run, report=report))


def prepare_sources(run: ResolvedRun, *, report: Report) -> tuple[TrainedTokenizer, list[Prepared]]:
    """The tokenizer of a run, and the tokens of each of its sources in order."""
    data = run.data
    cache = Cache(folder=Path(data.cache_dir).expanduser().resolve(), report=report)
    configs = named_sources(data)
    mixed = data.name is DataName.mixture
    paths = {name: f"data.sources.{name}" if mixed else "data" for name in configs}
    texts = {
        name: _open_texts(config, paths[name], data, cache)
        for name, config in configs.items()
        if config.name not in IN_PLACE
    }
    folders = {
        name: _find_prepared(config, paths[name], data)
        for name, config in configs.items()
        if config.name is DataName.prepared
    }
    tokenizer = _choose_tokenizer(run, texts, folders, cache)
    prepared = []
    for name, config in configs.items():
        path = paths[name]
        if name in folders:
            folder = folders[name]
        elif name in texts:
            folder = prepare_text(data, texts[name], tokenizer, cache)
        else:
            folder = prepare_existing(
                config, path, tokenizer, cache, heldout_fraction=data.heldout_fraction
            )
        meta = read_meta(folder, path=path)
        prepared.append(Prepared(name=name, path=path, folder=folder, meta=meta))
    return tokenizer, prepared


def _open_texts(config: Source, path: str, data: Data, cache: Cache) -> Sources:
    """The files of a source and its held-out files, each with the share that is held out."""
    source = open_source(config, path=path, cache=cache)
    if not config.heldout_paths:
        return [(source, data.heldout_fraction)]
    return [(source, 0.0), (open_source(config, path=path, cache=cache, heldout=True), 1.0)]


def _find_prepared(config: Source, path: str, data: Data) -> Path:
    """The directory of prepared tokens, if it fits the config."""
    if len(config.paths) != 1:
        hint = "Make each directory a source of a mixture"
        raise data_error(f"{path}.paths", f"must be one directory (got {config.paths})", hint)
    folder = Path(config.paths[0]).expanduser().resolve()
    meta = read_meta(folder, path=f"{path}.paths")
    packing = Packing.concatenate if meta.sequence_tokens is None else Packing.best_fit
    for option, value, given in (
        ("packing", packing.value, data.packing.value),
        ("sequence_length", (meta.sequence_tokens or 0) - 1, data.sequence_length),
    ):
        if value not in (-1, given):
            message = f"must be {value}, with which {folder} was prepared (got {given})"
            raise data_error(f"data.{option}", message, f"Set it to {value}")
    return folder


def _choose_tokenizer(
    run: ResolvedRun, texts: Mapping[str, Sources], folders: Mapping[str, Path], cache: Cache
) -> TrainedTokenizer:
    """The one tokenizer of a run.

    Raises:
        UserError: if tokens were made with another tokenizer, or it is larger than the model's.
    """
    if run.tokenizer.name is TokenizerName.pretrained:
        tokenizer = open_tokenizer(import_tokenizer(run.tokenizer, cache))
    elif folders:
        tokenizer = open_tokenizer(next(iter(folders.values())) / "tokenizer")
    else:
        sources = [pair for pairs in texts.values() for pair in pairs]
        tokenizer = find_tokenizer(
            run.tokenizer,
            recipe=[source.fingerprint for source, _ in sources] + [run.data.on_error.value],
            texts=lambda: sample_texts(sources, num_bytes=run.tokenizer.sample_bytes),
            cache=cache,
        )
    for folder in folders.values():
        theirs = read_meta(folder, path="data").tokenizer_hash
        if theirs != tokenizer.digest:
            message = (
                f"must be {theirs[:16]}, with which {folder} was prepared"
                f" (got {tokenizer.digest[:16]} in {tokenizer.folder})"
            )
            hint = f"Set tokenizer=pretrained tokenizer.path={folder / 'tokenizer'}"
            raise data_error("tokenizer", message, hint)
    may_grow = run.model.resize_embeddings or run.tokenizer.add_pad_token
    if tokenizer.size > run.model.vocab_size and not may_grow:
        message = f"has more tokens than model.vocab_size={run.model.vocab_size}"
        hint = f"Set model.vocab_size={tokenizer.size}, or model.resize_embeddings=true"
        raise data_error("tokenizer", f"{message} (got {tokenizer.size})", hint)
    return tokenizer


def describe_corpus(
    run: ResolvedRun, tokenizer: TrainedTokenizer, prepared: list[Prepared]
) -> Corpus:
    """What the plan needs to know of prepared sources.

    Raises:
        UserError: if a source has too few tokens for a sequence, or a file has been truncated.
    """
    content = {"tokenizer": tokenizer.digest}
    content |= {source.path: source.meta.data_hash for source in prepared}
    fingerprint = dict(content)
    values = to_plain(run.data)
    for name in (
        "sequence_length",
        "limit_train_sequences",
        "document_mask",
        "mixture_block",
        "stages",
    ):
        fingerprint[f"data.{name}"] = json.dumps(values[name])
    if run.data.name is DataName.mixture:
        for name, config in run.data.sources.items():
            fingerprint[f"data.sources.{name}.weight"] = repr(config.weight)
    return Corpus(
        tokenizer_dir=str(tokenizer.folder),
        tokenizer_hash=tokenizer.digest,
        tokenizer_size=tokenizer.size,
        eos_id=tokenizer.eos_id,
        content_hash=hash_text(json.dumps(content)),
        fingerprint=fingerprint,
        sources=[_describe_source(source, run.data) for source in prepared],
    )


def _describe_source(source: Prepared, data: Data) -> SourceTokens:
    splits, sequences = source.meta.splits, {}
    for name, split in splits.items():
        try:
            found = open_sequences(
                source.folder, source.meta, name, sequence_length=data.sequence_length
            )
        except (ValueError, OSError) as error:
            hint = f"Delete {source.folder}; the next run prepares it again"
            raise data_error(source.path, str(error), hint) from error
        sequences[name] = len(found)
        if not sequences[name]:
            message = f"the {'training' if name == TRAIN else 'held-out'} text must have at least"
            hint = "Add more text, or shorten data.sequence_length"
            if name == HELDOUT:
                hint += f", or raise data.heldout_fraction={data.heldout_fraction}"
            tokens = f"{data.sequence_length + 1} tokens (got {split.tokens})"
            raise data_error(source.path, f"{message} {tokens}", hint)
    heldout = splits[HELDOUT]
    return SourceTokens(
        name=source.name,
        tokens_dir=str(source.folder),
        data_hash=source.meta.data_hash,
        train_sequences=sequences[TRAIN],
        train_tokens=splits[TRAIN].tokens,
        heldout_sequences=sequences[HELDOUT],
        heldout_bytes_per_token=(heldout.bytes or 0) / heldout.tokens,
    )
