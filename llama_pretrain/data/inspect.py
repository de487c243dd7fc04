"""A look at the data before the run: rows as they are trained on, and what they are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.config.run import Run
from llama_pretrain.data.corpus import Prepared
from llama_pretrain.data.dataset import IGNORED, PretrainDataset
from llama_pretrain.data.meta import HELDOUT, TRAIN, TokensMeta
from llama_pretrain.data.order import SampleOrder
from llama_pretrain.data.packed import open_rows
from llama_pretrain.data.tokenizer import TrainedTokenizer
from llama_pretrain.plan.batch import count_replicas, solve_batch
from llama_pretrain.plan.sampling import plan_sampling
from llama_pretrain.runs.page import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    place,
    render_page,
    section,
    table,
    tick_label,
    ticks,
)

SHOWN_ROWS = 4
CONTEXT = 4
"""Tokens before one that are decoded with it."""
MAX_SAMPLED_ROWS = 2000
"""Rows that the lengths are taken from."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A position of a row: its input, and whether the token after it is a target."""

    text: str
    ends_document: bool
    has_target: bool


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row as it is trained on."""

    source: str
    number: int
    documents: int
    targets: int
    tokens: list[Token]


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What a source is made of."""

    name: str
    meta: TokensMeta
    share: float
    """Of the run's first rows."""
    lengths: list[tuple[int, int]]
    """(tokens, documents of up to so many), of the sampled rows."""
    documents_a_row: float
    targets: float
    """Share of positions whose next token is trained on."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All of it."""

    rows: list[ShownRow]
    sources: list[SourceFacts]
    tokenizer: str


def inspect_data(run: Run, tokenizer: TrainedTokenizer, prepared: Sequence[Prepared]) -> Inspection:
    """Look at the first rows of the run, and at a sample of each source."""
    length, data = run.data.sequence_length, run.data
    readers = [
        open_rows(source.folder, source.meta, TRAIN, sequence_length=length) for source in prepared
    ]
    dataset = PretrainDataset(
        readers,
        limits=[data.limit_train_rows] * len(readers),
        eos_id=tokenizer.eos_id,
        document_mask=data.document_mask,
        padded=any(source.meta.row_tokens for source in prepared),
    )
    batch = solve_batch(run.batch, sequence_length=length, replicas=count_replicas(run))
    sampling = plan_sampling(data, global_batch_size=batch.global_batch_size)
    order = SampleOrder(sampling, num_rows=dataset.num_rows, seed=run.seed)
    ids = order.ids(0, SHOWN_ROWS).tolist()
    names = [source.name for source in prepared]
    quotas = sampling.stages[0].quotas
    sources = [
        _facts(source, dataset, first=end - rows, rows=rows, quota=quota / sampling.block)
        for source, rows, end, quota in zip(
            prepared, dataset.num_rows, accumulate(dataset.num_rows), quotas, strict=True
        )
    ]
    shown = [_show_row(dataset, tokenizer, number, names) for number in ids]
    return Inspection(rows=shown, sources=sources, tokenizer=tokenizer.digest)


def _show_row(
    dataset: PretrainDataset, tokenizer: TrainedTokenizer, number: int, names: Sequence[str]
) -> ShownRow:
    item = dataset[number]
    owner = next(name for name, end in zip(names, dataset.ends, strict=True) if number < end)
    ends = item["input_ids"] == tokenizer.eos_id
    has_target = item["shift_labels"] != IGNORED
    texts = _decode_each(tokenizer, item["input_ids"].tolist())
    tokens = [
        Token(text=text, ends_document=bool(end), has_target=bool(target))
        for text, end, target in zip(texts, ends, has_target, strict=True)
    ]
    return ShownRow(
        source=owner,
        number=number,
        documents=_count_documents(ends),
        targets=int(has_target.sum()),
        tokens=tokens,
    )


