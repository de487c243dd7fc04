"""Best-fit packing."""

from pathlib import Path

import numpy as np

from llama_pretrain.data.gather import pack_best_fit
from llama_pretrain.data.meta import read_meta
from llama_pretrain.data.packed import open_sequences
from llama_pretrain.data.tokenizer import open_tokenizer
from tests.data.corpora import folder_of, prepare


def test_best_fit_by_hand() -> None:
    # 6 and 4 fill a sequence of 10, so do 5 and 5; 3 remains.
    assert list(pack_best_fit([3, 6, 5, 4, 5], width=10)) == [
        [(1, 0, 6), (3, 0, 4)],
        [(2, 0, 5), (4, 0, 5)],
        [(0, 0, 3)],
    ]
    # A longer document is cut; the last token of a piece is the first input of the next.
    assert list(pack_best_fit([12], width=5)) == [[(0, 0, 5)], [(0, 4, 9)], [(0, 8, 12)]]


def test_every_token_is_a_target_once() -> None:
    draw = np.random.default_rng(0)
    for width in (2, 3, 17, 129):
        lengths = draw.integers(2, 3 * width, 200).tolist()
        seen: list[tuple[int, int]] = []
        for sequence in pack_best_fit(lengths, width=width):
            assert sum(stop - start for _, start, stop in sequence) <= width
            for document, start, stop in sequence:
                seen += [(document, place) for place in range(start + 1, stop)]
        assert sorted(seen) == [
            (d, n) for d, length in enumerate(lengths) for n in range(1, length)
        ]


def test_sequences_hold_whole_documents(tmp_path: Path) -> None:
    texts = [f"text {number} " * (1 + number % 5) for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = prepare(tmp_path, "data.packing=best_fit", "data.sequence_length=32")
    meta = read_meta(folder_of(corpus), path="data")
    assert meta.sequence_tokens == 33
    assert meta.notes["padding_tokens"] > 0
    sequences = open_sequences(folder_of(corpus), meta, "train", sequence_length=32)
    backend = open_tokenizer(Path(corpus.tokenizer_dir)).backend
    found: list[str] = []
    for number in range(len(sequences)):
        decoded = backend.decode(sequences.sequence(number).tolist(), skip_special_tokens=False)
        assert decoded.endswith("</s>")
        found += [text for text in decoded.split("</s>") if text]
    assert len(found) > 25
    assert set(found) <= set(texts)
