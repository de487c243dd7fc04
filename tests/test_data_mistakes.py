"""What users' files get wrong: each told with the file and the place, before anything starts."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from llama_pretrain.config.problems import UserError
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.meta import read_meta
from llama_pretrain.data.sources import list_files
from llama_pretrain.data.tokenizer import train_tokenizer
from llama_pretrain.plan.plan import Corpus, build_plan, check_corpus
from llama_pretrain.tasks.run import check_everything
from tests.conftest import Quiet, compose_run
from tests.test_wrong_configs import MACHINES

GOOD = json.dumps({"text": "a text that is long enough for some rows " * 20}) + "\n"


def run_of(folder: Path, *more: str, file: str = "a.jsonl") -> Any:
    return compose_run(
        [
            "debug=smoke",
            "data=text",
            f"data.paths=['{folder}/{file}']",
            f"data.cache_dir={folder}/cache",
            "data.sequence_length=16",
            "data.heldout_fraction=0.2",
            "data.prepare_processes=1",
            *more,
        ]
    )


def told(folder: Path, *more: str, file: str = "a.jsonl") -> list[str]:
    with pytest.raises(UserError) as caught:
        prepare_corpus(run_of(folder, *more, file=file), report=Quiet())
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param(
            b'{"body": "x", "id": 7}\n',
            "data.text_field: a.jsonl, line 3: there is no field 'text' (got body, id)",
            id="missing field",
        ),
        pytest.param(
            b'{"text": 5}\n',
            "data.text_field: a.jsonl, line 3: field 'text' holds int, not text",
            id="wrong type",
        ),
        pytest.param(
            b'["text"]\n',
            "data.paths: a.jsonl, line 3: no record with fields (got list)",
            id="no record",
        ),
        pytest.param(
            b'{"text": "x\n',
            "data.paths: a.jsonl, line 3: Invalid control character at: line 1 column 12 (char 11)",
            id="broken line",
        ),
        pytest.param(
            b'{"text": "cut',
            "data.paths: a.jsonl, line 3: the last line is cut short: Unterminated string"
            " starting at: line 1 column 10 (char 9)",
            id="truncated last line",
        ),
        pytest.param(
            b'{"text": "caf\xe9"}\n',
            f"data.paths: a.jsonl is not UTF-8 at byte {2 * len(GOOD) + 13}: invalid continuation"
            " byte; convert it, say with iconv -t UTF-8",
            id="invalid utf-8",
        ),
        pytest.param(
            b'{"text": "x\\ud800"}\n',
            "data.paths: a.jsonl, line 3: lone surrogate at character 1",
            id="lone surrogate",
        ),
    ],
)
def test_a_line_that_cannot_be_read(tmp_path: Path, line: bytes, says: str) -> None:
    content = GOOD.encode() * 2 + line + (GOOD.encode() * 3 if line.endswith(b"\n") else b"")
    (tmp_path / "a.jsonl").write_bytes(content)
    assert told(tmp_path) == [says]
    # Skipped, it is counted and listed.
    report = Quiet()
    run = run_of(tmp_path, "data.on_error=skip", "data.max_error_fraction=0.5")
    corpus = prepare_corpus(run, report=report)
    meta = read_meta(Path(corpus.sources[0].tokens_dir), path="data")
    assert meta.notes["unreadable"] == 1
    (listed,) = meta.skipped
    assert listed in f"data: {tmp_path}/{says}".replace("a.jsonl", f"{tmp_path}/a.jsonl")
    assert f"  {listed}" in report.lines
    assert (
        sum(split.documents or 0 for split in meta.splits.values())
        == content.count(b"long enough") // 20
    )


def test_lines_are_counted_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """A span of a large file doesn't begin with line 1."""
    long = json.dumps({"text": "word " * 60_000}) + "\n"
    (tmp_path / "a.jsonl").write_text(long * 9 + '{"other": 1}\n' + long)
    (problem,) = told(tmp_path)
    assert problem == "data.text_field: a.jsonl, line 10: there is no field 'text' (got other)"


def test_too_many_unreadable_documents_stop(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 30 + '{"other": 1}\n' * 10)
    run = ["data.on_error=skip", "data.max_error_fraction=0.2"]
    first, *listed = told(tmp_path, *run)
    assert first == "data.max_error_fraction: 10 of 40 documents can't be read, 25.00% (got 0.2)"
    assert len(listed) == 10
    assert listed[0] == "data: a.jsonl, line 31: there is no field 'text' (got other)"
    prepare_corpus(run_of(tmp_path, run[0], "data.max_error_fraction=0.25"), report=Quiet())


