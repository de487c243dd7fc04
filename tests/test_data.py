"""From text to the rows of a step."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.schema import Tokenizer as TokenizerConfig
from llama_pretrain.config.schema import TokenizerName
from llama_pretrain.data.dataset import EvalSampler, TrainSampler, create_pretrain_dataset
from llama_pretrain.data.order import hash_samples, rows_at
from llama_pretrain.data.packed import TokenReader, TokenWriter
from llama_pretrain.data.prepare import prepare_corpus
from llama_pretrain.data.sources import list_files, open_source
from llama_pretrain.data.tokenizer import import_tokenizer, open_tokenizer, train_tokenizer
from tests.conftest import compose_run


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 64, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_each_epoch_is_a_permutation(num_rows: int, seed: int) -> None:
    rows = rows_at(np.arange(3 * num_rows, dtype=np.uint64), num_rows=num_rows, seed=seed)
    for epoch in range(3):
        part = rows[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part.tolist()) == list(range(num_rows))
    if num_rows >= 10:
        assert rows[:num_rows].tolist() != rows[num_rows : 2 * num_rows].tolist()


def test_order_differs_between_seeds_and_epochs() -> None:
    n = 1000
    orders = {
        tuple(rows_at(np.arange(e * n, e * n + n, dtype=np.uint64), num_rows=n, seed=s).tolist())
        for s in range(4)
        for e in range(4)
    }
    assert len(orders) == 16  # seed 3 epoch 1 is not seed 4 epoch 0, as DistributedSampler has it


def test_huge_corpora_need_no_memory() -> None:
    rows = rows_at(np.arange(5, dtype=np.uint64), num_rows=10**12, seed=1)
    assert len(set(rows.tolist())) == 5
    assert max(rows.tolist()) < 10**12


def global_batches(*, world_size: int, first_step: int, num_rows: int) -> list[list[int]]:
    """Sorted rows of each step, put together from all ranks."""
    ranks = [
        list(
            TrainSampler(
                num_rows=num_rows,
                seed=5,
                first_step=first_step,
                num_steps=20,
                global_batch_size=12,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    share = 12 // world_size
    steps = len(ranks[0]) // share
    return [
        sorted(row for rows in ranks for row in rows[step * share : (step + 1) * share])
        for step in range(steps)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("first_step", [0, 7])
def test_global_batches_do_not_depend_on_ranks_or_cut(world_size: int, first_step: int) -> None:
    whole = global_batches(world_size=1, first_step=0, num_rows=50)
    assert (
        global_batches(world_size=world_size, first_step=first_step, num_rows=50)
        == (whole[first_step:])
    )


def test_sample_hash_adds_up_over_ranks() -> None:
    rows = np.arange(10, dtype=np.int64)
    assert hash_samples(rows) == hash_samples(rows[::2]) + hash_samples(rows[1::2])
    assert hash_samples(rows) != hash_samples(rows + 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_row_once(world_size: int) -> None:
    ranks = [
        list(EvalSampler(num_rows=7, micro_batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(rows) for rows in ranks}) == 1  # no rank stops before the others
    assert len(ranks[0]) % 2 == 0
    assert sorted(row for rows in ranks for row in rows if row >= 0) == list(range(7))


def test_megatron_layout_by_hand(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "x", vocab_size=300) as writer:
        writer.add([1, 2, 299])
        writer.add([4])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 299, 4)
    index = (tmp_path / "x.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, 8, 2, 3)
    assert struct.unpack_from("<2i2q3q", index, 34) == (3, 1, 0, 6, 0, 1, 2)


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "x", vocab_size=65_537) as writer:
        writer.add([65_536] * 4)
    assert TokenReader(tmp_path / "x").row(0, 2).tolist() == [65_536] * 3


def test_rows_overlap_by_the_target_of_the_last_token(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "train", vocab_size=300) as writer:
        writer.add(list(range(10)))
    dataset = create_pretrain_dataset(tmp_path, "train", sequence_length=3)
    assert len(dataset) == 3
    item = dataset[2]
    assert item["input_ids"].tolist() == [6, 7, 8]
    assert item["shift_labels"].tolist() == [7, 8, 9]
    empty = dataset[-1]
    assert empty["shift_labels"].tolist() == [-100] * 3


def test_a_truncated_token_file_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "x", vocab_size=300) as writer:
        writer.add(list(range(10)))
    content = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"x\.bin has 19 bytes where its index says 20"):
        TokenReader(tmp_path / "x")


def text_run(tmp_path: Path, *more: str) -> object:
    return compose_run(
        [
            "debug=smoke",
            "data=text",
            f"data.paths=['{tmp_path}/*.txt']",
            f"data.cache_dir={tmp_path}/cache",
            "data.sequence_length=16",
            "data.heldout_fraction=0.2",
            *more,
        ]
    )


def write_texts(folder: Path, count: int) -> None:
    for number in range(count):
        words = " ".join(f"word{number * 7 % 13} and number {n}" for n in range(40))
        (folder / f"{number:03d}.txt").write_text(f"{words}\n")


def test_the_cache_is_addressed_by_content(tmp_path: Path) -> None:
    write_texts(tmp_path, 30)
    said: list[str] = []
    first = prepare_corpus(text_run(tmp_path), report=said.append)  # type: ignore[arg-type]
    assert len(said) == 2
    again = prepare_corpus(text_run(tmp_path), report=said.append)  # type: ignore[arg-type]
    assert again == first
    assert len(said) == 2  # nothing was made twice
    (tmp_path / "000.txt").write_text("one other text\n" * 30)
    changed = prepare_corpus(text_run(tmp_path), report=said.append)  # type: ignore[arg-type]
    assert changed.data_hash != first.data_hash


def test_heldout_documents_stay_when_the_corpus_grows(tmp_path: Path) -> None:
    def heldout(count: int) -> set[str]:
        folder = tmp_path / str(count)
        folder.mkdir()
        write_texts(folder, count)
        corpus = prepare_corpus(text_run(folder), report=print)  # type: ignore[arg-type]
        tokenizer = open_tokenizer(Path(corpus.tokenizer_dir))
        tokens = np.fromfile(Path(corpus.tokens_dir) / "heldout.bin", np.uint16).tolist()
        texts = tokenizer.backend.decode(tokens, skip_special_tokens=False).split("</s>")
        return {text for text in texts if text}

    small, large = heldout(30), heldout(60)
    assert small
    assert small <= large


def test_one_book_is_split_at_its_end(tmp_path: Path) -> None:
    lines = [f"line {n} of the only book\n" for n in range(400)]
    (tmp_path / "book.txt").write_text("".join(lines))
    corpus = prepare_corpus(text_run(tmp_path), report=print)  # type: ignore[arg-type]
    tokenizer = open_tokenizer(Path(corpus.tokenizer_dir))
    parts = [
        tokenizer.backend.decode(
            np.fromfile(Path(corpus.tokens_dir) / f"{name}.bin", np.uint16).tolist()
        )
        for name in ("train", "heldout")
    ]
    assert "".join(parts) == "".join(lines)
    assert 0.15 < len(parts[1]) / len("".join(lines)) < 0.25


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    train_tokenizer(["some text to learn from"] * 5, vocab_size=300, target=tmp_path / "t")
    tokenizer = open_tokenizer(tmp_path / "t")
    (ids,) = tokenizer.encode(["a </s> and [PAD]"])
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == "a </s> and [PAD]"


def test_settings_of_an_imported_tokenizer_do_not_cut_documents(tmp_path: Path) -> None:
    train_tokenizer(["some text to learn from"] * 5, vocab_size=300, target=tmp_path / "t")
    backend = open_tokenizer(tmp_path / "t").backend
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    config = TokenizerConfig(name=TokenizerName.pretrained, path=str(tmp_path / "t"))
    imported = open_tokenizer(import_tokenizer(config, cache_dir=tmp_path / "cache"))
    text = "some text to learn from " * 9
    (ids,) = imported.encode([text])
    assert imported.backend.decode(ids) == text
    assert 0 not in ids  # [PAD]


def test_auto_tokenizer_reads_ours(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(["some text to learn from"] * 5, vocab_size=300, target=tmp_path / "t")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert tokenizer.pad_token == "[PAD]"
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.padding_side == "right"
    text = "def f(x):\n    return  x  # ünïcode 漢字"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("text one")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "text two"}) + "\n\n")
    parquet.write_table(pyarrow.table({"body": ["text three", None, " "]}), tmp_path / "c.parquet")
    paths = [f"{tmp_path}/*.{kind}" for kind in ("txt", "jsonl", "parquet")]
    data = compose_run(["data=text", f"data.paths={paths}", "data.text_field=body"]).data
    assert list(open_source(data).documents()) == ["text one", "text two", "text three"]


def test_files_come_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.txt").write_text(name)
    files = list_files([f"{tmp_path}/c[1].txt", f"{tmp_path}/*.txt"])
    assert [path.name for path in files] == ["c[1].txt", "a.txt", "b.txt"]


def test_lone_surrogates_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "x\\ud800"}\n')
    data = compose_run(["data=text", f"data.paths=['{tmp_path}/a.jsonl']"]).data
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: lone surrogate at character 1"):
        list(open_source(data).documents())
