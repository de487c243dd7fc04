"""Tokens on disk: our files, those of others, and rows out of them."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.dataset import PretrainDataset, document_positions
from llama_pretrain.data.meta import Extent, read_meta
from llama_pretrain.data.packed import TokenRows, read_index, token_dtype
from llama_pretrain.data.tokenizer import train_tokenizer
from llama_pretrain.plan.plan import Corpus
from tests.conftest import Quiet, compose_run, write_tokens


def rows_of(prefix: Path, tokens: int, *, dtype: str, length: int, **more: Any) -> TokenRows:
    extents = [Extent(file=f"{prefix.name}.bin", first=0, tokens=tokens)]
    return TokenRows(prefix.parent, extents, dtype=dtype, sequence_length=length, **more)


def test_megatron_layout_by_hand(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x", [[1, 2, 299], [4]], dtype="uint16")
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 299, 4)
    index = (tmp_path / "x.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, 8, 2, 3)
    assert struct.unpack_from("<2i2q3q", index, 34) == (3, 1, 0, 6, 0, 1, 2)
    read = read_index(tmp_path / "x.idx")
    assert (read.dtype, read.documents, read.tokens) == ("uint16", 2, 4)


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    assert token_dtype(65_536) == "uint16"
    dtype = token_dtype(65_537)
    write_tokens(tmp_path / "x", [[65_536] * 4], dtype=dtype)
    assert rows_of(tmp_path / "x", 4, dtype=dtype, length=2).row(0).tolist() == [65_536] * 3


def dataset_of(rows: TokenRows, **more: Any) -> PretrainDataset:
    options = {"eos_id": 0, "document_mask": False, "padded": False} | more
    return PretrainDataset([rows], limits=[None], **options)


def test_rows_overlap_by_the_target_of_the_last_token(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x", [range(10)], dtype="uint16")
    dataset = dataset_of(rows_of(tmp_path / "x", 10, dtype="uint16", length=3), eos_id=99)
    assert len(dataset) == 3
    assert dataset[2]["input_ids"].tolist() == [6, 7, 8]
    assert dataset[2]["shift_labels"].tolist() == [7, 8, 9]
    assert dataset[-1]["shift_labels"].tolist() == [-100] * 3


def test_rows_do_not_span_files(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [range(8)], dtype="uint16")
    write_tokens(tmp_path / "b", [range(100, 110)], dtype="uint16")
    extents = [Extent(file="a.bin", first=1, tokens=7), Extent(file="b.bin", first=0, tokens=10)]
    rows = TokenRows(tmp_path, extents, dtype="uint16", sequence_length=3)
    assert [rows.row(n).tolist() for n in range(len(rows))] == [
        [1, 2, 3, 4],
        [4, 5, 6, 7],
        [100, 101, 102, 103],
        [103, 104, 105, 106],
        [106, 107, 108, 109],
    ]


def test_a_document_mask_hides_first_tokens_and_counts_anew(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x", [[5, 6, 0, 7, 8, 9, 0, 3, 4]], dtype="uint16")
    rows = rows_of(tmp_path / "x", 9, dtype="uint16", length=8)
    item = dataset_of(rows, document_mask=True)[0]
    assert item["input_ids"].tolist() == [5, 6, 0, 7, 8, 9, 0, 3]
    assert item["shift_labels"].tolist() == [6, 0, -100, 8, 9, 0, -100, 4]
    assert item["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert document_positions(np.array([0, 0, 5]), eos_id=0).tolist() == [0, 0, 0]


def test_the_fill_of_a_packed_row_is_no_target(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x", [[5, 6, 0, 7, 0, 0, 0]], dtype="uint16")
    rows = rows_of(tmp_path / "x", 7, dtype="uint16", length=6, row_tokens=7)
    assert len(rows) == 1
    assert dataset_of(rows, padded=True)[0]["shift_labels"].tolist() == [6, 0, 7, 0, -100, -100]


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x", [range(10)], dtype="uint16")
    rows = rows_of(tmp_path / "x", 10, dtype="uint16", length=3)
    content = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"x\.bin has 19 bytes where 20 are needed"):
        rows_of(tmp_path / "x", 10, dtype="uint16", length=3)
    with pytest.raises(ValueError, match=r"x\.bin was truncated: row 2 is cut short"):
        rows.row(2)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(["some text to learn from"] * 5, vocab_size=300, target=folder)
    return folder


EOS = 2


def tokens_run(folder: Path, tokenizer_dir: Path, *more: str) -> Any:
    return compose_run(
        [
            "debug=smoke",
            "tokenizer=pretrained",
            f"tokenizer.path={tokenizer_dir}",
            f"data.cache_dir={folder}/cache",
            "data.sequence_length=16",
            "data.heldout_fraction=0.2",
            *more,
        ]
    )


def prepare(folder: Path, tokenizer_dir: Path, *more: str) -> Corpus:
    return prepare_corpus(tokens_run(folder, tokenizer_dir, *more), report=Quiet())


def documents(count: int) -> list[list[int]]:
    draw = np.random.default_rng(count)
    return [[*draw.integers(3, 250, draw.integers(5, 60)).tolist(), EOS] for _ in range(count)]


def stream_of(corpus: Corpus) -> list[int]:
    """All tokens, training before held-out, of a source of one file."""
    source = corpus.sources[0]
    meta = read_meta(Path(source.tokens_dir), path="data")
    tokens: list[int] = []
    for split in ("train", "heldout"):
        for extent in meta.splits[split].extents:
            content = np.fromfile(Path(source.tokens_dir, extent.file), meta.dtype)
            tokens += content[extent.first : extent.first + extent.tokens].tolist()
    return tokens


def test_megatron_files_are_read_where_they_lie(tmp_path: Path, tokenizer_dir: Path) -> None:
    written = documents(50)
    write_tokens(tmp_path / "x", written, dtype="uint16")
    corpus = prepare(tmp_path, tokenizer_dir, "data=megatron", f"data.paths=['{tmp_path}/x.bin']")
    flat = [token for document in written for token in document]
    assert stream_of(corpus) == flat
    source = corpus.sources[0]
    assert source.heldout_rows == (len(flat) - int(len(flat) * 0.8) - 1) // 16
    assert source.heldout_bytes_per_token > 0.3
    assert not list(Path(source.tokens_dir).glob("*.bin"))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_headerless_files_are_read(tmp_path: Path, tokenizer_dir: Path, dtype: str) -> None:
    flat = np.concatenate([np.array(document) for document in documents(50)])
    flat.astype(dtype).tofile(tmp_path / "train.bin")
    flat[:200].astype(dtype).tofile(tmp_path / "val.bin")
    corpus = prepare(
        tmp_path, tokenizer_dir, "data=tokens", f"data.dtype={dtype}",
        f"data.paths=['{tmp_path}/train.bin']", f"data.heldout_paths=['{tmp_path}/val.bin']",
    )  # fmt: skip
    assert stream_of(corpus) == [*flat.tolist(), *flat[:200].tolist()]


def refused(tmp_path: Path, tokenizer_dir: Path, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer_dir, *more)
    return str(caught.value)


def test_wrong_token_files_are_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "x.bin"
    tokens = ["data=tokens", f"data.paths=['{file}']", "data.dtype=uint16"]
    np.array([5, 6, 7], dtype=np.uint16).tofile(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(tmp_path, tokenizer_dir, *tokens) == (
        f"data.paths: {file} has 5 bytes, which is no number of uint16 tokens;"
        " it was cut short, or has a header"
    )
    np.array([5, 6, 300], dtype=np.uint16).tofile(file)
    assert refused(tmp_path, tokenizer_dir, *tokens) == (
        f"data.paths: {file}: token 2 is 300, and the tokenizer has 275 tokens;"
        " give the tokenizer and the dtype that the file was written with"
    )
    np.save(file.with_suffix(".npy"), np.arange(100, dtype=np.uint16))
    told = refused(tmp_path, tokenizer_dir, *tokens[::2], f"data.paths=['{tmp_path}/x.npy']")
    assert told.startswith(f"data.paths: {tmp_path}/x.npy is a .npy array with a header;")
    np.array([20240520, 1], dtype=np.int32).tofile(file)
    assert f"{file} begins with llm.c's header" in refused(tmp_path, tokenizer_dir, *tokens)


def test_wrong_megatron_files_are_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "x.bin"
    megatron = ["data=megatron", f"data.paths=['{file}']"]
    write_tokens(tmp_path / "x", documents(5), dtype="uint16")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-2])
    assert refused(tmp_path, tokenizer_dir, *megatron) == (
        f"data.paths: {file} has {size - 2} bytes where its index says {size}; it was cut short"
    )
    write_tokens(tmp_path / "x", [[5, 6], [7, EOS]], dtype="uint16")
    assert refused(tmp_path, tokenizer_dir, *megatron) == (
        f"data.paths: {file}: 1 of the first 2 documents end with token 6, not with the"
        " tokenizer's end-of-text token 2; give the tokenizer that made them, and write them with"
        " --append-eod"
    )
    index = tmp_path / "x.idx"
    index.write_bytes(index.read_bytes()[:40])
    assert refused(tmp_path, tokenizer_dir, *megatron) == f"data.paths: {index} is cut short"
    index.write_bytes(b"something else")
    assert f"{index} is no Megatron index" in refused(tmp_path, tokenizer_dir, *megatron)
    index.unlink()
    assert f"{file} has no x.idx beside it" in refused(tmp_path, tokenizer_dir, *megatron)


def test_a_vocabulary_above_the_dtype_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{n}": n for n in range(70_000)} | {"</s>": 70_000}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    (tmp_path / "t").mkdir()
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "x.bin")
    told = refused(
        tmp_path, tmp_path / "t", "data=tokens", f"data.paths=['{tmp_path}/x.bin']",
        "data.dtype=uint16", "model.resize_embeddings=true", "tokenizer.vocab_size=32000",
    )  # fmt: skip
    assert told == (
        "data.dtype: uint16 holds ids up to 65,535, and the tokenizer has 70,002 tokens: larger ids"
        " have wrapped around where such a file was written; write the tokens as uint32"
    )


def in_a_process(code: str, *words: object) -> str:
    """Run Python with what other frameworks need: half of torch, warnings, loggers."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MEGATRON_WRITES = """
