"""From text to tokens in the cache: their bytes, and what interrupts their preparation."""

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

import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.data import encode, gather
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.meta import META, read_meta
from tests.conftest import ROOT, Quiet
from tests.data import corpora
from tests.data.corpora import data_run, documents_of, folder_of, hash_folder, prepare, write_texts


def write_lines(folder: Path) -> None:
    """a.jsonl, of 3 MB: several tasks."""
    corpora.write_lines(folder / "a.jsonl", 2500)


def test_every_document_once_and_shuffled(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, 60)
    corpus = prepare(tmp_path)
    train, heldout = documents_of(corpus, "train"), documents_of(corpus, "heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert train != [text for text in texts if text in train]
    other = documents_of(prepare(tmp_path, "data.shuffle_seed=5"), "train")
    assert other != train
    assert sorted(other) == sorted(train)
    unshuffled = documents_of(prepare(tmp_path, "data.shuffle_seed=null"), "train")
    assert unshuffled == [text for text in texts if text in train]


def test_the_cache_is_addressed_by_content(tmp_path: Path) -> None:
    write_texts(tmp_path, 30)
    report = Quiet()
    first = prepare_corpus(data_run(tmp_path), report=report)
    num_lines = len(report.lines)
    assert prepare_corpus(data_run(tmp_path), report=report) == first
    assert len(report.lines) == num_lines  # nothing was prepared again
    (tmp_path / "000.txt").write_text("one other text\n" * 30)
    changed = prepare(tmp_path)
    assert changed.sources[0].data_hash != first.sources[0].data_hash
    assert folder_of(changed) != folder_of(first)


def test_parts_and_shards_do_not_change_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path, 60)
    whole = prepare(tmp_path)
    monkeypatch.setattr(encode, "PART_BYTES", 4000)
    monkeypatch.setattr(gather, "SHARD_TOKENS", 2000)
    many = prepare(tmp_path, f"data.cache_dir={tmp_path}/other")
    assert len(list(folder_of(many).glob("train-*.bin"))) > 3
    for split in ("train", "heldout"):
        assert documents_of(many, split) == documents_of(whole, split)


def test_bytes_do_not_depend_on_processes(tmp_path: Path) -> None:
    write_lines(tmp_path)
    hashes = []
    for processes in (1, 3):
        words = [f"data.prepare_processes={processes}", f"data.cache_dir={tmp_path}/{processes}"]
        hashes.append(hash_folder(folder_of(prepare(tmp_path, *words, files="a.jsonl"))))
    assert len(hashes[0]) >= 5
    assert hashes[0] == hashes[1]


def test_duplicates(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, 30)
    for number, text in enumerate(texts[:10]):
        (tmp_path / f"again{number}.txt").write_text(text)
    both = prepare(tmp_path)
    assert len(documents_of(both)) == 40
    assert not set(documents_of(both, "train")) & set(documents_of(both, "heldout"))
    corpus = prepare(tmp_path, "data.deduplicate=true")
    assert sorted(documents_of(corpus)) == sorted(texts)
    assert read_meta(folder_of(corpus), path="data").notes["duplicate"] == 10


def test_heldout_documents_remain_when_the_corpus_grows(tmp_path: Path) -> None:
    heldout = []
    for count in (30, 60):
        write_texts(tmp_path, count)
        heldout.append(set(documents_of(prepare(tmp_path), "heldout")))
    assert set() < heldout[0] <= heldout[1]


def test_heldout_files(tmp_path: Path) -> None:
    texts, heldout = write_texts(tmp_path, 10), "what is held out, and nothing else " * 9
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "v.txt").write_text(heldout)
    corpus = prepare(tmp_path, f"data.heldout_paths=['{tmp_path}/val/*.txt']")
    assert sorted(documents_of(corpus, "train")) == sorted(texts)
    assert documents_of(corpus, "heldout") == [heldout]


def test_a_single_book_is_split_near_its_end(tmp_path: Path) -> None:
    book = "".join(f"line {n} of the only book\n" for n in range(400))
    (tmp_path / "book.txt").write_text(book)
    corpus = prepare(tmp_path)
    train, heldout = ("".join(documents_of(corpus, split)) for split in ("train", "heldout"))
    assert train + heldout == book
    assert 0.15 < len(heldout) / len(book) < 0.25


PREPARE = """
import sys
from pathlib import Path
from llama_pretrain.data import encode, gather
from tests.data.corpora import folder_of, prepare
encode.PART_BYTES, gather.SHARD_TOKENS = 60_000, 30_000
if __name__ == "__main__":
    print(folder_of(prepare(Path(sys.argv[1]), *sys.argv[2:], files="a.jsonl")))
"""


