"""Unreadable documents and files: each is reported with its file and location."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.meta import read_meta
from tests.conftest import Quiet
from tests.data.corpora import data_run, folder_of, prepare, problems_of

GOOD = json.dumps({"text": "a text that is long enough for some rows " * 20}) + "\n"
LINES = "a.jsonl"


UNREADABLE = {
    b'{"body": "x", "id": 7}\n': "text_field: LINE has no field 'text' (got body, id)",
    b'{"text": 5}\n': "text_field: LINE field 'text' must be text (got int)",
    b'["text"]\n': "paths: LINE must be an object (got list)",
    b'{"text": "x\n': "paths: LINE Invalid control character at: line 1 column 12 (char 11)",
    b'{"text": "cut': "paths: LINE the last line is truncated: Unterminated string starting at:"
    " line 1 column 10 (char 9)",
    b'{"text": "caf\xe9"}\n': f"paths: a.jsonl is not UTF-8 at byte {2 * len(GOOD) + 13}: invalid"
    " continuation byte. Convert it, e.g. with iconv -t UTF-8.",
    b'{"text": "x\\ud800"}\n': "paths: LINE lone surrogate at character 1",
}


@pytest.mark.parametrize(("line", "problem"), UNREADABLE.items(), ids=str)
def test_unreadable_lines_stop_or_are_skipped(tmp_path: Path, line: bytes, problem: str) -> None:
    problem = "data." + problem.replace("LINE", "a.jsonl, line 3:")
    content = GOOD.encode() * 2 + line + (GOOD.encode() * 3 if line.endswith(b"\n") else b"")
    (tmp_path / LINES).write_bytes(content)
    assert problems_of(tmp_path, files=LINES) == [problem]
    report = Quiet()
    words = ["data.on_error=skip", "data.max_error_fraction=0.5"]
    corpus = prepare_corpus(data_run(tmp_path, *words, files=LINES), report=report)
    meta = read_meta(folder_of(corpus), path="data")
    assert meta.notes["unreadable"] == 1
    (listed,) = meta.skipped
    assert listed.replace(f"{tmp_path}/", "") in problem
    assert f"  {listed}" in report.lines
    counts = [split.documents or 0 for split in meta.splits.values()]
    assert sum(counts) == content.count(b"long enough") // 20


@pytest.mark.parametrize("processes", [1, 2])
def test_line_numbers_in_the_middle_of_a_file(tmp_path: Path, processes: int) -> None:
    """In several spans, and in another process."""
    long = json.dumps({"text": "word " * 60_000}) + "\n"
    (tmp_path / LINES).write_text(long * 9 + '{"other": 1}\n' + long)
    assert problems_of(tmp_path, f"data.prepare_processes={processes}", files=LINES) == [
        "data.text_field: a.jsonl, line 10: has no field 'text' (got other)"
    ]


def test_too_many_unreadable_documents(tmp_path: Path) -> None:
    (tmp_path / LINES).write_text(GOOD * 30 + '{"other": 1}\n' * 10)
    skip = "data.on_error=skip"
    first, *listed = problems_of(tmp_path, skip, "data.max_error_fraction=0.2", files=LINES)
    assert first.endswith("25.00% of documents are unreadable, 10 of 40 (got 0.2)")
    assert len(listed) == 10
    assert listed[0] == "data: a.jsonl, line 31: has no field 'text' (got other)"
    prepare(tmp_path, skip, "data.max_error_fraction=0.25", files=LINES)


def test_blank_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / LINES).write_text(GOOD * 3 + '{"text": " \\n"}\n\n{"text": null}\n' + GOOD)
    report = Quiet()
    prepare_corpus(data_run(tmp_path, files=LINES), report=report)
    line = f"ignored 3 blank documents (the first: {tmp_path}/a.jsonl, byte {3 * len(GOOD)})"
    assert line in report.lines
    (tmp_path / LINES).write_text('{"text": ""}\n')
    assert problems_of(tmp_path, files=LINES) == ["data: the corpus has no text (read a.jsonl)"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_compressed_files(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    content = compress("".join(f'{{"text": "{n} {n * 7919}"}}\n' for n in range(3000)).encode())
    name = f"a.jsonl.{suffix}"
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    (problem,) = problems_of(tmp_path, files=name)
    assert problem.startswith(f"data.paths: {name} is truncated: ")
    (tmp_path / name).write_bytes(b"no archive at all")
    (problem,) = problems_of(tmp_path, files=name)
    assert problem.startswith(f"data.paths: {name} cannot be decompressed: ")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    name = "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / name)
    assert problems_of(tmp_path, files=name) == [
        "data.text_field: a.parquet has no column 'text' (got body, id)"
    ]
    assert problems_of(tmp_path, "data.text_field=id", files=name) == [
        "data.text_field: a.parquet, row 0: field 'id' must be text (got int)"
    ]
    (tmp_path / name).write_bytes(b"PAR1 and no more")
    (problem,) = problems_of(tmp_path, files=name)
    assert problem.startswith("data.paths: a.parquet: ")


def test_unreadable_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"body": ["x"]})
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "disk"))
    (tmp_path / "empty").mkdir()
    words = ["data=huggingface", "data.paths=[]", f"data.dataset={tmp_path}/disk"]
    assert problems_of(tmp_path, *words) == [
        "data.text_field: disk has no column 'text' (got body)"
    ]
    assert problems_of(tmp_path, *words, "data.dataset_split=val") == [
        "data.dataset_split: disk has no split 'val' (got train)"
    ]
    (problem,) = problems_of(tmp_path, *words[:2], f"data.dataset={tmp_path}/empty")
    assert problem.startswith("data.dataset: ")
    assert "cannot be loaded: " in problem