import sys, json, torch, numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
builder = IndexedDatasetBuilder(sys.argv[1] + ".bin", dtype=numpy.uint16)
for document in json.loads(sys.argv[2]):
    builder.add_document(torch.tensor(document), [len(document)])
builder.finalize(sys.argv[1] + ".idx")
"""
MEGATRON_READS = """
import sys, json
from megatron.core.datasets.indexed_dataset import IndexedDataset
dataset = IndexedDataset(sys.argv[1])
print(json.dumps([dataset[i].tolist() for i in range(len(dataset))]))
"""


@pytest.mark.slow
def test_megatron_core_writes_what_we_read(tmp_path: Path, tokenizer_dir: Path) -> None:
    pytest.importorskip("megatron.core")
    written = documents(20)
    in_a_process(MEGATRON_WRITES, tmp_path / "x", written)
    corpus = prepare(tmp_path, tokenizer_dir, "data=megatron", f"data.paths=['{tmp_path}/x.bin']")
    assert stream_of(corpus) == [token for document in written for token in document]
    # The same bytes as our own writer's.
    write_tokens(tmp_path / "ours", written, dtype="uint16")
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"x.{suffix}").read_bytes()
        assert (tmp_path / f"ours.{suffix}").read_bytes() == theirs


@pytest.mark.slow
def test_megatron_core_reads_what_we_write(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    import json

    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"text {number} and more of it. " * 5)
    run = compose_run(
        ["debug=smoke", "data=text", f"data.paths=['{tmp_path}/*.txt']", "data.sequence_length=16",
         f"data.cache_dir={tmp_path}/cache", "data.heldout_fraction=0.2"]
    )  # fmt: skip
    corpus = prepare_corpus(run, report=Quiet())
    folder = Path(corpus.sources[0].tokens_dir)
    read = json.loads(in_a_process(MEGATRON_READS, folder / "train-00000").splitlines()[-1])
    flat = np.fromfile(folder / "train-00000.bin", np.uint16).tolist()
    assert [token for document in read for token in document] == flat
    assert all(document[-1] == corpus.eos_id for document in read)


DATATROVE_WRITES = """
import sys, json
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer, MegatronDocumentTokenizer
folder, tokenizer, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
documents = [Document(text=text, id=str(n)) for n, text in enumerate(texts)]
options = dict(tokenizer_name_or_path=tokenizer, eos_token="</s>")
MegatronDocumentTokenizer(folder + "/megatron", **options).run(iter(documents), 0, 1)
DocumentTokenizer(folder + "/plain", local_working_dir=folder + "/tmp", shuffle_documents=False,
                  **options).run(iter(documents), 0, 1)
"""


@pytest.mark.slow
def test_datatrove_writes_what_we_read(tmp_path: Path, tokenizer_dir: Path) -> None:
    pytest.importorskip("datatrove")
    import json

    from llama_pretrain.data.tokenizer import open_tokenizer

    texts = [f"some text number {n} to learn from" for n in range(30)]
    in_a_process(DATATROVE_WRITES, tmp_path, tokenizer_dir / "tokenizer.json", json.dumps(texts))
    backend = open_tokenizer(tokenizer_dir).backend
    wanted = [id for text in texts for id in [*backend.encode(text).ids, EOS]]
    (megatron,) = (tmp_path / "megatron").glob("*.bin")
    corpus = prepare(tmp_path, tokenizer_dir, "data=megatron", f"data.paths=['{megatron}']")
    assert stream_of(corpus) == wanted
    (plain,) = (tmp_path / "plain").glob("*.ds")
    corpus = prepare(
        tmp_path, tokenizer_dir, "data=tokens", f"data.paths=['{plain}']", "data.dtype=uint16"
    )
    assert stream_of(corpus) == wanted
