"""The config group `data`: sources, sequences, stages and how documents become tokens."""

from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from llama_pretrain.config.fields import (
    Fraction,
    IsPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UsedWhen,
    schema,
)
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.tokenizer import TokenizerName

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class DataName(str, Enum):
    stdlib = "stdlib"
    stdlib_small = "stdlib_small"
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


IN_PLACE = (DataName.megatron, DataName.tokens, DataName.prepared)
"""Existing tokens, read where they are."""
READS_PATHS = (DataName.text, *IN_PLACE)

HUGGINGFACE = UsedWhen(".name", ("huggingface",))
FROM_TEXT = UsedWhen(
    ".name", ("stdlib", "stdlib_small", "docstrings", "text", "huggingface", "mixture")
)
NOT_PREPARED = UsedWhen(".name", tuple(k.value for k in DataName if k.value != "prepared"))
MIXTURE = UsedWhen("data.name", ("mixture",))
NOT_MIXTURE = UsedWhen(".name", tuple(kind.value for kind in DataName if kind.value != "mixture"))


@schema
class Source:
    """One source of documents or of tokens."""

    name: DataName = DataName.stdlib
    """Text: `stdlib` (the sources of the installed Python standard library), `stdlib_small` (those
    of its package email, for quick checks), `docstrings` (English prose from the installed
    packages), `text` (your files in `paths`), `huggingface` (a dataset).
    Existing tokens, read where they are: `megatron` (.bin with .idx), `tokens` (headerless files),
    `prepared` (a directory written by task=prepare). `mixture`: several of these, in
    `data.sources`."""
    paths: Annotated[list[str], IsPath()] = field(default_factory=list)
    """`text`: files and globs of .txt (one file = one document), .jsonl and .parquet; .txt and
    .jsonl may end in .gz or .zst. `megatron`: .bin files; `tokens`: files; `prepared`: one
    directory. `**` recurses."""
    heldout_paths: Annotated[list[str], IsPath()] = field(default_factory=list)
    """The same for evaluation, as in nanoGPT's val.bin; then nothing of `paths` is held out."""
    text_field: Annotated[str, UsedWhen(".name", ("text", "huggingface"))] = "text"
    """Field of a .jsonl record, or column of a .parquet file or a dataset, that holds the text."""
    delimiter: Annotated[str | None, UsedWhen(".name", ("text",))] = None
    """`text`: what separates documents inside a .txt, with `\\n` and `\\t` for line feed and tab;
    `null` = one file is one document."""
    dataset: Annotated[str | None, IsPath(must_exist=True)] = None
    """`huggingface`: a directory written by save_to_disk, a directory of data files, or a name on
    the hub, which is streamed."""
    dataset_config: Annotated[str | None, HUGGINGFACE] = None
    """`huggingface`: configuration (subset) of the dataset."""
    dataset_split: Annotated[str, HUGGINGFACE] = "train"
    """`huggingface`: split of the dataset."""
    dataset_revision: Annotated[str | None, HUGGINGFACE] = None
    """`huggingface`: commit or tag of the hub's repository; `null` = its newest commit."""
    dtype: Annotated[TokenDtype | None, UsedWhen(".name", ("tokens",))] = None
    """`tokens`: type of the ids in the files (nanoGPT: uint16)."""
    weight: Annotated[PositiveFloat, MIXTURE] = 1.0
    """In a mixture: this source's share of the sequences, relative to the other weights."""
    max_epochs: Annotated[PositiveFloat | None, NOT_MIXTURE] = None
    """A run that would read this source more often than this is refused."""


@schema
class Stage:
    """What changes at a point of the run."""

    from_tokens: NonNegativeInt = 0
    """The stage begins with the first step that has at least this many training tokens before it.
    """
    weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weights of the mixture's sources from here on, each one named; empty = unchanged."""
    sequence_length: Annotated[int, Ge(2)] | None = None
    """Sequences are cut into shorter ones of this length, a divisor of data.sequence_length, that
    attend only to themselves; `null` = not cut."""


