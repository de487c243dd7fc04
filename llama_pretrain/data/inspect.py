"""task=inspect: the first sequences of a run with their targets, and statistics of each source."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.data.corpus import Prepared
from llama_pretrain.data.dataset import IGNORED, PretrainDataset, create_pretrain_dataset
from llama_pretrain.data.meta import HELDOUT, TRAIN, TokensMeta
from llama_pretrain.data.order import SampleOrder
from llama_pretrain.data.tokenizer import TrainedTokenizer
from llama_pretrain.plan.batch import solve_batch
from llama_pretrain.plan.plan import Corpus
from llama_pretrain.plan.sampling import plan_sampling
from llama_pretrain.runs.chart import Axis, Chart, Mark, Series, draw
from llama_pretrain.runs.page import render_page

SHOWN_SEQUENCES = 4
CONTEXT = 4
"""Tokens that are decoded before each token."""
MAX_SAMPLED_SEQUENCES = 2000
"""Sequences per source whose documents are measured."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """An input token, and whether the token after it is a target."""

    text: str
    ends_document: bool
    has_target: bool


@dataclass(frozen=True, kw_only=True)
class ShownSequence:
    """A sequence as it is trained on."""

    source: str
    number: int
    documents: int
    targets: int
    tokens: list[Token]


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Statistics of a source."""

    name: str
    meta: TokensMeta
    share: float
    """Share of the run's sequences in its first stage."""
    lengths: list[tuple[int, int]]
    """(n, documents of n / 2 < length <= n tokens) for powers of 2."""
    documents_per_sequence: float
    targets: float
    """Share of positions whose next token is a target."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of task=inspect."""

    sequences: list[ShownSequence]
    sources: list[SourceFacts]
    tokenizer: str


def inspect_data(
    run: ResolvedRun, corpus: Corpus, tokenizer: TrainedTokenizer, prepared: Sequence[Prepared]
) -> Inspection:
    """Inspect the first sequences of a run, and a sample of each source."""
    length, data = run.data.sequence_length, run.data
    dataset = create_pretrain_dataset(
        corpus,
        TRAIN,
        sequence_length=length,
        limits=[data.limit_train_sequences] * len(prepared),
        document_mask=data.document_mask,
    )
    batch = solve_batch(run.batch, sequence_length=length, world_size=run.data_parallel_size)
    sampling = plan_sampling(data, global_batch_size=batch.global_batch_size)
    order = SampleOrder(sampling, num_sequences=dataset.num_sequences, seed=run.seed)
    ids = order.ids(0, SHOWN_SEQUENCES).tolist()
    names = [source.name for source in prepared]
    quotas = sampling.stages[0].quotas
    sources = [
        _facts(source, dataset, first=end - count, count=count, quota=quota / sampling.block)
        for source, count, end, quota in zip(
            prepared, dataset.num_sequences, accumulate(dataset.num_sequences), quotas, strict=True
        )
    ]
    shown = [_show_sequence(dataset, tokenizer, number, names) for number in ids]
    return Inspection(sequences=shown, sources=sources, tokenizer=tokenizer.digest)


def _show_sequence(
    dataset: PretrainDataset, tokenizer: TrainedTokenizer, number: int, names: Sequence[str]
) -> ShownSequence:
    item = dataset[number]
    owner = next(name for name, end in zip(names, dataset.ends, strict=True) if number < end)
    ends = item["input_ids"] == tokenizer.eos_id
    has_target = item["shift_labels"] != IGNORED
    texts = _decode_each(tokenizer, item["input_ids"].tolist())
    tokens = [
        Token(text=text, ends_document=bool(end), has_target=bool(target))
        for text, end, target in zip(texts, ends, has_target, strict=True)
    ]
    return ShownSequence(
        source=owner,
        number=number,
        documents=_count_documents(ends),
        targets=int(has_target.sum()),
        tokens=tokens,
    )


