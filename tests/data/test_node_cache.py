"""Copies of tokens on a node's own disk."""

import multiprocessing
from pathlib import Path

import pytest

from llama_pretrain.data.dataset import create_pretrain_dataset
from llama_pretrain.data.meta import META, read_meta
from llama_pretrain.data.node_cache import copy_corpus
from llama_pretrain.plan.plan import Corpus, load_plan
from tests.conftest import Runner


def nothing() -> None:
    pass


@pytest.fixture
def tokens(runner: Runner) -> Corpus:
    return load_plan(runner("train.max_steps=1").run_dir.plan).corpus


def test_a_copy_has_the_same_sequences(tokens: Corpus, tmp_path: Path) -> None:
    beats: list[int] = []
    copied = copy_corpus(tokens, tmp_path, beat=lambda: beats.append(1))
    assert beats
    (source,) = copied.sources
    assert Path(source.tokens_dir).is_relative_to(tmp_path)
    pairs = [
        create_pretrain_dataset(each, "train", sequence_length=64, limits=[None])
        for each in (tokens, copied)
    ]
    assert len(pairs[0]) == len(pairs[1]) > 10
    for index in (0, len(pairs[0]) - 1):
        ours, theirs = (dataset[index]["input_ids"] for dataset in pairs)
        assert ours.tolist() == theirs.tolist()


def test_a_copy_is_made_once_by_several_ranks(tokens: Corpus, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tokens, tmp_path)
    ranks = [
        context.Process(target=copy_corpus, args=arguments, kwargs={"beat": nothing})
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    (source,) = copy_corpus(tokens, tmp_path, beat=nothing).sources
    files = [path for path in Path(source.tokens_dir).iterdir() if path.name != META]
    before = {path: path.stat().st_mtime_ns for path in files}
    copy_corpus(tokens, tmp_path, beat=nothing)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_copy_that_was_interrupted_is_made_again(tokens: Corpus, tmp_path: Path) -> None:
    name = tokens.sources[0].data_hash[:16]
    partial = tmp_path / "tokens" / f".partial-{name}"
    partial.mkdir(parents=True)
    (partial / "00000-train-00000.bin").write_bytes(b"torn")
    (source,) = copy_corpus(tokens, tmp_path, beat=nothing).sources
    assert not partial.exists()
    assert read_meta(Path(source.tokens_dir), path="data").data_hash == tokens.sources[0].data_hash


def test_a_copy_that_differs_is_refused(
    tokens: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_pretrain.data.node_cache.hash_file", lambda path: "0" * 64)
    with pytest.raises(OSError, match="differs from"):
        copy_corpus(tokens, tmp_path, beat=nothing)
    assert not list(tmp_path.glob("tokens/*/meta.json"))


def test_ranks_train_from_a_copy(runner: Runner, tmp_path: Path) -> None:
    plain = runner("train.max_steps=3", "launch.num_processes=2")
    copied = runner(
        "train.max_steps=3", "launch.num_processes=2", f"data.node_cache_dir={tmp_path}/node"
    )
    assert copied.losses == plain.losses
    assert len(list(tmp_path.glob("node/tokens/*/meta.json"))) == 1