def start_prepare(tmp_path: Path, *words: str, code: str = PREPARE) -> "subprocess.Popen[str]":
    script, pipe = tmp_path / "script.py", subprocess.PIPE
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path), *words]
    values = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=values)


def finish(process: "subprocess.Popen[str]") -> str:
    """The last word that it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.split()[-1]


@pytest.mark.parametrize(
    ("moments", "processes"),
    [(1, 2), *(pytest.param(5, n, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_kills_at_random_moments(tmp_path: Path, moments: int, processes: int) -> None:
    """Whatever is interrupted, a cache that is complete is correct."""
    write_lines(tmp_path)
    options = [f"data.prepare_processes={processes}", "tokenizer.vocab_size=300"]
    started = time.monotonic()
    reference = finish(start_prepare(tmp_path, *options, f"data.cache_dir={tmp_path}/reference"))
    duration = time.monotonic() - started
    expected = hash_folder(Path(reference))
    draw = random.Random(moments)
    for moment in range(moments):
        cache = tmp_path / f"cache{moment}"
        words = [*options, f"data.cache_dir={cache}"]
        for _ in range(2):  # the second kill hits what the first one has left
            process = start_prepare(tmp_path, *words)
            time.sleep(draw.uniform(0.2 * duration, 0.85 * duration))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            for folder in (cache / "tokens").glob("[!.]*"):
                assert hash_folder(folder) == expected
        assert hash_folder(Path(finish(start_prepare(tmp_path, *words)))) == expected


def fail(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_completed_tasks_and_parts_are_not_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path)
    reference = prepare(tmp_path, f"data.cache_dir={tmp_path}/reference", files="a.jsonl")
    monkeypatch.setattr(encode, "PART_BYTES", 300_000)
    encode_part = encode._encode_part
    with monkeypatch.context() as patch:
        patch.setattr("llama_pretrain.data.encode.write_json", fail)  # a task has its parts
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, files="a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("llama_pretrain.data.prepare.plan_shards", fail)
        written: list[Path] = []

        def encode_and_count(*args: Any, **options: Any) -> Any:
            index = encode_part(*args, **options)
            written.extend([args[3]] * (len(index) > 0))
            return index

        patch.setattr(encode, "_encode_part", encode_and_count)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, files="a.jsonl")
        assert {path.name[:6] for path in written} == {"000001", "000002", "000003"}
    report = Quiet()
    monkeypatch.setattr("llama_pretrain.data.prepare.encode_task", fail)
    corpus = prepare_corpus(data_run(tmp_path, files="a.jsonl"), report=report)
    assert "resuming: 4 of 4 tasks are already encoded" in report.lines
    assert documents_of(corpus) == documents_of(reference)
    assert not list((tmp_path / "cache" / "tokens").glob(".partial*"))


def test_two_processes_do_not_prepare_the_same_data(tmp_path: Path) -> None:
    write_lines(tmp_path)
    (folder,) = {finish(process) for process in [start_prepare(tmp_path) for _ in range(2)]}
    assert Path(folder, META).is_file()
    assert len(list((tmp_path / "cache" / "tokens").glob("[!.]*"))) == 1


def test_a_full_disk_is_found_before_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path, 30)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"data\.cache_dir: preparing 0\.00 GB of text requires"):
        prepare(tmp_path)


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path, 30)
    file = tmp_path / "003.txt"
    content, encode_task = file.read_text(), encode.encode_task

    def change_and_encode(*args: Any) -> Any:
        file.write_text("written to while it was read")
        return encode_task(*args)

    with monkeypatch.context() as patch:
        patch.setattr("llama_pretrain.data.prepare.encode_task", change_and_encode)
        with pytest.raises(UserError, match=r"003\.txt changed while it was read"):
            prepare(tmp_path)
    # Restored, it has the same hash, but the tokens of the other text must not be used.
    file.write_text(content)
    assert content in documents_of(prepare(tmp_path))


MEASURE = """
import sys
from pathlib import Path
import numpy, tokenizers
from tests.data.corpora import prepare
def memory():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
if __name__ == "__main__":
    before = memory()
    prepare(Path(sys.argv[1]), *sys.argv[2:], files="a.jsonl")
    print(memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("documents", [1, 90])
def test_memory_is_bounded(tmp_path: Path, documents: int) -> None:
    words = " ".join(f"word{n % 997} and {n % 31}," for n in range(80_000))
    text = words * (1 if documents > 1 else 100_000_000 // len(words) + 1)
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(documents):
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > 100_000_000
    options = ["tokenizer.vocab_size=400", "tokenizer.sample_bytes=1_000_000"]
    assert int(finish(start_prepare(tmp_path, *options, code=MEASURE))) < 1 << 30
