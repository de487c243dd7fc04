"""From text to tokens on disk: the cache, its bytes, and what interrupts its making."""

import ast
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.tokenizer import Tokenizer as TokenizerConfig
from llama_pretrain.config.tokenizer import TokenizerName
from llama_pretrain.data import encode, gather
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.encode import encode_texts
from llama_pretrain.data.gather import pack_best_fit
from llama_pretrain.data.meta import META, Extent, cut_extents, read_meta
from llama_pretrain.data.packed import open_rows
from llama_pretrain.data.prepare import sample_texts
from llama_pretrain.data.sources import open_source
from llama_pretrain.data.tokenizer import import_tokenizer, open_tokenizer, train_tokenizer
from llama_pretrain.plan.plan import Corpus
from tests.conftest import ROOT, Quiet, compose_run


def text_run(folder: Path, *more: str, kind: str = "txt") -> Any:
    return compose_run(
        [
            "debug=smoke",
            "data=text",
            f"data.paths=['{folder}/*.{kind}']",
            f"data.cache_dir={folder}/cache",
            "data.sequence_length=16",
            "data.heldout_fraction=0.2",
            *more,
        ]
    )


def prepare(folder: Path, *more: str, kind: str = "txt") -> Corpus:
    return prepare_corpus(text_run(folder, *more, kind=kind), report=Quiet())


def folder_of(corpus: Corpus) -> Path:
    return Path(corpus.sources[0].tokens_dir)


def documents_of(corpus: Corpus, split: str) -> list[str]:
    """The texts of a split, decoded."""
    folder = folder_of(corpus)
    meta = read_meta(folder, path="data")
    tokenizer = open_tokenizer(Path(corpus.tokenizer_dir))
    tokens: list[int] = []
    for extent in meta.splits[split].extents:
        width = np.dtype(meta.dtype).itemsize
        file = folder / extent.file
        tokens += np.fromfile(file, meta.dtype, extent.tokens, offset=extent.first * width).tolist()
    texts: list[list[int]] = [[]]
    for token in tokens:
        if token == meta.eos_id:
            texts.append([])
        else:
            texts[-1].append(token)
    decoded = [tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in texts]
    return [text for text in decoded if text]


def write_texts(folder: Path, count: int) -> list[str]:
    texts = []
    for number in range(count):
        words = " ".join(f"word{number * 7 % 13} and number {n} of {number}" for n in range(40))
        (folder / f"{number:03d}.txt").write_text(f"{words}\n")
        texts.append(f"{words}\n")
    return texts


