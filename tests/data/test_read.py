"""Unreadable documents and files: each is reported with its file and location."""

import gzip
import json
import os
import resource
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from llama_pretrain.data import read
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.meta import read_meta
from tests.conftest import Quiet
from tests.data.corpora import data_run, documents_of, folder_of, prepare, problems_of

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


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_line_that_is_nested_too_deeply(tmp_path: Path, on_error: str) -> None:
    deep = '{"text": "x", "other": ' + "[" * 200_000 + "]" * 200_000 + "}\n"
    (tmp_path / LINES).write_text(GOOD * 40 + deep)
    words = [f"data.on_error={on_error}", "data.max_error_fraction=0.5"]
    problem = "a.jsonl, line 41: is nested too deeply"
    if on_error == "stop":
        assert problems_of(tmp_path, *words, files=LINES) == [f"data.paths: {problem}"]
        return
    corpus = prepare_corpus(data_run(tmp_path, *words, files=LINES), report=Quiet())
    assert read_meta(folder_of(corpus), path="data").skipped == [f"{tmp_path}/{problem}"]


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", GOOD.encode() * 30),
        ("a.txt", b"a text that is long enough for some sequences " * 200),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 30)),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    read_back = []
    for marked in (False, True):
        folder = tmp_path / str(marked)
        folder.mkdir()
        plain = gzip.decompress(content) if name.endswith("gz") else content
        whole = BOM + plain if marked else plain
        (folder / name).write_bytes(gzip.compress(whole) if name.endswith("gz") else whole)
        corpus = prepare(folder, "data.heldout_fraction=0.2", files=name)
        read_back.append(documents_of(corpus))
    assert read_back[0] == read_back[1]
    assert len(read_back[0]) > 0


def test_marks_between_concatenated_files(tmp_path: Path) -> None:
    line = GOOD.encode()
    (tmp_path / LINES).write_bytes((BOM + line * 10) * 3 + BOM)
    assert prepare(tmp_path, files=LINES).sources[0].train_tokens > 0


def test_a_file_that_decompresses_to_too_long_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read in blocks, named with its place, and what follows it is read."""
    monkeypatch.setattr(read, "MAX_LINE_BYTES", 1 << 21)
    bomb = b'{"text": "' + b"x" * (1 << 25) + b'"}\n'
    content = GOOD.encode() * 40 + bomb + GOOD.encode() * 3
    for suffix, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        name = f"a.jsonl.{suffix}"
        (tmp_path / name).write_bytes(compress(content))
        place = f"{name}, line 41: has more than 2 MiB (at byte {40 * len(GOOD)})"
        tracemalloc.start()
        assert problems_of(tmp_path, files=name) == [f"data.paths: {place}"]
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()
        words = ["data.on_error=skip", "data.max_error_fraction=0.5"]
        meta = read_meta(folder_of(prepare(tmp_path, *words, files=name)), path="data")
        assert sum(split.documents or 0 for split in meta.splits.values()) == 43


def test_memory_is_bounded_while_a_frame_is_decompressed(tmp_path: Path) -> None:
    """288 KB that become 9 GiB: what is read stays small."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with read.open_binary(path) as file:
        for _ in range(20):
            assert len(file.read(1 << 20)) == 1 << 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 << 10  # KiB


def test_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(GOOD.encode() * 30))
    assert prepare(tmp_path, files="a.jsonl.zst").sources[0].train_tokens > 0


def test_links_are_judged_by_their_own_names(tmp_path: Path) -> None:
    """As in a hub's cache, where they point to files without a suffix."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f1e").write_text(GOOD * 30)
    (tmp_path / LINES).symlink_to("blobs/0f1e")
    assert prepare(tmp_path, files=LINES).sources[0].train_tokens > 0
    (tmp_path / "b.jsonl").symlink_to("blobs/gone")
    dead = "data.paths: b.jsonl is a dead link to blobs/gone"
    assert problems_of(tmp_path, files="*.jsonl") == [dead]
    assert problems_of(tmp_path, files="b.jsonl") == [dead]
    os.mkfifo(tmp_path / "c.jsonl")
    fifo = "data.paths: c.jsonl is not a regular file"
    assert problems_of(tmp_path, files="c*.jsonl") == [fifo]