def _decode_each(tokenizer: TrainedTokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens belongs to the last."""

    def decode(first: int, end: int) -> str:
        return str(tokenizer.backend.decode(list(ids[first:end]), skip_special_tokens=False))

    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        before = max(0, start - CONTEXT)  # without context a token loses its leading space
        text = decode(before, end)[len(decode(before, start)) :]
        if text.endswith("\ufffd") and end - start < 8:
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts


def _facts(
    source: Prepared, dataset: PretrainDataset, *, first: int, count: int, quota: float
) -> SourceFacts:
    """Statistics of up to MAX_SAMPLED_SEQUENCES consecutive sequences in the middle of a source."""
    sampled = min(count, MAX_SAMPLED_SEQUENCES)
    begin = first + (count - sampled) // 2
    items = [dataset[number] for number in range(begin, begin + sampled)]
    ends = np.stack([item["input_ids"] == source.meta.eos_id for item in items])
    if source.meta.sequence_tokens is not None:  # each sequence begins with a document
        lengths = np.concatenate([np.diff(np.flatnonzero(each), prepend=-1) for each in ends])
    else:  # the first document may be incomplete
        lengths = np.diff(np.flatnonzero(ends))
    targets = [(item["shift_labels"] != IGNORED).mean() for item in items]
    return SourceFacts(
        name=source.name,
        meta=source.meta,
        share=quota,
        lengths=_histogram(lengths[lengths > 1]),  # consecutive ends are padding
        documents_per_sequence=float(np.mean([_count_documents(sequence) for sequence in ends])),
        targets=float(np.mean(targets)),
    )


def _count_documents(ends: NDArray[np.bool_]) -> int:
    """Documents in a sequence: the first, and each that follows an end."""
    return 1 + int((ends[:-1] & ~ends[1:]).sum())  # consecutive ends are padding


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Count documents by length in powers of 2."""
    if not len(lengths):
        return []
    exponents = np.ceil(np.log2(lengths)).astype(int)
    low, high = int(exponents.min()), int(exponents.max())
    return [(2**e, int((exponents == e).sum())) for e in range(low, high + 1)]


def render_inspection(run: ResolvedRun, inspection: Inspection) -> str:
    """The HTML page: what the terminal shows, and charts."""
    name, mask = run.data.name.value, "on" if run.data.document_mask else "off"
    facts = f"sequences of {run.data.sequence_length:,} tokens, {run.data.packing.value},"
    facts += f" document mask {mask}, tokenizer {inspection.tokenizer[:16]}"
    return render_page(
        "data",
        title=f"{name} data",
        facts=facts,
        sources=list_sources(inspection),
        lengths=[_draw_lengths(source) for source in inspection.sources],
        sequences=[
            (f"{one.source}, sequence {one.number}", one.tokens) for one in inspection.sequences
        ],
    )


def _draw_lengths(source: SourceFacts) -> Chart | None:
    """A bar chart of documents by length."""
    count = max(1, len(source.lengths))
    labels = [(number + 0.5, f"{length:,}") for number, (length, _) in enumerate(source.lengths)]
    bars = Series(
        mark=Mark.bars,
        points=[(number + 0.5, num) for number, (_, num) in enumerate(source.lengths)],
        titles=[f"up to {length:,} tokens: {num:,}" for length, num in source.lengths],
    )
    axis = Axis(name="tokens, up to", span=(0, count), ticks=labels[:: -(-count // 8)])
    return draw(source.name, [bars], unit="documents", axis=axis, from_zero=True)


SOURCE_HEAD: tuple[str, ...] = (
    "source",
    "share",
    "documents",
    "training tokens",
    "held-out tokens",
    "bytes per token",
    "documents per sequence",
    "targets",
    "counted",
)


def list_sources(inspection: Inspection) -> list[tuple[str, ...]]:
    """A table: the head, and a row per source."""
    lines = [SOURCE_HEAD]
    for source in inspection.sources:
        train, heldout = source.meta.splits[TRAIN], source.meta.splits[HELDOUT]
        known = [split for split in (train, heldout) if split.bytes is not None]
        tokens = sum(split.tokens for split in known)
        a_token = sum(split.bytes or 0 for split in known) / tokens if tokens else None
        notes = [f"{count:,} {what.replace('_', ' ')}" for what, count in source.meta.notes.items()]
        notes = [note for note in notes if not note.startswith("0 ")]
        lines.append(
            (
                source.name,
                f"{source.share:.1%}",
                "-" if train.documents is None else f"{train.documents:,}",
                f"{train.tokens:,}",
                f"{heldout.tokens:,}",
                "-" if a_token is None else f"{a_token:.2f}",
                f"{source.documents_per_sequence:.1f}",
                f"{source.targets:.1%}",
                ", ".join(notes) or "nothing",
            )
        )
    return lines
