"""Megatron files, and the sequences, labels and positions that are read from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_pretrain.data.dataset import PretrainDataset, document_positions
from llama_pretrain.data.meta import Extent, cut_extents
from llama_pretrain.data.packed import TokenSequences, token_dtype
from tests.conftest import write_tokens


def rows_of(folder: Path, tokens: list[int], *, length: int, **options: Any) -> TokenSequences:
    options = {"dtype": "uint16"} | options
    write_tokens(folder / "x", [tokens], dtype=options["dtype"])
    extents = [Extent(file="x.bin", first=0, tokens=len(tokens))]
    return TokenSequences(folder, extents, sequence_length=length, **options)


def dataset_of(sequences: TokenSequences, **options: Any) -> PretrainDataset:
    values = {"eos_id": 0, "document_mask": False, "padded": False} | options
    return PretrainDataset([sequences], limits=[None], **values)


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    assert token_dtype(65_536) == "uint16"
    sequences = rows_of(tmp_path, [65_536] * 4, dtype=token_dtype(65_537), length=2)
    assert sequences.sequence(0).tolist() == [65_536] * 3


def test_sequences_share_the_target_of_the_last_token(tmp_path: Path) -> None:
    dataset = dataset_of(rows_of(tmp_path, list(range(10)), length=3), eos_id=99)
    assert len(dataset) == 3
    assert dataset[2]["input_ids"].tolist() == [6, 7, 8]
    assert dataset[2]["shift_labels"].tolist() == [7, 8, 9]
    assert dataset[-1]["shift_labels"].tolist() == [-100] * 3


def test_sequences_do_not_span_files(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [range(8)], dtype="uint16")
    write_tokens(tmp_path / "b", [range(100, 110)], dtype="uint16")
    extents = [Extent(file="a.bin", first=1, tokens=7), Extent(file="b.bin", first=0, tokens=10)]
    sequences = TokenSequences(tmp_path, extents, dtype="uint16", sequence_length=3)
    found = [sequences.sequence(n).tolist() for n in range(len(sequences))]
    assert found == [[*range(n, n + 4)] for n in (1, 4, 100, 103, 106)]


def test_document_mask(tmp_path: Path) -> None:
    sequences = rows_of(tmp_path, [5, 6, 0, 7, 8, 9, 0, 3, 4], length=8)
    item = dataset_of(sequences, document_mask=True)[0]
    assert item["input_ids"].tolist() == [5, 6, 0, 7, 8, 9, 0, 3]
    assert item["shift_labels"].tolist() == [6, 0, -100, 8, 9, 0, -100, 4]
    assert item["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert document_positions(np.array([0, 0, 5]), eos_id=0).tolist() == [0, 0, 0]


def test_padding_is_no_target(tmp_path: Path) -> None:
    sequences = rows_of(tmp_path, [5, 6, 0, 7, 0, 0, 0], length=6, sequence_tokens=7)
    assert len(sequences) == 1
    labels = dataset_of(sequences, padded=True)[0]["shift_labels"].tolist()
    assert labels == [6, 0, 7, 0, -100, -100]


def test_truncated_files(tmp_path: Path) -> None:
    sequences = rows_of(tmp_path, list(range(10)), length=3)
    file = tmp_path / "x.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.bin is truncated: sequence 2 is incomplete"):
        sequences.sequence(2)
    extents = [Extent(file="x.bin", first=0, tokens=10)]
    with pytest.raises(ValueError, match=r"x\.bin must have at least 20 bytes \(got 19\)"):
        TokenSequences(tmp_path, extents, dtype="uint16", sequence_length=3)


def test_extents_are_cut() -> None:
    whole = [Extent(file="a", first=0, tokens=10), Extent(file="b", first=5, tokens=10)]
    assert cut_extents(whole, 12) == (
        [Extent(file="a", first=0, tokens=10), Extent(file="b", first=5, tokens=2)],
        [Extent(file="b", first=7, tokens=8)],
    )
    assert cut_extents(whole, 0) == ([], whole)
