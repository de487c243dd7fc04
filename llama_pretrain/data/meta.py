"""meta.json describes a directory of tokens and, written last, marks it complete."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llama_pretrain.data.cache import data_error
from llama_pretrain.files import write_json

META = "meta.json"
FORMAT = 4
"""Increase it when the same text and options give other tokens or another meta.json."""
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A range of tokens in a file."""

    file: str
    """Relative to the directory of meta.json, or absolute for existing tokens."""
    first: int
    """Index of the first token in the file."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training or held-out tokens."""

    extents: list[Extent]
    tokens: int
    documents: int | None
    """`None` = unknown."""
    bytes: int | None
    """Bytes of text; `None` = unknown."""


@dataclass(frozen=True, kw_only=True)
class TokensMeta:
    """What the tokens were made from, and where they are."""

    format: int
    data_hash: str
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    dtype: str
    sequence_tokens: int | None
    """Length of the sequences of best-fit packing, one after another; `None` = sequences are cut
    from the stream and share one token with the next."""
    splits: dict[str, Split]
    files: list[tuple[str, int, str]]
    """Name, size and SHA-256 of each input file."""
    notes: dict[str, int] = field(default_factory=dict)
    """Counts: blank, duplicate, cut and unreadable documents, tokens of padding."""
    skipped: list[str] = field(default_factory=list)
    """Location and error of the first unreadable documents."""


def make_split(extents: list[Extent], documents: int | None, num_bytes: int | None) -> Split:
    """A split with the tokens of its extents."""
    tokens = sum(extent.tokens for extent in extents)
    return Split(extents=extents, tokens=tokens, documents=documents, bytes=num_bytes)


def write_meta(folder: Path, meta: TokensMeta) -> None:
    """Write meta.json, which completes a directory of tokens."""
    write_json(folder / META, asdict(meta))


def read_meta(folder: Path, *, path: str) -> TokensMeta:
    """Read meta.json.

    Args:
        path: the option that names the directory.

    Raises:
        UserError: if meta.json is missing, damaged or of another format.
    """
    file = folder / META
    if not file.is_file():
        message = f"{folder} has no {META}: it is not a complete directory of task=prepare"
        raise data_error(path, message, "task=prepare prints the directory that it wrote")
    try:
        meta = TypeAdapter(TokensMeta).validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise data_error(path, f"{file} is not valid: {place}: {first['msg']}") from error
    if meta.format != FORMAT:
        message = f"{file} must have format {FORMAT} (got {meta.format})"
        raise data_error(path, message, "Prepare the data again")
    return meta


def cut_extents(extents: list[Extent], tokens: int) -> tuple[list[Extent], list[Extent]]:
    """Split extents after a number of tokens."""
    head: list[Extent] = []
    tail: list[Extent] = []
    for extent in extents:
        taken = min(max(tokens, 0), extent.tokens)
        tokens -= taken
        if taken:
            head.append(Extent(file=extent.file, first=extent.first, tokens=taken))
        if taken < extent.tokens:
            first, rest = extent.first + taken, extent.tokens - taken
            tail.append(Extent(file=extent.file, first=first, tokens=rest))
    return head, tail
