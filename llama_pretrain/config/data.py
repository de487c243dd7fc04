"""What a run may say of its data: sources, rows, stages and the tokenizer."""

from dataclasses import field
from enum import Enum
from typing import Annotated

from annotated_types import Ge, Interval

from llama_pretrain.config.fields import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    schema,
)


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


class TokenizerName(str, Enum):
    train = "train"
    pretrained = "pretrained"


@schema
class Tokenizer:
    """How text becomes token ids."""

    name: TokenizerName = TokenizerName.train
    """`train`: a byte-level BPE learnt from the training documents; `pretrained`: from `path`.
    With `prepared` data, `train` stands for the tokenizer that lies with the tokens."""
    vocab_size: Annotated[int, Ge(260)] = 32_000
    """`train`: largest number of tokens, the 256 bytes and the special ones included."""
    sample_bytes: PositiveInt = 200_000_000
    """`train`: bytes of text to learn from, taken from all over the corpus."""
    path: str | None = None
    """`pretrained`: directory with tokenizer.json, as `save_pretrained` writes it."""