def hash_folder(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.*"))
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts and shards out of little text."""
    monkeypatch.setattr(encode, "PART_BYTES", 4000)
    monkeypatch.setattr(gather, "SHARD_TOKENS", 2000)


def test_every_document_once_and_shuffled(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, 60)
    corpus = prepare(tmp_path)
    train, heldout = documents_of(corpus, "train"), documents_of(corpus, "heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert train != [text for text in texts if text in train]
    other = documents_of(prepare(tmp_path, "data.shuffle_seed=5"), "train")
    assert other != train
    assert sorted(other) == sorted(train)
    as_they_come = documents_of(prepare(tmp_path, "data.shuffle_seed=null"), "train")
    assert as_they_come == [text for text in texts if text in train]


def test_the_cache_is_addressed_by_content(tmp_path: Path) -> None:
    write_texts(tmp_path, 30)
    report = Quiet()
    first = prepare_corpus(text_run(tmp_path), report=report)
    said = len(report.lines)
    assert prepare_corpus(text_run(tmp_path), report=report) == first
    assert len(report.lines) == said  # nothing was made twice
    (tmp_path / "000.txt").write_text("one other text\n" * 30)
    changed = prepare_corpus(text_run(tmp_path), report=report)
    assert changed.sources[0].data_hash != first.sources[0].data_hash
    assert folder_of(changed) != folder_of(first)


@pytest.mark.usefixtures("small_parts")
def test_parts_and_shards_change_nothing_but_their_number(tmp_path: Path) -> None:
    """In one part and one shard the same documents come in the same order."""
    write_texts(tmp_path, 60)
    many = prepare(tmp_path)
    assert len(list(folder_of(many).glob("train-*.bin"))) > 3
    shards = documents_of(many, "train"), documents_of(many, "heldout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PART_BYTES", 1 << 26)
        patch.setattr(gather, "SHARD_TOKENS", 1 << 25)
        whole = prepare(tmp_path, f"data.cache_dir={tmp_path}/other")
    assert (documents_of(whole, "train"), documents_of(whole, "heldout")) == shards


def write_lines(path: Path, count: int) -> None:
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "héllo", "漢字"]
    draw = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"{number} " + " ".join(draw.choices(words, k=draw.randrange(5, 400)))
            file.write(json.dumps({"text": text}, ensure_ascii=number % 2 == 0) + "\n")


def test_bytes_do_not_depend_on_processes(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 2500)  # 3 MB: three tasks
    hashes = []
    for processes in (1, 2, 3):
        corpus = prepare(
            tmp_path,
            f"data.prepare_processes={processes}",
            f"data.cache_dir={tmp_path}/cache{processes}",
            kind="jsonl",
        )
        hashes.append(hash_folder(folder_of(corpus)))
    assert len(hashes[0]) >= 5
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.parametrize("delimiter", [None, "<|end|>", "\\n\\n"])
def test_spans_of_files_lose_nothing(tmp_path: Path, delimiter: str | None) -> None:
    """However a file is cut into spans, each document is read once."""
    texts = [f"document {n}: " + "x" * (n % 50) for n in range(300)]
    if delimiter is None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        data = compose_run(["data=text", f"data.paths=['{path}']"]).data
    else:
        path = tmp_path / "a.txt"
        path.write_text(delimiter.replace("\\n", "\n").join(texts))
        data = compose_run(
            ["data=text", f"data.paths=['{path}']", f"data.delimiter='{delimiter}'"]
        ).data
    source = open_source(
        data, path="data", cache_dir=tmp_path / "cache", heldout=False, report=Quiet()
    )
    for target in (7, 64, 1000, 10**6):
        found = [
            record.text  # type: ignore[union-attr]
            for span in source._spans(target)
            for record in source.read(span)
        ]
        assert found == texts


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "txt.gz", "parquet"])
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    import gzip

    import pyarrow
    import zstandard
    from pyarrow import parquet

    path = tmp_path / f"a.{suffix}"
    lines = "".join(json.dumps({"body": text}) + "\n" for text in ("one", "two", "", "three"))
    content = b"one\ntwo" if suffix.startswith("txt") else lines.encode()
    if suffix == "parquet":
        table = pyarrow.table({"body": ["one", "two", None, "three"]})
        parquet.write_table(table, path, row_group_size=2)
    elif suffix.endswith("gz"):
        path.write_bytes(gzip.compress(content))
    else:
        zst = suffix.endswith("zst")
        path.write_bytes(zstandard.compress(content) if zst else content)
    field = [] if suffix == "txt.gz" else ["data.text_field=body"]
    data = compose_run(["data=text", f"data.paths=['{path}']", *field]).data
    source = open_source(
        data, path="data", cache_dir=tmp_path / "cache", heldout=False, report=Quiet()
    )
    found = [r.text for task in source.tasks() for span in task for r in source.read(span)]  # type: ignore[union-attr]
    wanted = ["one\ntwo"] if suffix == "txt.gz" else ["one", "two", "", "three"]
    assert found == wanted


def test_docstrings_are_those_that_a_whole_walk_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (Path(pytest.__file__).parents[1] / "_pytest", Path(json.__file__).parent):
        shutil.copytree(package, tmp_path / "packages" / package.name)
    (tmp_path / "packages" / "broken.py").write_text("def (")
    (tmp_path / "packages" / "gone.py").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "packages"))
    wanted = set()
    for path in (tmp_path / "packages").glob("*/**/*.py"):
        nodes = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        texts = [text for node in nodes if (text := ast.get_docstring(node)) and "\n" in text]
        wanted.add("\n\n".join(texts))
    run = compose_run(["data=docstrings"])
    source = open_source(
        run.data, path="data", cache_dir=tmp_path / "cache", heldout=False, report=Quiet()
    )
    (collected,) = (file.path for file in source.files)
    found = [json.loads(line)["text"] for line in collected.read_text().splitlines()]
    assert len(found) > 50
    assert sorted(found) == sorted(wanted - {""})


@pytest.mark.parametrize("streamed", [False, True])
def test_datasets_are_read(tmp_path: Path, streamed: bool) -> None:
    import datasets

    texts = [f"text number {n} of the dataset " * 5 for n in range(200)]
    dataset = datasets.Dataset.from_dict({"body": texts})
    if streamed:
        (tmp_path / "hub").mkdir()
        dataset.select(range(120)).to_parquet(str(tmp_path / "hub" / "train-0.parquet"))
        dataset.select(range(120, 200)).to_parquet(str(tmp_path / "hub" / "train-1.parquet"))
        folder = tmp_path / "hub"
    else:
        folder = tmp_path / "disk"
        datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder))
    run = text_run(
        tmp_path, "data=huggingface", "data.paths=[]", f"data.dataset={folder}",
        "data.text_field=body",
    )  # fmt: skip
    corpus = prepare_corpus(run, report=Quiet())
    found = documents_of(corpus, "train") + documents_of(corpus, "heldout")
    assert sorted(found) == sorted(texts)


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, 30)
    for number, text in enumerate(texts[:10]):
        (tmp_path / f"again{number}.txt").write_text(text)
    kept = prepare(tmp_path)
    assert len(documents_of(kept, "train") + documents_of(kept, "heldout")) == 40
    # Duplicates fall on one side.
    assert not set(documents_of(kept, "train")) & set(documents_of(kept, "heldout"))
    corpus = prepare(tmp_path, "data.deduplicate=true")
    assert sorted(documents_of(corpus, "train") + documents_of(corpus, "heldout")) == sorted(texts)
    assert read_meta(folder_of(corpus), path="data").notes["duplicate"] == 10


def test_heldout_documents_stay_when_the_corpus_grows(tmp_path: Path) -> None:
    def heldout(count: int) -> set[str]:
        folder = tmp_path / str(count)
        folder.mkdir()
        write_texts(folder, count)
        return set(documents_of(prepare(folder), "heldout"))

    small, large = heldout(30), heldout(60)
    assert small
    assert small <= large


def test_files_of_their_own_are_held_out(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, 10)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "v.txt").write_text("what is held out, and nothing else " * 9)
    corpus = prepare(tmp_path, f"data.heldout_paths=['{tmp_path}/val/*.txt']")
    assert sorted(documents_of(corpus, "train")) == sorted(texts)
    assert documents_of(corpus, "heldout") == ["what is held out, and nothing else " * 9]


def test_one_book_is_split_at_its_end(tmp_path: Path) -> None:
    lines = [f"line {n} of the only book\n" for n in range(400)]
    (tmp_path / "book.txt").write_text("".join(lines))
    corpus = prepare(tmp_path)
    parts = ["".join(documents_of(corpus, split)) for split in ("train", "heldout")]
    assert "".join(parts) == "".join(lines)
    assert 0.15 < len(parts[1]) / len("".join(lines)) < 0.25


def test_extents_are_cut() -> None:
    whole = [Extent(file="a", first=0, tokens=10), Extent(file="b", first=5, tokens=10)]
    assert cut_extents(whole, 12) == (
        [Extent(file="a", first=0, tokens=10), Extent(file="b", first=5, tokens=2)],
        [Extent(file="b", first=7, tokens=8)],
    )
    assert cut_extents(whole, 0) == ([], whole)


def check_packing(lengths: list[int], width: int) -> tuple[int, int]:
    """Every token is a target once, rows fit. Returns (rows, pieces that cut a document)."""
    targets = {(document, place) for document, length in enumerate(lengths) for place in
               range(1, length)}  # fmt: skip
    rows = list(pack_best_fit(lengths, width=width))
    seen: list[tuple[int, int]] = []
    for row in rows:
        assert sum(stop - start for _, start, stop in row) <= width
        for document, start, stop in row:
            seen += [(document, place) for place in range(start + 1, stop)]
    assert len(seen) == len(set(seen))
    assert set(seen) == targets
    cut = sum(start > 0 for row in rows for _, start, _ in row)
    return len(rows), cut


def test_best_fit_packing() -> None:
    # 6 and 4 fill a row of 10, 5 and 5 another, 3 stays alone.
    assert list(pack_best_fit([3, 6, 5, 4, 5], width=10)) == [
        [(1, 0, 6), (3, 0, 4)],
        [(2, 0, 5), (4, 0, 5)],
        [(0, 0, 3)],
    ]
    # A longer one is cut, and the last token of a piece is an input of the next.
    assert list(pack_best_fit([12], width=5)) == [
        [(0, 0, 5)],
        [(0, 4, 9)],
        [(0, 8, 12)],
    ]
    draw = np.random.default_rng(0)
    for width in (2, 3, 17, 129):
        lengths = draw.integers(2, 3 * width, 200).tolist()
        check_packing(lengths, width)


def test_best_fit_rows_hold_whole_documents(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * (1 + number % 5))
    corpus = prepare(tmp_path, "data.packing=best_fit", "data.sequence_length=32")
    meta = read_meta(folder_of(corpus), path="data")
    assert meta.row_tokens == 33
    assert meta.notes["padding_tokens"] > 0
    rows = open_rows(folder_of(corpus), meta, "train", sequence_length=32)
    tokenizer = open_tokenizer(Path(corpus.tokenizer_dir))
    texts = []
    for number in range(len(rows)):
        decoded = tokenizer.backend.decode(rows.row(number).tolist(), skip_special_tokens=False)
        assert decoded.endswith("</s>")
        texts += [text for text in decoded.split("</s>") if text]
    whole = {f"text {number} " * (1 + number % 5) for number in range(40)}
    assert len(texts) > 25
    assert set(texts) <= whole


def test_a_long_document_is_encoded_in_pieces(tmp_path: Path) -> None:
    """Piece by piece it has the tokens that it has as a whole."""
    text = "\n".join(f"def f{n}(x):  return x + {n} # and  some   words" for n in range(3000))
    train_tokenizer([text], vocab_size=600, target=tmp_path / "t")
    backend = open_tokenizer(tmp_path / "t").backend
    whole = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARACTERS", 5000)
        assert list(encode_texts(backend, ["short", text, "b"]))[1] == whole
        # A text without a place to cut is cut all the same.
        (ids,) = encode_texts(backend, ["x" * 20_000])
    assert backend.decode(ids) == "x" * 20_000


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    train_tokenizer(["some text to learn from"] * 5, vocab_size=300, target=tmp_path / "t")
    tokenizer = open_tokenizer(tmp_path / "t")
    (ids,) = encode_texts(tokenizer.backend, ["a </s> and [PAD]"])
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
    (ids,) = encode_texts(imported.backend, [text])
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


def test_the_tokenizer_learns_from_a_bounded_sample(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 4000)
    data = text_run(tmp_path, kind="jsonl").data
    source = open_source(
        data, path="data", cache_dir=tmp_path / "cache", heldout=False, report=Quiet()
    )
    texts = list(sample_texts([(source, 0.2)], num_bytes=500_000))
    size = sum(len(text.encode()) for text in texts)
    assert 400_000 < size < 560_000
    numbers = [int(text.split()[0]) for text in texts]
    assert numbers[-1] > 3000  # from all over the corpus
    assert len(list(sample_texts([(source, 0.2)], num_bytes=10**9))) > 3000


RUN_PREPARE = """
import sys
from llama_pretrain.data import encode, gather
from tests.conftest import Quiet
from tests.test_data_prepare import folder_of, prepare
from pathlib import Path
encode.PART_BYTES, gather.SHARD_TOKENS = 60_000, 30_000
if __name__ == "__main__":
    print(folder_of(prepare(Path(sys.argv[1]), *sys.argv[2:], kind="jsonl")))
"""


def start_prepare(tmp_path: Path, *more: str) -> "subprocess.Popen[str]":
    script = tmp_path / "prepare_it.py"
    script.write_text(RUN_PREPARE)
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(process: "subprocess.Popen[str]") -> Path:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return Path(out.split()[-1])


def killed_at_moments(tmp_path: Path, *, moments: int, processes: int) -> None:
    """Kill preparing again and again; whenever a cache is there, it is the right one."""
    write_lines(tmp_path / "a.jsonl", 2500)
    options = [f"data.prepare_processes={processes}", "tokenizer.vocab_size=300"]
    started = time.monotonic()
    reference = finish(start_prepare(tmp_path, *options, f"data.cache_dir={tmp_path}/reference"))
    whole = time.monotonic() - started
    wanted = hash_folder(reference)
    draw = random.Random(moments)
    finished = 0
    for moment in range(moments):
        cache = tmp_path / f"cache{moment}"
        # Twice the same cache: killed in what an earlier kill has left.
        for _ in range(2):
            process = start_prepare(tmp_path, *options, f"data.cache_dir={cache}")
            time.sleep(draw.uniform(0.2 * whole, 0.85 * whole))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            for folder in (cache / "tokens").glob("[!.]*"):
                finished += 1
                assert hash_folder(folder) == wanted
        assert hash_folder(
            finish(start_prepare(tmp_path, *options, f"data.cache_dir={cache}"))
        ) == (wanted)
    assert finished <= 2 * moments
    print(f"{2 * moments} kills, {finished} of them after the end")


def test_a_killed_preparing_is_gone_on_with(tmp_path: Path) -> None:
    killed_at_moments(tmp_path, moments=1, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments(tmp_path: Path, processes: int) -> None:
    killed_at_moments(tmp_path, moments=5, processes=processes)


def test_finished_parts_are_kept(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 2500)
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("llama_pretrain.data.prepare.plan_shards", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, "data.prepare_processes=1", kind="jsonl")
    report = Quiet()
    run = text_run(tmp_path, "data.prepare_processes=1", kind="jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_pretrain.data.prepare.encode_task", fail)  # nothing is left to do
        prepare_corpus(run, report=report)
    assert any("parts are encoded already" in line for line in report.lines)
    assert not list((tmp_path / "cache" / "tokens").glob(".partial*"))


def test_two_processes_do_not_build_the_same_cache(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 2500)
    both = [start_prepare(tmp_path, "data.prepare_processes=1") for _ in range(2)]
    folders = {finish(process) for process in both}
    assert len(folders) == 1
    assert (folders.pop() / META).is_file()
    assert len(list((tmp_path / "cache" / "tokens").glob("[!.]*"))) == 1


@pytest.mark.parametrize("what", ["a full disk", "a changed file"])
def test_what_is_found_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    write_texts(tmp_path, 30)
    if what == "a full disk":
        import shutil

        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=r"data\.cache_dir: preparing 0\.00 GB of text needs"):
            prepare(tmp_path)
        return
    finished = encode.encode_task

    def write_to(*work: Any) -> Any:
        (tmp_path / "003.txt").write_text("written to while it was read")
        return finished(*work)

    kept = (tmp_path / "003.txt").read_text()
    monkeypatch.setattr("llama_pretrain.data.prepare.encode_task", write_to)
    with pytest.raises(UserError, match=r"003\.txt has changed while it was read"):
        prepare(tmp_path, "data.prepare_processes=1")
    # Put back, it has the same hash; what was made of the other text must not be used.
    monkeypatch.setattr("llama_pretrain.data.prepare.encode_task", finished)
    (tmp_path / "003.txt").write_text(kept)
    corpus = prepare(tmp_path, "data.prepare_processes=1")
    assert kept in documents_of(corpus, "train") + documents_of(corpus, "heldout")


MEASURE = """
import sys, threading, time
from pathlib import Path
import numpy, tokenizers
from tests.test_data_prepare import prepare
def memory():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
if __name__ == "__main__":
    before = memory()
    prepare(Path(sys.argv[1]), *sys.argv[2:], kind="jsonl")
    print(memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", ["one long line", "many"])
def test_memory_stays_small(tmp_path: Path, make: str) -> None:
    words = " ".join(f"word{n % 997} and {n % 31}," for n in range(80_000))
    with (tmp_path / "a.jsonl").open("w") as file:
        if make == "many":
            for number in range(90):
                file.write(json.dumps({"text": f"{number} {words}"}) + "\n")
        else:
            file.write(json.dumps({"text": words * (100_000_000 // len(words) + 1)}) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > 100_000_000
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "data.prepare_processes=1",
         "tokenizer.vocab_size=400", "tokenizer.sample_bytes=1_000_000"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    above = int(done.stdout.split()[-1])
    print(f"{make}: {above / 2**20:.0f} MiB above the start")
    assert above < 1 << 30
