"""Preparing and loading data, against what a user would use instead, on the same text.

    python benchmarks/data.py

prints: preparing against the bare tokenizer and against datasets.map + group_texts, with one
process and with two; and the loader. The text is up to 30 MB of the standard library and of
docstrings of installed packages. The ways take turns, and each ratio is the median of the
rounds' ratios: the speed of a shared node may halve in a minute.
"""

import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llama_pretrain.config.compose import compose_run
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.console.data import DataReport
from llama_pretrain.data.cache import Cache
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.dataset import create_pretrain_dataset
from llama_pretrain.data.encode import BATCH_CHARACTERS
from llama_pretrain.data.loader import TrainSampler, build_loader
from llama_pretrain.data.order import SampleOrder
from llama_pretrain.data.prepare import sample_texts
from llama_pretrain.data.sources import open_source
from llama_pretrain.data.tokenizer import open_tokenizer
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import Corpus
from llama_pretrain.plan.resolve import resolve
from llama_pretrain.plan.sampling import plan_sampling

ROUNDS = 3
MAX_BYTES = 30_000_000
VOCAB_SIZE = 32_000
SEQUENCE_LENGTH = 2048
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def compose(*overrides: str) -> ResolvedRun:
    """The resolved run of some overrides."""
    return resolve(compose_run(overrides), detect_machine())


def collect(target: Path) -> int:
    """Write the text as one .jsonl, which all ways read. Returns its bytes of text."""
    cache, size = Cache(folder=Path("~/.cache/llama_pretrain").expanduser(), report=DataReport()), 0
    runs = (compose("data=stdlib"), compose("data=docstrings"))
    sources = [(open_source(run.data, path="data", cache=cache), 0.0) for run in runs]
    with target.open("w", encoding="utf-8") as out:
        for text in sample_texts(sources, num_bytes=10**12):
            if size >= MAX_BYTES:
                break
            size += len(text.encode("utf-8"))
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return size


def encode_bare(path: Path, tokenizer_dir: Path) -> float:
    """Seconds of the tokenizer: no file is read, no token is kept."""
    batches, characters = [[""]], 0  # of the size in which preparing encodes
    for line in path.open(encoding="utf-8"):
        if characters >= BATCH_CHARACTERS:
            batches.append([])
            characters = 0
        batches[-1].append(json.loads(line)["text"])
        characters += len(batches[-1][-1])
    backend = open_tokenizer(tokenizer_dir).backend
    began = time.perf_counter()
    for batch in batches:
        backend.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - began


def text_run(path: Path, cache: Path, processes: int) -> ResolvedRun:
    """The run whose data is the text."""
    return compose(
        "data=text", f"data.paths=['{path}']", f"data.cache_dir={cache}",
        f"data.sequence_length={SEQUENCE_LENGTH}", f"data.prepare_processes={processes}",
        f"tokenizer.vocab_size={VOCAB_SIZE}", f"model.vocab_size={VOCAB_SIZE}",
        "model.max_position_embeddings=4096",
    )  # fmt: skip


def prepare(path: Path, cache: Path, processes: int) -> float:
    """Seconds of preparing with an existing tokenizer."""
    run = text_run(path, cache, processes)
    shutil.rmtree(cache / "tokens", ignore_errors=True)
    began = time.perf_counter()
    prepare_corpus(run, report=DataReport())
    return time.perf_counter() - began


def use_datasets(path: Path, tokenizer_dir: Path, cache: Path, processes: int) -> float:
    """Seconds of what transformers' run_clm.py does: map the tokenizer, map group_texts, save."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, model_max_length=10**9)
    shutil.rmtree(cache, ignore_errors=True)
    began = time.perf_counter()
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(cache / "loaded")
    )

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = list(itertools.chain(*batch["input_ids"]))
        starts = range(0, len(joined) - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)
        return {"input_ids": [joined[start : start + SEQUENCE_LENGTH] for start in starts]}

    options = {"batched": True, "num_proc": processes if processes > 1 else None}
    tokens = loaded.map(encode, remove_columns=["text"], **options)
    tokens.map(group_texts, **options).save_to_disk(str(cache / "saved"))
    return time.perf_counter() - began


def measure_preparing(folder: Path) -> Corpus:
    """Print a table of MB/s. Returns the corpus."""
    path = folder / "text.jsonl"
    size = collect(path)
    corpus = prepare_corpus(text_run(path, folder / "cache", 1), report=DataReport())
    tokenizer_dir = Path(corpus.tokenizer_dir)
    bare, one, both = "encode_batch_fast", "task=prepare, 1 process", "encode_batch_fast, 2 at once"
    ways: dict[str, tuple[Any, ...]] = {
        bare: (encode_bare, path, tokenizer_dir),
        one: (prepare, path, folder / "cache", 1),
        "task=prepare, 2 processes": (prepare, path, folder / "cache", 2),
        "datasets.map + group_texts, 1": (use_datasets, path, tokenizer_dir, folder / "hf", 1),
        "datasets.map + group_texts, 2": (use_datasets, path, tokenizer_dir, folder / "hf", 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, both)}
    for _ in range(ROUNDS):
        for name, (way, *arguments) in ways.items():
            # A process of its own: a tokenizer that is opened again in an old one is slower.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                seconds[name].append(pool.submit(way, *arguments).result())
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            seconds[both].append(max(pool.map(encode_bare, [path] * 2, [tokenizer_dir] * 2)) / 2)
    print(f"\npreparing {size / 1e6:.1f} MB of text, {corpus.sources[0].train_tokens:,} tokens")
    print(f"{'':36}{'MB/s':>8}{'of bare':>9}{'of 1 process':>14}")
    for name, found in seconds.items():
        speed = size / 1e6 / statistics.median(found)
        of_bare, of_one = (
            statistics.median(a / b for a, b in zip(seconds[other], found, strict=True))
            for other in (bare, one)
        )
        print(f"{name:36}{speed:8.2f}{of_bare:9.2f}{of_one:14.2f}")
    return corpus


def measure_loader(corpus: Corpus) -> None:
    """Print tokens per second of a rank's loader, with and without a document mask."""
    print(f"\nloader, sequences of {SEQUENCE_LENGTH}, micro batches of 8, one of two ranks")
    sampling = plan_sampling(compose("data=stdlib").data, global_batch_size=16)
    for mask in (False, True):
        dataset = create_pretrain_dataset(
            corpus, "train", sequence_length=SEQUENCE_LENGTH, limits=[None], document_mask=mask
        )
        order = SampleOrder(sampling, num_sequences=dataset.num_sequences, seed=1)
        rates = []
        for _ in range(ROUNDS):
            sampler = TrainSampler(
                order=order, batches=[range(400)], global_batch_size=16, rank=0, world_size=2
            )
            loader = build_loader(dataset, sampler, micro_batch_size=8, num_workers=0)
            began = time.perf_counter()
            tokens = sum(batch["input_ids"].numel() for batch in loader)
            rates.append(tokens / (time.perf_counter() - began))
        name = "with a document mask" if mask else "plain"
        print(f"{name:32}{statistics.median(rates) / 1e6:8.1f} Mtok/s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        measure_loader(measure_preparing(Path(name)))
