"""What the data's and the tokenizer's settings may not say together."""

from collections.abc import Iterator
from dataclasses import fields

from llama_pretrain.config.data import (
    Data,
    DataName,
    OnError,
    Packing,
    Source,
    Tokenizer,
    TokenizerName,
)
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.schema import Run, Task

IN_PLACE = (DataName.megatron, DataName.tokens, DataName.prepared)
"""Tokens that exist already."""
READS_PATHS = (DataName.text, *IN_PLACE)
OF_A_DATASET = ("dataset_config", "dataset_split", "dataset_revision")


def named_sources(data: Data) -> dict[str, Source]:
    """The sources by name; a single one is called after its kind."""
    return data.sources if data.name is DataName.mixture else {data.name.value: data}


def check_data(run: Run) -> Iterator[Problem]:
    """Rules of the section `data`."""
    data = run.data
    if data.name is DataName.mixture:
        yield from _check_mixture(data)
        for name, source in data.sources.items():
            yield from _check_source(source, f"data.sources.{name}", run)
    else:
        yield from _check_source(data, "data", run)
        if data.sources:
            yield Problem(
                path="data.sources",
                message=f"are not read with data={data.name.value} (got {', '.join(data.sources)})",
                hint="add data=mixture",
            )
        if data.weight != Source().weight:
            yield Problem(
                path="data.weight",
                message=f"is for the sources of a mixture (got {data.weight})",
                hint="leave it out, or add data=mixture",
            )
    yield from _check_stages(run)
    yield from _check_making(data)


def _check_mixture(data: Data) -> Iterator[Problem]:
    if not data.sources:
        yield Problem(
            path="data.sources",
            message="data=mixture needs sources",
            hint="add '+data.sources={web:{name:text,paths:[web/*.jsonl],weight:3},"
            "code:{name:stdlib}}'",
        )
    for item in fields(Source):
        value = getattr(data, item.name)
        if item.name != "name" and value != getattr(Source(), item.name):
            yield Problem(
                path=f"data.{item.name}",
                message=f"is not read with data=mixture (got {value})",
                hint=f"set it for a source: data.sources.NAME.{item.name}",
            )
    for name, source in data.sources.items():
        if source.name is DataName.mixture:
            message = "a mixture's sources are no mixtures (got mixture)"
            yield Problem(path=f"data.sources.{name}.name", message=message)


def _check_source(source: Source, path: str, run: Run) -> Iterator[Problem]:
    kind, default, planned = source.name, Source(), run.task is Task.plan
    called = f"data={kind.value}" if path == "data" else f"{path}.name={kind.value}"
    if kind in READS_PATHS and not source.paths and not planned:
        files = {DataName.text: "corpus/*.txt", DataName.megatron: "tokens/*.bin"}
        example = files.get(kind, "DIR" if kind is DataName.prepared else "train.bin")
        what = "a folder" if kind is DataName.prepared else "files"
        yield Problem(
            path=f"{path}.paths",
            message=f"{called} needs {what}",
            hint=f"add {path}.paths=[{example}]",
        )
    for name in ("paths", "heldout_paths"):
        value = getattr(source, name)
        if value and (kind not in READS_PATHS or (name != "paths" and kind is DataName.prepared)):
            yield Problem(
                path=f"{path}.{name}",
                message=f"is not read with {called} (got {value})",
                hint="add data=text" if path == "data" and name == "paths" else "leave it out",
            )
    plain = all(p.removesuffix(".gz").removesuffix(".zst").endswith(".txt") for p in source.paths)
    fielded = kind is DataName.huggingface or (kind is DataName.text and not plain)
    if source.text_field != default.text_field and not fielded:
        why = f"and {path}.paths names none" if kind is DataName.text else "and none are read"
        yield Problem(
            path=f"{path}.text_field",
            message=f"is for .jsonl and .parquet, {why} (got {source.text_field})",
            hint="leave it out",
        )
    if source.delimiter is not None and (kind is not DataName.text or not source.delimiter):
        yield Problem(
            path=f"{path}.delimiter",
            message=f"is for text files, and not empty (got {source.delimiter!r}, {called})",
            hint="leave it out",
        )
    if kind is DataName.huggingface and source.dataset is None and not planned:
        yield Problem(
            path=f"{path}.dataset",
            message=f"{called} needs a dataset",
            hint=f"add {path}.dataset=DIR, or a name on the hub",
        )
    for name in ("dataset", *OF_A_DATASET):
        value = getattr(source, name)
        if kind is not DataName.huggingface and value != getattr(default, name):
            yield Problem(
                path=f"{path}.{name}",
                message=f"is not read with {called} (got {value})",
                hint="add data=huggingface" if path == "data" else "leave it out",
            )
    yield from _check_tokens(source, path, called, run)


def _check_tokens(source: Source, path: str, called: str, run: Run) -> Iterator[Problem]:
    """Rules for tokens that exist already."""
    kind, data = source.name, run.data
    if (kind is DataName.tokens) != (source.dtype is not None) and run.task is not Task.plan:
        given = source.dtype is not None
        seen = f" (got {source.dtype.value})" if source.dtype is not None else ""
        yield Problem(
            path=f"{path}.dtype",
            message=f"is not read with {called}{seen}" if given else f"{called} needs a type",
            hint="leave it out" if given else f"add {path}.dtype=uint16 (nanoGPT's), or uint32",
        )
    if kind not in IN_PLACE:
        return
    others = [source.name for source in named_sources(data).values()]
    trained = run.tokenizer.name is TokenizerName.train
    found = DataName.prepared in others or run.task is Task.plan
    if kind is not DataName.prepared and trained and not found:
        yield Problem(
            path="tokenizer",
            message=f"{called} needs the tokenizer that made the tokens (got train)",
            hint="add tokenizer=pretrained tokenizer.path=DIR",
        )
    if kind is not DataName.prepared and data.packing is Packing.best_fit:
        yield Problem(
            path="data.packing",
            message=f"{called} is read where it lies, and not packed again (got best_fit)",
            hint="set data.packing=concatenate",
        )


