"""meta.json: what a folder of tokens holds. It is written last, so a folder without one is torn."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.files import write_text

META = "meta.json"
FORMAT = 3
"""Raised whenever the same text and options would give other tokens, or another meta.json."""
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A stretch of tokens in a file."""

    file: str
    """Relative to the folder of meta.json, or absolute where the tokens existed already."""
    first: int
    """Number of the first token; for a headerless file, too."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training or held-out tokens."""

    extents: list[Extent]
    tokens: int
    documents: int | None
    """`None` where nothing says it."""
    bytes: int | None
    """Of the text; `None` where only tokens are known."""


@dataclass(frozen=True, kw_only=True)
class TokensMeta:
    """What made the tokens, and where they lie."""

    format: int
    data_hash: str
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    dtype: str
    row_tokens: int | None
    """Rows are cut out of the stream, each overlapping the next by a token (`None`), or have this
    length and stand one after another (best-fit packing)."""
    splits: dict[str, Split]
    files: list[tuple[str, int, str]]
    """Name, size and SHA-256 of each file that went in."""
    notes: dict[str, int] = field(default_factory=dict)
    """Counts: blank, duplicate, cut and unreadable documents, tokens of padding."""
    skipped: list[str] = field(default_factory=list)
    """The first documents that could not be read, where, and why."""


def write_meta(folder: Path, meta: TokensMeta) -> None:
    """Make a folder of tokens complete."""
    write_text(folder / META, json.dumps(asdict(meta), indent=2) + "\n")


def read_meta(folder: Path, *, path: str) -> TokensMeta:
    """Read meta.json.

    Args:
        path: the setting that names the folder.

    Raises:
        UserError: if it is missing or not ours.
    """
    file = folder / META
    if not file.is_file():
        message = f"{folder} has no {META}: it holds no prepared data, or its making was cut short"
        hint = "task=prepare prints the folder that it made"
        raise UserError([Problem(path=path, message=message, hint=hint)])
    try:
        meta = TypeAdapter(TokensMeta).validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"{file} can't be read: {place}: {first['msg']}"
        raise UserError([Problem(path=path, message=message)]) from error
    if meta.format != FORMAT:
        message = f"{file} has format {meta.format}, and this version reads {FORMAT}"
        raise UserError([Problem(path=path, message=message, hint="prepare the data again")])
    return meta


def cut_extents(extents: list[Extent], tokens: int) -> tuple[list[Extent], list[Extent]]:
    """The first so many tokens, and the rest."""
    head: list[Extent] = []
    tail: list[Extent] = []
    for extent in extents:
        taken = min(max(tokens, 0), extent.tokens)
        tokens -= taken
        parts = ((head, extent.first, taken), (tail, extent.first + taken, extent.tokens - taken))
        for side, first, count in parts:
            if count:
                side.append(Extent(file=extent.file, first=first, tokens=count))
    return head, tail