def test_blank_documents_are_counted_and_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 3 + '{"text": " \\n"}\n\n{"text": null}\n' + GOOD)
    report = Quiet()
    prepare_corpus(run_of(tmp_path), report=report)
    place = 3 * len(GOOD)
    text = f"3 blank documents are left out (one: {tmp_path}/a.jsonl, byte {place})"
    assert text in report.lines


def test_a_corpus_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    assert told(tmp_path) == ["data: the corpus has no text (read a.jsonl)"]


def test_invalid_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text\xff")
    (problem,) = told(tmp_path, file="a.txt")
    assert problem == (
        "data.paths: a.txt is not UTF-8 at byte 9: invalid start byte;"
        " convert it, say with iconv -t UTF-8"
    )


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_cut_short(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    content = compress("".join(f'{{"text": "{n} {n * 7919}"}}\n' for n in range(3000)).encode())
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(content[: len(content) // 2])
    (problem,) = told(tmp_path, file=f"a.jsonl.{suffix}")
    assert problem.startswith(f"data.paths: a.jsonl.{suffix} ")
    assert "cut short" in problem
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(b"no archive at all")
    (problem,) = told(tmp_path, file=f"a.jsonl.{suffix}")
    assert problem.startswith(f"data.paths: a.jsonl.{suffix} can't be decompressed: ")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    assert told(tmp_path, file="a.parquet") == [
        "data.text_field: a.parquet has no column 'text' (got body, id)"
    ]
    assert told(tmp_path, "data.text_field=id", file="a.parquet") == [
        "data.text_field: a.parquet, row 0: field 'id' holds int, not text"
    ]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (problem,) = told(tmp_path, file="a.parquet")
    assert problem.startswith("data.paths: a.parquet: ")


def test_a_dataset_that_is_none(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "disk"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": ["x"]})}).save_to_disk(
        str(folder)
    )
    options = ["data=huggingface", "data.paths=[]", f"data.dataset={folder}"]
    assert told(tmp_path, *options) == ["data.text_field: disk has no column 'text' (got body)"]
    assert told(tmp_path, *options, "data.dataset_split=val") == [
        "data.dataset_split: disk has no split 'val' (got train)"
    ]
    (tmp_path / "empty").mkdir()
    (problem,) = told(tmp_path, *options[:2], f"data.dataset={tmp_path}/empty")
    assert problem.startswith("data.dataset: ")
    assert "can't be loaded" in problem


def test_a_corpus_smaller_than_a_row_or_a_batch(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    (problem,) = told(tmp_path, "data.sequence_length=64")
    assert problem.startswith("data: the training text has ")
    assert "too few for one row of 64 and the token after it" in problem
    (tmp_path / "a.jsonl").write_text(GOOD * 6)
    run = run_of(tmp_path, "batch.global_batch_size=500", "batch.micro_batch_size=null")
    run, problems = check_everything(run, MACHINES["laptop"])
    assert problems == []
    corpus = prepare_corpus(run, report=Quiet())
    (problem,) = [str(problem) for problem in check_corpus(run, build_plan(run, corpus))]
    rows = corpus.train_rows
    assert problem == (
        f"data: there are {rows} rows of 16 training tokens, fewer than one global batch (got 500);"
        " give more text, shorten data.sequence_length or lower batch.global_batch_size; to train"
        f" on them all the same, set data.limit_train_rows={rows}"
    )


def test_a_mistake_is_told_from_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 3000 + '{"other": 1}\n')
    says = ["data.text_field: a.jsonl, line 3001: there is no field 'text' (got other)"]
    assert told(tmp_path, "data.prepare_processes=2") == says


def test_other_data_than_the_snapshots_is_refused(tmp_path: Path) -> None:
    corpus = prepared(tmp_path)
    run, problems = check_everything(run_of(tmp_path), MACHINES["laptop"])
    assert problems == []
    for wanted, count in ((None, 0), (corpus.content_hash, 0), ("0" * 64, 1)):
        named = replace(run, data=replace(run.data, hash=wanted))
        found = [str(p) for p in check_corpus(named, build_plan(named, corpus))]
        assert len(found) == count
    assert found[0] == (
        f"data.hash: the data and its tokenizer are {corpus.content_hash[:16]} now"
        f" (got {'0' * 16}); to train on them all the same, set data.hash=null"
    )


def prepared(tmp_path: Path, *more: str) -> Corpus:
    (tmp_path / "a.jsonl").write_text(GOOD * 6)
    return prepare_corpus(run_of(tmp_path, *more), report=Quiet())


def test_prepared_data_is_read_elsewhere(tmp_path: Path) -> None:
    corpus = prepared(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(corpus.sources[0].tokens_dir, elsewhere)
    options = ["data=prepared", f"data.paths=['{elsewhere}']", "data.cache_dir=/proc/none"]
    again = prepare_corpus(run_of(tmp_path, *options), report=Quiet())
    assert again.tokenizer_hash == corpus.tokenizer_hash
    assert again.sources[0].data_hash == corpus.sources[0].data_hash
    assert Path(again.tokenizer_dir) == elsewhere / "tokenizer"


def test_what_is_wrong_with_prepared_data(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, "data.packing=best_fit")
    folder = Path(corpus.sources[0].tokens_dir)
    options = ["data=prepared", f"data.paths=['{folder}']", "data.packing=best_fit"]
    said = [text.replace(f"{folder}", "DIR") for text in told(tmp_path, *options[:2])]
    assert said == ["data.packing: cache/tokens/" + folder.name + " is packed best_fit"
                    " (got concatenate); set it to that"]  # fmt: skip
    (problem,) = told(tmp_path, *options, "data.sequence_length=32")
    assert problem == (
        f"data.sequence_length: cache/tokens/{folder.name} is packed for rows of 16 tokens"
        " (got 32); set it to 16, or prepare the text again"
    )
    train_tokenizer(["another text"] * 5, vocab_size=300, target=tmp_path / "other")
    other = ["tokenizer=pretrained", f"tokenizer.path={tmp_path}/other"]
    (problem,) = told(tmp_path, *options, *other)
    assert f"was made with tokenizer {corpus.tokenizer_hash[:16]}, and this is " in problem
    assert problem.endswith(f"set tokenizer=pretrained tokenizer.path={folder}/tokenizer".replace(
        f"{tmp_path}/", ""))  # fmt: skip
    (folder / "train-00000.bin").write_bytes(b"\0\0")
    (problem,) = told(tmp_path, *options)
    assert "train-00000.bin has 2 bytes where" in problem
    (folder / "meta.json").write_text("{}")
    (problem,) = told(tmp_path, *options)
    assert problem.startswith(f"data.paths: cache/tokens/{folder.name}/meta.json can't be read: ")
    (folder / "meta.json").unlink()
    (problem,) = told(tmp_path, *options)
    assert problem == (
        f"data.paths: cache/tokens/{folder.name} has no meta.json: it holds no prepared data, or"
        " its making was cut short; task=prepare prints the folder that it made"
    )


def test_files_come_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.txt").write_text(name)
    files = list_files([f"{tmp_path}/c[1].txt", f"{tmp_path}/*.txt"], path="data.paths")
    assert [path.name for path in files] == ["c[1].txt", "a.txt", "b.txt"]


def mixture_of(tmp_path: Path, *more: str) -> Any:
    for name in ("a", "b"):
        lines = [
            json.dumps({"text": f"{name} {n} some text of this source " * 8}) for n in range(60)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        f"+data.sources={{{name}:{{name:text,paths:['{tmp_path}/{name}.jsonl'],weight:{weight}}}}}"
        for name, weight in (("a", 3), ("b", 1))
    ]
    return run_of(tmp_path, "data=mixture", "data.paths=[]", *words, *more)


def test_a_mixture_is_prepared_source_by_source(tmp_path: Path) -> None:
    run, problems = check_everything(mixture_of(tmp_path), MACHINES["laptop"])
    assert problems == []
    corpus = prepare_corpus(run, report=Quiet())
    plan = build_plan(run, corpus)
    assert plan.sampling.stages[0].quotas == [750, 250]
    assert plan.steps.epochs is not None
    samples = plan.steps.total * plan.batch.global_batch_size
    for source, share in zip(corpus.sources, (0.75, 0.25), strict=True):
        assert plan.steps.epochs[source.name] == pytest.approx(samples * share / source.train_rows)
    assert plan.steps.eval_rows_of == [2, 2]
    # A source's tokens are its own: other weights make nothing anew.
    report = Quiet()
    other = mixture_of(tmp_path, "data.sources.a.weight=1")
    again = prepare_corpus(check_everything(other, MACHINES["laptop"])[0], report=report)
    assert report.lines == []
    assert again.sources == corpus.sources
    assert again.content_hash == corpus.content_hash
    changed = {
        key for key in again.fingerprint if again.fingerprint[key] != corpus.fingerprint[key]
    }
    assert changed == {"data.sources.a.weight"}


def test_too_many_epochs_are_refused(tmp_path: Path) -> None:
    words = ["data.sources.b.max_epochs=2", "train.max_steps=2000"]
    run, _ = check_everything(mixture_of(tmp_path, *words), MACHINES["laptop"])
    corpus = prepare_corpus(run, report=Quiet())
    plan = build_plan(run, corpus)
    assert plan.steps.epochs is not None
    (problem,) = check_corpus(run, plan)
    assert str(problem) == (
        f"data.sources.b.max_epochs: the run would read b {plan.steps.epochs['b']:.2f} times"
        " (got 2); lower its weight, or shorten the run"
    )