def _decode_each(tokenizer: TrainedTokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens stands with its last one."""

    def decode(first: int, end: int) -> str:
        return str(tokenizer.backend.decode(list(ids[first:end]), skip_special_tokens=False))

    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        before = max(0, start - CONTEXT)  # a token alone would lose the space before it
        text = decode(before, end)[len(decode(before, start)) :]
        if text.endswith("\ufffd") and end - start < 8:
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts


def _facts(
    source: Prepared, dataset: PretrainDataset, *, first: int, rows: int, quota: float
) -> SourceFacts:
    """Of up to MAX_SAMPLED_ROWS consecutive rows from the middle of a source."""
    count = min(rows, MAX_SAMPLED_ROWS)
    begin = first + (rows - count) // 2
    lengths: list[int] = []
    documents, targets, positions, run_on = 0, 0, 0, 0
    whole = source.meta.row_tokens is not None  # else the first row begins inside a document
    for number in range(begin, begin + count):
        item = dataset[number]
        ends = np.flatnonzero(item["input_ids"] == source.meta.eos_id)
        documents += _count_documents(item["input_ids"] == source.meta.eos_id)
        targets += int((item["shift_labels"] != IGNORED).sum())
        positions += len(item["input_ids"])
        last = -1
        for end in ends.tolist():
            if whole:
                lengths.append(run_on + end - last)
            run_on, last, whole = 0, end, True
        run_on += len(item["input_ids"]) - 1 - last
        if source.meta.row_tokens is not None:
            run_on = 0
    found = [length for length in lengths if length > 1]  # ends that fill up a row are no documents
    return SourceFacts(
        name=source.name,
        meta=source.meta,
        share=quota,
        lengths=_histogram(found),
        documents_a_row=documents / max(1, count),
        targets=targets / max(1, positions),
    )


def _count_documents(ends: NDArray[np.bool_]) -> int:
    """Documents of a row: the one it begins in, and each that begins after an end."""
    return 1 + int((ends[:-1] & ~ends[1:]).sum())  # an end after an end fills up a row


def _histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Documents by length, in powers of 2."""
    if not lengths:
        return []
    exponents = np.ceil(np.log2(np.array(lengths))).astype(int)
    low, high = int(exponents.min()), int(exponents.max())
    return [(2**e, int((exponents == e).sum())) for e in range(low, high + 1)]


def render_page_of(run: Run, inspection: Inspection) -> str:
    """The HTML page: the same as on the terminal, with plots."""
    rows = [(f"{row.source}, row {row.number}", _row_html(row)) for row in inspection.rows]
    shown = "".join(f"<h3>{escape(name)}</h3>{html}" for name, html in rows)
    plots = "".join(_bars(source) for source in inspection.sources)
    name, length = run.data.name.value, run.data.sequence_length
    header = (
        f"<header><h1>{escape(name)} data</h1><p>rows of {length:,} tokens,"
        f" {run.data.packing.value}, document mask {'on' if run.data.document_mask else 'off'},"
        f" tokenizer {inspection.tokenizer[:16]}</p></header>"
    )
    sources = table(source_rows(inspection), head=SOURCE_HEAD)
    legend = '<p class="legend"><b class="eos">end of a document</b> <i>no target</i></p>'
    return render_page(
        f"{name} data",
        [
            header,
            section("Sources", sources),
            section("Lengths of documents", f'<div class="charts">{plots}</div>' if plots else ""),
            section("The first rows of the run", legend + shown),
        ],
        style=ROW_STYLE,
    )


SOURCE_HEAD = (
    "source",
    "share",
    "documents",
    "training tokens",
    "held-out tokens",
    "bytes a token",
    "documents a row",
    "targets",
    "counted",
)


def source_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """A line of text a source, under SOURCE_HEAD."""
    lines: list[tuple[str, ...]] = []
    for source in inspection.sources:
        train, heldout = source.meta.splits[TRAIN], source.meta.splits[HELDOUT]
        known = [split for split in (train, heldout) if split.bytes is not None]
        tokens = sum(split.tokens for split in known)
        a_token = sum(split.bytes or 0 for split in known) / tokens if tokens else None
        notes = [f"{count:,} {what.replace('_', ' ')}" for what, count in source.meta.notes.items()]
        kept = [note for note in notes if not note.startswith("0 ")]
        lines.append(
            (
                source.name,
                f"{source.share:.1%}",
                "-" if train.documents is None else f"{train.documents:,}",
                f"{train.tokens:,}",
                f"{heldout.tokens:,}",
                "-" if a_token is None else f"{a_token:.2f}",
                f"{source.documents_a_row:.1f}",
                f"{source.targets:.1%}",
                ", ".join(kept) or "nothing",
            )
        )
    return lines


def _row_html(row: ShownRow) -> str:
    html = ""
    for token in row.tokens:
        text = escape(token.text)
        if token.ends_document:
            text = f'<b class="eos">{text}</b>'
        html += text if token.has_target else f"<i>{text}</i>"
    return f"<pre>{html}</pre>"


def _bars(source: SourceFacts) -> str:
    """Documents by length, as bars."""
    if not source.lengths:
        return ""
    scale = ticks(0, max(count for _, count in source.lengths))
    top, width = scale[-1], (RIGHT - LEFT) / len(source.lengths)
    drawn = ""
    for tick in scale:
        y = place(tick, (0, top), to=(BOTTOM, TOP))
        drawn += f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        drawn += f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick_label(tick)}</text>'
    every = -(-len(source.lengths) // 8)
    for number, (length, count) in enumerate(source.lengths):
        y, x = place(count, (0, top), to=(BOTTOM, TOP)), LEFT + number * width
        drawn += (
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}"'
            f' height="{BOTTOM - y:.1f}"><title>up to {length:,} tokens: {count:,}</title></rect>'
        )
        if number % every == 0:
            middle = x + width / 2
            label = f"{length:,}"
            drawn += f'<text class="mid" x="{middle:.1f}" y="{BOTTOM + 17}">{label}</text>'
    name = escape(source.name)
    return f"""
<figure><figcaption><h3>{name}</h3></figcaption>
<svg viewBox="0 0 360 220" role="img" aria-label="{name}: documents by length in tokens">
<text x="{LEFT}" y="12">documents</text>
<text class="end" x="{RIGHT}" y="{BOTTOM + 33}">tokens, up to</text>
{drawn}
</svg></figure>"""


ROW_STYLE = """
rect { fill: var(--line0) } .eos { color: var(--line1); border: 1px solid; border-radius: .3em;
  padding: 0 .2em } pre i, .legend i { font-style: normal; text-decoration: line-through;
  opacity: .55 }
@media (min-width: 1000px) { .charts { grid-template-columns: repeat(3, 1fr) } }
"""