@schema
class Data(Source):
    """The corpus and how it becomes sequences: of one source, or of those in `sources`."""

    sources: dict[str, Source] = field(default_factory=dict)
    """`mixture`: the sources by name, each with the settings above (`name` to `max_epochs`)."""
    mixture_block: Annotated[PositiveInt, MIXTURE] = 1000
    """Each block of this many consecutive sequences has exactly its share of every source."""
    stages: list[Stage] = field(default_factory=list)
    """Changes during the run, in order, each from the first step that has at least `from_tokens`
    training tokens before it: {from_tokens: 0, sequence_length: 64} cuts sequences into 64 tokens
    each (a divisor), {from_tokens: 1_000_000, weights: {web: 1, code: 3}} changes the mixture."""
    sequence_length: Annotated[int, Ge(2)] = 512
    """Tokens of a sequence."""
    packing: Packing = Packing.concatenate
    """`concatenate`: documents one after another, cut every sequence_length tokens; `best_fit`:
    whole documents are put where they fit (arXiv 2404.10830), and only longer ones are cut."""
    document_mask: bool = False
    """Documents in a sequence do not attend to each other, and no document's first token is a
    target."""
    heldout_fraction: Annotated[float, Interval(gt=0, lt=1), NOT_PREPARED] = 0.02
    """Share of documents held out for evaluation, chosen by a hash of each document's text; of
    existing tokens, the end of each file."""
    shuffle_seed: Annotated[NonNegativeInt | None, FROM_TEXT] = 0
    """Documents are shuffled with this seed when they are prepared; `null` = not shuffled."""
    deduplicate: Annotated[bool, FROM_TEXT] = False
    """Whether only the first of several documents with the same text is kept."""
    on_error: Annotated[OnError, FROM_TEXT] = OnError.stop
    """What happens at a document that cannot be read: `stop`, or `skip`, which counts and lists it.
    """
    max_error_fraction: Annotated[Fraction, UsedWhen("data.on_error", ("skip",))] = 0.001
    """`skip`: preparation stops above this share of documents that cannot be read."""
    prepare_processes: PositiveInt | None = None
    """Processes that prepare data; `null` = one a core. The tokens do not depend on it."""
    limit_train_sequences: PositiveInt | None = None
    """Use only the first sequences of each source's training split; `null` = all."""
    hash: str | None = None
    """What the data must be: SHA-256 of its tokens' hashes and the tokenizer's. A snapshot records
    it, so that a run cannot be reproduced on other data unnoticed; `null` = any data."""
    cache_dir: Annotated[str, IsPath(keep_home=True)] = "~/.cache/llama_pretrain"
    """Where tokenizers and tokens are cached, each under the hash of what it was made from."""
    node_cache_dir: Annotated[str | None, IsPath(keep_home=True)] = None
    """A directory on each node's own disk, to which tokens are copied once, before its ranks read
    them; `null` = they are read from `cache_dir`."""
    num_workers: NonNegativeInt = 0
    """Loader processes a rank; 0 is the fastest here (docs/log.md)."""


def named_sources(data: Data) -> dict[str, Source]:
    """The sources by name; a single one is named after its kind."""
    return data.sources if data.name is DataName.mixture else {data.name.value: data}


def validate_data(run: "Run") -> Iterator[Problem]:
    """Sources must name what they read, and stages must follow each other."""
    data, mixed = run.data, run.data.name is DataName.mixture
    if mixed and not data.sources:
        yield Problem(
            path="data.sources",
            message="is required with data=mixture",
            hint="Add '+data.sources={web:{name:text,paths:[web/*.jsonl],weight:3},"
            "code:{name:stdlib}}'",
        )
    if data.sources and not mixed:
        yield Problem(
            path="data.sources",
            message=f"requires data=mixture (got data={data.name.value})",
            hint="Add data=mixture",
        )
    yield from _validate_source(data, "data", run)
    for name, source in data.sources.items():
        if source.name is DataName.mixture:
            path = f"data.sources.{name}.name"
            yield Problem(path=path, message="must not be a mixture itself (got mixture)")
        yield from _validate_source(source, f"data.sources.{name}", run)
    yield from _validate_stages(data)


