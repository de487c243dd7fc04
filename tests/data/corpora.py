"""Small corpora for tests: written, prepared in this process, and read back."""

import hashlib
import json
import random
import shlex
from pathlib import Path

import numpy as np
import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.data.cache import Cache
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.meta import read_meta
from llama_pretrain.data.read import Document
from llama_pretrain.data.sources import open_source
from llama_pretrain.data.text import TextSource
from llama_pretrain.data.tokenizer import open_tokenizer
from llama_pretrain.plan.plan import Corpus
from llama_pretrain.plan.resolve import resolve
from tests.conftest import Quiet, compose_run
from tests.machines import LAPTOP

GOLDEN = Path(__file__).parent / "golden"


def data_run(folder: Path, *overrides: str, files: str = "*.txt") -> ResolvedRun:
    """A run on files of a folder, with a cache of its own."""
    words = shlex.split(
        f"debug=smoke data=text data.paths=['{folder}/{files}'] data.cache_dir={folder}/cache"
        " data.sequence_length=16 data.heldout_fraction=0.2 data.prepare_processes=1"
    )
    return resolve(compose_run([*words, *overrides]), LAPTOP)


def prepare(folder: Path, *overrides: str, files: str = "*.txt") -> Corpus:
    return prepare_corpus(data_run(folder, *overrides, files=files), report=Quiet())


def problems_of(folder: Path, *overrides: str, files: str = "*.txt") -> list[str]:
    """The problems that preparing reports, with paths relative to the folder."""
    with pytest.raises(UserError) as caught:
        prepare(folder, *overrides, files=files)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def source_of(folder: Path, *overrides: str, files: str = "*.txt") -> TextSource:
    data = data_run(folder, *overrides, files=files).data
    return open_source(data, path="data", cache=Cache(folder=folder / "cache", report=Quiet()))


def read_all(source: TextSource, target: int | None = None) -> list[str]:
    """Every document, blank ones included, in spans of `target` bytes."""
    tasks = source.tasks() if target is None else [source.spans(target)]
    records = [record for spans in tasks for span in spans for record in source.read(span)]
    return [record.text for record in records if isinstance(record, Document)]


def folder_of(corpus: Corpus) -> Path:
    return Path(corpus.sources[0].tokens_dir)


def tokens_of(corpus: Corpus, *splits: str) -> list[int]:
    """The tokens of a source's splits."""
    folder = folder_of(corpus)
    meta = read_meta(folder, path="data")
    tokens: list[int] = []
    for split in splits or ("train", "heldout"):
        for extent in meta.splits[split].extents:
            content = np.fromfile(folder / extent.file, meta.dtype)
            tokens += content[extent.first : extent.first + extent.tokens].tolist()
    return tokens


def documents_of(corpus: Corpus, *splits: str) -> list[str]:
    """The texts of a source's splits, decoded."""
    backend = open_tokenizer(Path(corpus.tokenizer_dir)).backend
    documents: list[list[int]] = [[]]
    for token in tokens_of(corpus, *splits):
        if token == corpus.eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [backend.decode(ids, skip_special_tokens=False) for ids in documents if ids]


def write_texts(folder: Path, count: int) -> list[str]:
    """Write `count` files of one document."""
    texts = []
    for number in range(count):
        words = " ".join(f"word{number * 7 % 13} and number {n} of {number}" for n in range(40))
        texts.append(f"{words}\n")
        (folder / f"{number:03d}.txt").write_text(texts[-1])
    return texts


def write_lines(path: Path, count: int) -> None:
    """Write JSON lines of about 1,200 bytes."""
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "héllo", "漢字"]
    draw = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"{number} " + " ".join(draw.choices(words, k=draw.randrange(5, 400)))
            file.write(json.dumps({"text": text}, ensure_ascii=number % 2 == 0) + "\n")


def hash_folder(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.*"))
    }
