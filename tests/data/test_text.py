"""Every kind of source is read, and no span loses a document."""

import ast
import gzip
import json
import shutil
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from llama_pretrain.data.sources import list_files
from tests.data.corpora import documents_of, prepare, read_all, source_of


@pytest.mark.parametrize("delimiter", [None, "<|end|>", "\\n\\n"])
def test_spans_lose_no_document(tmp_path: Path, delimiter: str | None) -> None:
    texts = [f"document {n}: " + "x" * (n % 50) for n in range(300)]
    if delimiter is None:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "a.jsonl").write_text(lines)
        source = source_of(tmp_path, files="a.jsonl")
    else:
        (tmp_path / "a.txt").write_text(delimiter.replace("\\n", "\n").join(texts))
        source = source_of(tmp_path, f"data.delimiter='{delimiter}'")
    for target in (7, 64, 1000, 10**6):
        assert read_all(source, target) == texts


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "txt.gz", "parquet"])
def test_every_type_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    texts = ["one\ntwo"] if suffix == "txt.gz" else ["one", "two", "", "three"]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    content = (texts[0] if suffix == "txt.gz" else lines).encode()
    if suffix == "parquet":
        table = pyarrow.table({"body": [text or None for text in texts]})
        parquet.write_table(table, path, row_group_size=2)
    elif suffix.endswith("gz"):
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(zstandard.compress(content) if suffix.endswith("zst") else content)
    assert read_all(source_of(tmp_path, "data.text_field=body", files=path.name)) == texts


@pytest.mark.parametrize("streamed", [False, True])
def test_datasets(tmp_path: Path, streamed: bool) -> None:
    texts = [f"text number {n} of the dataset " * 5 for n in range(200)]
    dataset = datasets.Dataset.from_dict({"body": texts})
    if streamed:
        (tmp_path / "data").mkdir()
        dataset.select(range(120)).to_parquet(str(tmp_path / "data" / "train-0.parquet"))
        dataset.select(range(120, 200)).to_parquet(str(tmp_path / "data" / "train-1.parquet"))
    else:
        datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "data"))
    words = ["data=huggingface", "data.paths=[]", "data.text_field=body"]
    corpus = prepare(tmp_path, *words, f"data.dataset={tmp_path}/data")
    assert sorted(documents_of(corpus)) == sorted(texts)


def test_docstrings_equal_those_of_a_full_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    for package in (Path(pytest.__file__).parents[1] / "_pytest", Path(json.__file__).parent):
        shutil.copytree(package, packages / package.name)
    (packages / "broken.py").write_text("def (")
    (packages / "gone.py").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(packages))
    expected = set()
    for path in packages.glob("*/**/*.py"):
        nodes = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        texts = [text for node in nodes if (text := ast.get_docstring(node)) and "\n" in text]
        expected.add("\n\n".join(texts))
    found = read_all(source_of(tmp_path, "data=docstrings", "data.paths=[]"))
    assert len(found) > 50
    assert sorted(found) == sorted(expected - {""})


def test_files_are_listed_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.txt").write_text(name)
    files = list_files([f"{tmp_path}/c[1].txt", f"{tmp_path}/*.txt"], path="data.paths")
    assert [path.name for path in files] == ["c[1].txt", "a.txt", "b.txt"]
