"""The config group `data`: sources, sequences, stages and how documents become tokens."""

from collections.abc import Iterator
from dataclasses import field, fields
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from llama_pretrain.config.fields import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    schema,
)
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.tokenizer import TokenizerName

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class DataName(str, Enum):
    stdlib = "stdlib"
    docstrings = "docstrings"
    text = "text"
    huggingface = "huggingface"
    megatron = "megatron"
    tokens = "tokens"
    prepared = "prepared"
    mixture = "mixture"


class TokenDtype(str, Enum):
    uint16 = "uint16"
    uint32 = "uint32"
    int32 = "int32"


class Packing(str, Enum):
    concatenate = "concatenate"
    best_fit = "best_fit"


class OnError(str, Enum):
    stop = "stop"
    skip = "skip"


@schema
class Source:
    """One source of documents or of tokens."""

    name: DataName = DataName.stdlib
    """Text: `stdlib` (the Python standard library's sources where they are installed),
    `docstrings` (English prose from the installed packages), `text` (your files in `paths`),
    `huggingface` (a dataset). Tokens that exist already, read where they lie: `megatron` (.bin with
    .idx), `tokens` (headerless files), `prepared` (a folder that task=prepare wrote). `mixture`:
    several of these, in `data.sources`."""
    paths: list[str] = field(default_factory=list)
    """`text`: files and globs of .txt (one file = one document), .jsonl and .parquet; .txt and
    .jsonl may end in .gz or .zst. `megatron`: .bin files; `tokens`: files; `prepared`: one folder.
    `**` recurses."""
    heldout_paths: list[str] = field(default_factory=list)
    """The same for evaluation, as in nanoGPT's val.bin; then nothing is held out of `paths`."""
    text_field: str = "text"
    """Field of a .jsonl record, or column of a .parquet file or a dataset, that holds the text."""
    delimiter: str | None = None
    """`text`: what separates documents inside a .txt, `\\n` and `\\t` standing for line feed and
    tab; `null` = one file is one document."""
    dataset: str | None = None
    """`huggingface`: a folder that save_to_disk wrote, a folder of data files, or a name on the
    hub, which is streamed."""
    dataset_config: str | None = None
    """`huggingface`: the configuration (subset) of the dataset."""
    dataset_split: str = "train"
    """`huggingface`: the split of the dataset."""
    dataset_revision: str | None = None
    """`huggingface`: a commit or tag of the hub's repository; `null` = its newest commit."""
    dtype: TokenDtype | None = None
    """`tokens`: type of the ids in the files (nanoGPT: uint16)."""
    weight: PositiveFloat = 1.0
    """In a mixture: this source's share of the rows, beside the other sources' weights."""
    max_epochs: PositiveFloat | None = None
    """A run that would read this source more often than this is refused."""


@schema
class Stage:
    """What changes at a point of the run."""

    from_tokens: NonNegativeInt = 0
    """The stage begins with the first step that has at least so many training tokens before it."""
    weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weights of the mixture's sources from here on, each one named; empty = as before."""
    sequence_length: Annotated[int, Ge(2)] | None = None
    """Rows are cut into rows of this length, a divisor of data.sequence_length, that attend to
    themselves alone; `null` = not cut."""


@schema
class Data(Source):
    """The corpus and how it becomes rows: of one source, or of those in `sources`."""

    sources: dict[str, Source] = field(default_factory=dict)
    """`mixture`: the sources by name, each with the settings above (of `name` to `max_epochs`)."""
    mixture_block: PositiveInt = 1000
    """Each block of so many consecutive rows has exactly its share of every source."""
    stages: list[Stage] = field(default_factory=list)
    """Changes on the way, in order, each from the first step on that has at least `from_tokens`
    training tokens before it: {from_tokens: 0, sequence_length: 64} cuts rows into rows of 64
    tokens (a divisor), {from_tokens: 1_000_000, weights: {web: 1, code: 3}} changes the mixture."""
    sequence_length: Annotated[int, Ge(2)] = 512
    """Tokens of a row."""
    packing: Packing = Packing.concatenate
    """`concatenate`: documents one after another, cut every sequence_length tokens; `best_fit`:
    whole documents are put where they fit (arXiv 2404.10830), and only longer ones are cut."""
    document_mask: bool = False
    """Documents in a row don't see each other, and no document's first token is a target."""
    heldout_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.02
    """Share of documents held out for evaluation, chosen by a hash of each document's text; of
    tokens that exist already, the end of each file."""
    shuffle_seed: NonNegativeInt | None = 0
    """Documents are shuffled with this seed when they are prepared; `null` = as they come."""
    deduplicate: bool = False
    """Whether only the first of documents with the same text is kept."""
    on_error: OnError = OnError.stop
    """What a document that can't be read does: `stop`, or `skip`, which counts and lists it."""
    max_error_fraction: Fraction = 0.001
    """`skip`: above this share of documents that can't be read, preparing stops."""
    prepare_processes: PositiveInt | None = None
    """Processes that prepare; `null` = one a core. The tokens don't depend on it."""
    limit_train_rows: PositiveInt | None = None
    """Use only the first rows of each source's training split; `null` = all."""
    hash: str | None = None
    """What the data must be: SHA-256 of its tokens' hashes and the tokenizer's. A snapshot records
    it, so that a run is not reproduced on other data unnoticed; `null` = whatever is there."""
    cache_dir: str = "~/.cache/llama_pretrain"
    """Where tokenizers and tokens are kept, each under the hash of what it was made from."""
    num_workers: NonNegativeInt = 0
    """Loader processes a rank; 0 is the fastest here (docs/log.md)."""


IN_PLACE = (DataName.megatron, DataName.tokens, DataName.prepared)
"""Tokens that exist already."""


READS_PATHS = (DataName.text, *IN_PLACE)


OF_A_DATASET = ("dataset_config", "dataset_split", "dataset_revision")


def named_sources(data: Data) -> dict[str, Source]:
    """The sources by name; a single one is called after its kind."""
    return data.sources if data.name is DataName.mixture else {data.name.value: data}


def validate_data(run: "Run") -> Iterator[Problem]:
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


def _check_source(source: Source, path: str, run: "Run") -> Iterator[Problem]:
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


def _check_tokens(source: Source, path: str, called: str, run: "Run") -> Iterator[Problem]:
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


def _check_stages(run: "Run") -> Iterator[Problem]:
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
