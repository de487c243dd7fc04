"""Existing tokens: read where they are, as other libraries wrote them, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_pretrain.data.tokenizer import train_tokenizer
from llama_pretrain.plan.plan import Corpus
from tests.conftest import write_tokens
from tests.data import corpora
from tests.data.corpora import GOLDEN, folder_of, problems_of, tokens_of

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tokenizer of 275 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(["some text to learn from"] * 5, vocab_size=300, target=folder)
    return ["tokenizer=pretrained", f"tokenizer.path={folder}"]


def prepare(folder: Path, file: Path, tokenizer: list[str], *overrides: str) -> Corpus:
    kind = "megatron" if file.suffix == ".bin" else "tokens"
    dtype = [] if kind == "megatron" else ["data.dtype=uint16"]
    words = [f"data={kind}", f"data.paths=['{file}']", *dtype, *tokenizer, *overrides]
    return corpora.prepare(folder, *words)


def read_golden(name: str) -> list[list[int]]:
    documents: list[list[int]] = json.loads((GOLDEN / f"{name}.json").read_text())
    return documents


@pytest.mark.parametrize("name", ["megatron_core.bin", "datatrove.bin", "datatrove.ds"])
def test_files_of_other_libraries(tmp_path: Path, tokenizer: list[str], name: str) -> None:
    expected = [token for document in read_golden(name.partition(".")[0]) for token in document]
    corpus = prepare(tmp_path, GOLDEN / name, tokenizer)
    assert tokens_of(corpus) == expected
    source = corpus.sources[0]
    assert source.heldout_sequences == (len(expected) - int(len(expected) * 0.8) - 1) // 16
    assert source.heldout_bytes_per_token > 0.3
    assert not list(folder_of(corpus).glob("*.bin"))


@pytest.mark.parametrize("name", ["megatron_core", "datatrove"])
def test_our_writer_writes_the_same_bytes(tmp_path: Path, name: str) -> None:
    write_tokens(tmp_path / "x", read_golden(name), dtype="uint16")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"x.{suffix}").read_bytes() == (GOLDEN / f"{name}.{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_headerless_files(tmp_path: Path, tokenizer: list[str], dtype: str) -> None:
    tokens = np.concatenate([np.array(ids) for ids in read_golden("megatron_core")])
    tokens.astype(dtype).tofile(tmp_path / "train.ids")
    tokens[:200].astype(dtype).tofile(tmp_path / "val.ids")
    heldout = f"data.heldout_paths=['{tmp_path}/val.ids']"
    corpus = prepare(tmp_path, tmp_path / "train.ids", tokenizer, f"data.dtype={dtype}", heldout)
    assert tokens_of(corpus, "train") == tokens.tolist()
    assert tokens_of(corpus, "heldout") == tokens[:200].tolist()


def test_invalid_headerless_files(tmp_path: Path, tokenizer: list[str]) -> None:
    file = tmp_path / "x.bin"
    words = ["data=tokens", f"data.paths=['{file}']", "data.dtype=uint16", *tokenizer]
    for content, message in (
        (b"12345", "x.bin must have a multiple of 2 bytes for uint16 (got 5). The file may be"),
        (
            np.array([5, 6, 300], dtype=np.uint16).tobytes(),
            "x.bin: token 2 must be below the tokenizer's size 275 (got 300). Use the tokenizer",
        ),
        (b"\x93NUMPY" + bytes(6), "x.bin is a .npy array with a header"),
        (np.array([20240520, 1], dtype=np.int32).tobytes(), "x.bin begins with llm.c's header"),
    ):
        file.write_bytes(content)
        (problem,) = problems_of(tmp_path, *words)
        assert problem.startswith(f"data.paths: {message}")


def test_invalid_megatron_files(tmp_path: Path, tokenizer: list[str]) -> None:
    file, index = tmp_path / "x.bin", tmp_path / "x.idx"

    def problem() -> str:
        (found,) = problems_of(tmp_path, "data=megatron", f"data.paths=['{file}']", *tokenizer)
        return found

    write_tokens(tmp_path / "x", read_golden("megatron_core"), dtype="uint16")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-2])
    text = f"x.bin must have {size:,} bytes according to its index (got {size - 2:,}). The file"
    assert text in problem()
    write_tokens(tmp_path / "x", [[5, 6], [7, EOS]], dtype="uint16")
    text = "documents must end with the tokenizer's end-of-text token 2 (got 6 in 1 of the first 2)"
    assert f"data.paths: x.bin: {text}. Use the tokenizer that made the tokens" in problem()
    for content, text in (
        (index.read_bytes()[:40], "x.idx is truncated"),
        (b"something else", "x.idx is not a Megatron index"),
    ):
        index.write_bytes(content)
        assert text in problem()
    index.unlink()
    assert "x.bin requires x.idx beside it" in problem()


def test_a_vocabulary_above_the_dtype(tmp_path: Path) -> None:
    vocabulary = {f"w{n}": n for n in range(70_000)} | {"</s>": 70_000}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    (tmp_path / "t").mkdir()
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "x.bin")
    words = ["data=tokens", f"data.paths=['{tmp_path}/x.bin']", "data.dtype=uint16"]
    words += ["tokenizer=pretrained", f"tokenizer.path={tmp_path}/t"]
    (problem,) = problems_of(tmp_path, *words, "model.resize_embeddings=true")
    text = "data.dtype: uint16 holds ids up to 65,535, but the tokenizer has 70,001 tokens: larger"
    assert problem.startswith(text)