def _check_stages(run: Run) -> Iterator[Problem]:
    data = run.data
    before = -1
    for number, stage in enumerate(data.stages):
        path = f"data.stages.{number}"
        if stage.from_tokens <= before:
            message = f"is not after the stage before (got {stage.from_tokens})"
            yield Problem(path=f"{path}.from_tokens", message=message, hint="put them in order")
        before = stage.from_tokens
        length = stage.sequence_length
        if length is not None and (data.sequence_length % length or length > data.sequence_length):
            message = f"does not divide data.sequence_length={data.sequence_length} (got {length})"
            near = [n for n in range(length, 1, -1) if data.sequence_length % n == 0][:1]
            hint = f"nearest that does: {near[0]}" if near else ""
            yield Problem(path=f"{path}.sequence_length", message=message, hint=hint)
        if length is not None and run.deepspeed.sequence_parallel_size > 1:
            message = "is not supported with deepspeed.sequence_parallel_size above 1"
            yield Problem(path=f"{path}.sequence_length", message=message)
        if not stage.weights:
            continue
        if data.name is not DataName.mixture:
            message = f"are for the sources of a mixture (got {', '.join(stage.weights)})"
            yield Problem(path=f"{path}.weights", message=message, hint="leave them out")
        elif set(stage.weights) != set(data.sources):
            names = ", ".join(data.sources)
            message = f"should name each source of the mixture (got {', '.join(stage.weights)})"
            yield Problem(path=f"{path}.weights", message=message, hint=f"sources: {names}")
        elif not any(stage.weights.values()):
            yield Problem(path=f"{path}.weights", message="are all 0")
    if data.document_mask and run.deepspeed.sequence_parallel_size > 1:
        yield Problem(
            path="data.document_mask",
            message="is not supported with deepspeed.sequence_parallel_size above 1 (got true)",
            hint="leave one of them out",
        )


def _check_making(data: Data) -> Iterator[Problem]:
    """Settings of preparing that would change nothing."""
    default = Data()
    if data.on_error is OnError.stop and data.max_error_fraction != default.max_error_fraction:
        yield Problem(
            path="data.max_error_fraction",
            message=f"is read with data.on_error=skip alone (got {data.max_error_fraction})",
            hint="add data.on_error=skip, or leave it out",
        )
    if data.mixture_block != default.mixture_block and data.name is not DataName.mixture:
        yield Problem(
            path="data.mixture_block",
            message=f"is for mixtures (got {data.mixture_block})",
            hint="leave it out, or add data=mixture",
        )
    sources = named_sources(data).values()
    apart = all(s.name is DataName.prepared or s.heldout_paths for s in sources)
    if sources and apart and data.heldout_fraction != default.heldout_fraction:
        yield Problem(
            path="data.heldout_fraction",
            message="is not read where all evaluation data is there already"
            f" (got {data.heldout_fraction})",
            hint="leave it out",
        )
    if not sources or not all(source.name in IN_PLACE for source in sources):
        return
    for name in ("deduplicate", "on_error", "shuffle_seed"):
        value = getattr(data, name)
        if value != getattr(default, name):
            yield Problem(
                path=f"data.{name}",
                message=f"is for text that is prepared, and these tokens exist already"
                f" (got {str(getattr(value, 'value', value)).lower()})",
                hint="leave it out",
            )


def check_tokenizer(run: Run) -> Iterator[Problem]:
    """Rules of the section `tokenizer`."""
    tokenizer, model = run.tokenizer, run.model
    pretrained = tokenizer.name is TokenizerName.pretrained
    if pretrained and tokenizer.path is None and run.task is not Task.plan:
        yield Problem(
            path="tokenizer.path",
            message="tokenizer=pretrained needs a directory",
            hint="add tokenizer.path=DIR",
        )
    if tokenizer.name is TokenizerName.train and tokenizer.path is not None:
        yield Problem(
            path="tokenizer.path",
            message=f"is not read with tokenizer=train (got {tokenizer.path})",
            hint="add tokenizer=pretrained",
        )
    if pretrained and tokenizer.vocab_size not in (Tokenizer().vocab_size, model.vocab_size):
        yield Problem(
            path="tokenizer.vocab_size",
            message=f"is not read with tokenizer=pretrained (got {tokenizer.vocab_size})",
            hint=f"set it to {model.vocab_size}, or add tokenizer=train",
        )
    too_large = tokenizer.vocab_size > model.vocab_size and not model.resize_embeddings
    if tokenizer.name is TokenizerName.train and model.path is None and too_large:
        yield Problem(
            path="tokenizer.vocab_size",
            message=f"is larger than model.vocab_size={model.vocab_size}"
            f" (got {tokenizer.vocab_size})",
            hint=f"set model.vocab_size={tokenizer.vocab_size}, or model.resize_embeddings=true",
        )
    if pretrained and tokenizer.sample_bytes != Tokenizer().sample_bytes:
        yield Problem(
            path="tokenizer.sample_bytes",
            message=f"is not read with tokenizer=pretrained (got {tokenizer.sample_bytes})",
            hint="leave it out, or add tokenizer=train",
        )
