"""The corpus of a run: its size, prepared directories, mixtures, and what the plan checks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.tokenizer import train_tokenizer
from llama_pretrain.plan.plan import Corpus, build_training_plan, validate_corpus
from tests.conftest import Quiet
from tests.data.corpora import data_run, folder_of, prepare, problems_of

TEXT = "a text that is long enough for some sequences " * 20
FILES = "a.jsonl"


def prepared(folder: Path, *overrides: str) -> Corpus:
    (folder / FILES).write_text((json.dumps({"text": TEXT}) + "\n") * 6)
    return prepare(folder, *overrides, files=FILES)


def plan_problems(run: ResolvedRun, corpus: Corpus) -> list[str]:
    return [str(problem) for problem in validate_corpus(run, build_training_plan(run, corpus))]


def test_a_corpus_shorter_than_a_sequence_or_a_batch(tmp_path: Path) -> None:
    (tmp_path / FILES).write_text(json.dumps({"text": "a few words"}) + "\n")
    (problem,) = problems_of(tmp_path, "data.sequence_length=64", files=FILES)
    assert problem.startswith("data: the training text must have at least 65 tokens (got ")
    words = ["batch.global_batch_size=500", "batch.micro_batch_size=null"]
    corpus = prepared(tmp_path, *words)
    sequences = corpus.train_sequences
    (problem,) = plan_problems(data_run(tmp_path, *words, files=FILES), corpus)
    text = f"data: has {sequences} sequences of 16 training tokens, fewer than one global batch"
    assert problem.startswith(f"{text} (got 500). ")
    assert problem.endswith(f"to train on them anyway, set data.limit_train_sequences={sequences}.")


def test_data_other_than_the_snapshots_is_refused(tmp_path: Path) -> None:
    corpus, run = prepared(tmp_path), data_run(tmp_path, files=FILES)
    for expected in (None, corpus.content_hash):
        assert not plan_problems(replace(run, data=replace(run.data, hash=expected)), corpus)
    (problem,) = plan_problems(replace(run, data=replace(run.data, hash="0" * 64)), corpus)
    assert problem == (
        f"data.hash: the data and its tokenizer are now {corpus.content_hash[:16]}"
        f" (got {'0' * 16}). To train on them anyway, set data.hash=null."
    )


def test_prepared_data_is_read_elsewhere(tmp_path: Path) -> None:
    corpus, elsewhere = prepared(tmp_path), tmp_path / "elsewhere"
    shutil.copytree(folder_of(corpus), elsewhere)
    words = ["data=prepared", f"data.paths=['{elsewhere}']", "data.cache_dir=/proc/none"]
    again = prepare(tmp_path, *words)
    assert again.tokenizer_hash == corpus.tokenizer_hash
    assert again.sources[0].data_hash == corpus.sources[0].data_hash
    assert Path(again.tokenizer_dir) == elsewhere / "tokenizer"


def test_invalid_prepared_data(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, "data.packing=best_fit")
    folder = folder_of(corpus)
    name = f"cache/tokens/{folder.name}"

    def problem(*overrides: str) -> str:
        words = ["data=prepared", f"data.paths=['{folder}']", "data.packing=best_fit"]
        (found,) = problems_of(tmp_path, *words, *overrides)
        return found

    for key, value, own in (("packing", "concatenate", "best_fit"), ("sequence_length", 32, 16)):
        text = f"data.{key}: must be {own}, with which {name} was prepared (got {value}). Set it"
        assert problem(f"data.{key}={value}") == f"{text} to {own}."
    train_tokenizer(["another text"] * 5, vocab_size=300, target=tmp_path / "other")
    message = problem("tokenizer=pretrained", f"tokenizer.path={tmp_path}/other")
    assert f"must be {corpus.tokenizer_hash[:16]}, with which {name} was prepared" in message
    assert message.endswith(f"Set tokenizer=pretrained tokenizer.path={name}/tokenizer.")
    (folder / "train-00000.bin").write_bytes(b"\0\0")
    assert "train-00000.bin must have at least " in problem()
    (folder / "meta.json").write_text("{}")
    assert problem().startswith(f"data.paths: {name}/meta.json is not valid: ")
    (folder / "meta.json").unlink()
    assert problem().startswith(f"data.paths: {name} has no meta.json: it is not a complete")


def mixture_run(folder: Path, *overrides: str) -> ResolvedRun:
    words = []
    for name, weight in (("a", 3), ("b", 1)):
        texts = [f"{name} {n} some text of this source " * 8 for n in range(60)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        source = f"{{name:text,paths:['{folder}/{name}.jsonl'],weight:{weight}}}"
        words.append(f"+data.sources={{{name}:{source}}}")
    return data_run(folder, "data=mixture", "data.paths=[]", *words, *overrides)


def test_the_sources_of_a_mixture_are_prepared_separately(tmp_path: Path) -> None:
    run = mixture_run(tmp_path)
    corpus = prepare_corpus(run, report=Quiet())
    plan = build_training_plan(run, corpus)
    assert plan.sampling.stages[0].quotas == [750, 250]
    samples = plan.steps.total * plan.batch.global_batch_size
    for source, share in zip(corpus.sources, (0.75, 0.25), strict=True):
        epochs = samples * share / source.train_sequences
        assert plan.steps.epochs[source.name] == pytest.approx(epochs)
    assert plan.steps.eval_sequences_by_source == [2, 2]
    report = Quiet()
    again = prepare_corpus(mixture_run(tmp_path, "data.sources.a.weight=1"), report=report)
    assert report.lines == []  # other weights need no other tokens
    assert again.sources == corpus.sources
    assert again.content_hash == corpus.content_hash
    old, new = corpus.fingerprint, again.fingerprint
    assert {key for key in new if new[key] != old[key]} == {"data.sources.a.weight"}


def test_max_epochs(tmp_path: Path) -> None:
    run = mixture_run(tmp_path, "data.sources.b.max_epochs=2", "train.max_steps=2000")
    corpus = prepare_corpus(run, report=Quiet())
    epochs = build_training_plan(run, corpus).steps.epochs["b"]
    (problem,) = plan_problems(run, corpus)
    text = f"data.sources.b.max_epochs: the run would read b {epochs:.2f} times (got 2). Lower its"
    assert problem.startswith(text)