def _validate_source(source: Source, path: str, run: "Run") -> Iterator[Problem]:
    kind, planned = source.name, run.task is Task.plan
    label = f"data={kind.value}" if path == "data" else f"{path}.name={kind.value}"
    example = {DataName.text: "corpus/*.txt", DataName.megatron: "tokens/*.bin"}
    required = {
        "paths": kind in READS_PATHS,
        "dataset": kind is DataName.huggingface,
        "dtype": kind is DataName.tokens,
    }
    hints = {
        "paths": f"[{example.get(kind, 'DIR' if kind is DataName.prepared else 'train.bin')}]",
        "dataset": "DIR, or a name on the hub",
        "dtype": "uint16 (nanoGPT's), or uint32",
    }
    for name, is_required in required.items():
        value = getattr(source, name)
        if is_required and not value and not planned:
            yield Problem(
                path=f"{path}.{name}",
                message=f"is required with {label}",
                hint=f"Add {path}.{name}={hints[name]}",
            )
    # Not a warning: the run would train on other data than the user named.
    for name, reads in (
        ("paths", READS_PATHS),
        ("heldout_paths", READS_PATHS[:-1]),
        ("dataset", (DataName.huggingface,)),
    ):
        value = getattr(source, name)
        if value and kind not in reads:
            option = "huggingface" if name == "dataset" else "text"
            yield Problem(
                path=f"{path}.{name}",
                message=f"names data, but {label} does not read it (got {value})",
                hint=f"Set it for a source: data.sources.NAME.{name}"
                if kind is DataName.mixture
                else (f"Add data={option}" if path == "data" else "Remove it"),
            )
    if source.delimiter == "":
        yield Problem(path=f"{path}.delimiter", message="must not be empty", hint="Remove it")
    if kind not in (DataName.megatron, DataName.tokens):
        return
    kinds = [other.name for other in named_sources(run.data).values()]
    trained = run.tokenizer.name is TokenizerName.train
    if trained and DataName.prepared not in kinds and not planned:
        yield Problem(
            path="tokenizer",
            message=f"must be the tokenizer that made the tokens with {label} (got train)",
            hint="Add tokenizer=pretrained tokenizer.path=DIR",
        )
    if run.data.packing is Packing.best_fit:
        yield Problem(
            path="data.packing",
            message=f"best_fit is not supported with {label}, which is not packed again",
            hint="Set data.packing=concatenate",
        )


def _validate_stages(data: Data) -> Iterator[Problem]:
    before = -1
    for number, stage in enumerate(data.stages):
        path, length = f"data.stages.{number}", stage.sequence_length
        if stage.from_tokens <= before:
            message = f"must be greater than that of the stage before (got {stage.from_tokens})"
            yield Problem(path=f"{path}.from_tokens", message=message, hint="Sort the stages")
        before = stage.from_tokens
        if length is not None and data.sequence_length % length:
            near = [n for n in range(length, 1, -1) if data.sequence_length % n == 0][:1]
            yield Problem(
                path=f"{path}.sequence_length",
                message=f"must divide data.sequence_length={data.sequence_length} (got {length})",
                hint=f"Nearest divisor: {near[0]}" if near else "",
            )
        if not stage.weights:
            continue
        names = ", ".join(stage.weights)
        if data.name is not DataName.mixture:
            yield Problem(
                path=f"{path}.weights",
                message=f"requires data=mixture (got {names})",
                hint="Remove it",
            )
        elif set(stage.weights) != set(data.sources):
            yield Problem(
                path=f"{path}.weights",
                message=f"must name every source of the mixture (got {names})",
                hint=f"Sources: {', '.join(data.sources)}",
            )
        elif not any(stage.weights.values()):
            yield Problem(path=f"{path}.weights", message="must not all be 0")
