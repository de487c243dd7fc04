"""The data component beside what a user would take instead, on the same text.

    python benchmarks/data.py [FOLDER]

prints, in one run: preparing beside the bare tokenizer and beside datasets.map + group_texts, with
one process and with two; the loader; and the order. The text is the standard library's sources and
some docstrings of the installed packages, 30 MB in all, or FOLDER's *.txt. The ways take turns, and
each ratio is the median of the rounds' ratios: a shared machine may be twice as fast a minute on.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from llama_pretrain.config.compose import PROJECT_ROOT, compose_run
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.data.cache import Cache
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.data.encode import BATCH_CHARACTERS
from llama_pretrain.data.order import SampleOrder
from llama_pretrain.data.prepare import sample_texts
from llama_pretrain.data.sources import open_source
from llama_pretrain.data.tokenizer import open_tokenizer
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import Corpus
from llama_pretrain.plan.resolve import resolve
from llama_pretrain.plan.sampling import plan_sampling
from llama_pretrain.runs.metrics import read_metrics, steps

ROUNDS = 3
MAX_BYTES = 30_000_000
VOCABULARY = 32_000
ROW = 2048


class Quiet:
    """A report that says nothing."""

    def say(self, line: str) -> None: ...

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, text: None


def compose(*words: str) -> ResolvedRun:
    """The resolved run that overrides compose to."""
    return resolve(compose_run(words), detect_machine())


def collect(folder: Path, words: list[str]) -> tuple[Path, int]:
    """The text as one .jsonl, which all read. Returns it and its bytes of text."""
    target, size = folder / "text.jsonl", 0
    runs = [compose(*words)] if words else [compose("data=stdlib"), compose("data=docstrings")]
    with target.open("w", encoding="utf-8") as out:
        for run in runs:
            cache = Cache(folder=Path("~/.cache/llama_pretrain").expanduser(), report=Quiet())
            source = open_source(run.data, path="data", cache=cache)
            for text in sample_texts([(source, 0.0)], num_bytes=10**12):
                if not words and size >= MAX_BYTES:
                    break
                size += len(text.encode("utf-8"))
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return target, size


def read_texts(path: Path) -> list[str]:
    """All texts, in memory."""
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Texts in the batches that preparing makes of them."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def encode_bare(path: Path, tokenizer_dir: Path) -> float:
    """Seconds of the tokenizer alone: no file is read, no token is kept."""
    texts = read_texts(path)
    backend = open_tokenizer(tokenizer_dir).backend
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.perf_counter()
    for batch in batches(texts):
        backend.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - started


def prepare(path: Path, cache: Path, *, processes: int) -> tuple[float, Corpus]:
    """Seconds of preparing, the tokenizer being there, and what came out."""
    run = compose(
        "data=text", f"data.paths=['{path}']", f"data.cache_dir={cache}",
        f"data.sequence_length={ROW}", f"data.prepare_processes={processes}",
        f"tokenizer.vocab_size={VOCABULARY}", f"model.vocab_size={VOCABULARY}",
        "model.max_position_embeddings=4096",
    )  # fmt: skip
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shutil.rmtree(cache / "tokens", ignore_errors=True)
    started = time.perf_counter()
    corpus = prepare_corpus(resolve(run, detect_machine()), report=Quiet())
    return time.perf_counter() - started, corpus


def time_prepare(path: Path, cache: Path, processes: int) -> float:
    """Seconds of preparing."""
    return prepare(path, cache, processes=processes)[0]


def use_datasets(path: Path, tokenizer_dir: Path, cache: Path, processes: int) -> float:
    """Seconds of what transformers' run_clm.py does: map the tokenizer, map group_texts, save."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, model_max_length=10**9)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shutil.rmtree(cache, ignore_errors=True)
    started = time.perf_counter()
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(cache / "loaded")
    )

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [[*row, tokenizer.eos_token_id] for row in ids]}

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = list(itertools.chain(*batch["input_ids"]))
        whole = len(joined) // ROW * ROW
        return {"input_ids": [joined[i : i + ROW] for i in range(0, whole, ROW)]}

    options = {"batched": True, "num_proc": processes if processes > 1 else None}
    tokens = loaded.map(encode, remove_columns=["text"], **options)
    tokens.map(group_texts, **options).save_to_disk(str(cache / "saved"))
    return time.perf_counter() - started


def measure_preparing(path: Path, size: int, folder: Path) -> Corpus:
    """Print a table of MB/s. Returns what was prepared."""
    _, corpus = prepare(path, folder / "cache", processes=1)
    tokenizer_dir = Path(corpus.tokenizer_dir)
    ways: dict[str, tuple[Any, ...]] = {
        "encode_batch_fast alone": (encode_bare, path, tokenizer_dir),
        "task=prepare, 1 process": (time_prepare, path, folder / "cache", 1),
        "task=prepare, 2 processes": (time_prepare, path, folder / "cache", 2),
        "datasets.map + group_texts, 1": (use_datasets, path, tokenizer_dir, folder / "hf", 1),
        "datasets.map + group_texts, 2": (use_datasets, path, tokenizer_dir, folder / "hf", 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (way, *words) in ways.items():
            # A process of its own: a tokenizer that is opened again in an old one is slower.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                seconds[name].append(pool.submit(way, *words).result())
    both = seconds["encode_batch_fast alone, 2 at once"] = []
    for _ in range(ROUNDS):  # what two of this machine's cores give at best
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(encode_bare, path, tokenizer_dir) for _ in range(2)]
            both.append(max(job.result() for job in jobs) / 2)
    bare, one = seconds["encode_batch_fast alone"], seconds["task=prepare, 1 process"]

    def ratio(of: list[float], to: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(of, to, strict=True))

    print(f"\npreparing {size / 1e6:.1f} MB of text, {corpus.sources[0].train_tokens:,} tokens")
    print(f"{'':36}{'MB/s':>8}{'of bare':>9}{'of 1 process':>14}")
    for name, found in seconds.items():
        speed = size / 1e6 / statistics.median(found)
        print(f"{name:36}{speed:8.2f}{ratio(bare, found):9.2f}{ratio(one, found):14.2f}")
    return corpus


def measure_loader(corpus: Corpus) -> None:
    """Print tokens a second of a rank's loader, with and without a document mask, and of others."""
    from llama_pretrain.data.dataset import create_pretrain_dataset
    from llama_pretrain.data.loader import TrainSampler, build_loader

    run = compose("data=stdlib")
    print(f"\nloader, rows of {ROW}, micro batches of 8, one of two ranks")
    for mask in (False, True):
        dataset = create_pretrain_dataset(
            corpus, "train", sequence_length=ROW, limits=[None], document_mask=mask
        )
        sampling = plan_sampling(run.data, global_batch_size=16)
        order = SampleOrder(sampling, num_sequences=dataset.num_sequences, seed=1)
        rates = []
        for _ in range(ROUNDS):
            sampler = TrainSampler(
                order=order, batches=[range(400)], global_batch_size=16, rank=0, world_size=2
            )
            loader = build_loader(dataset, sampler, micro_batch_size=8, num_workers=0)
            started = time.perf_counter()
            tokens = sum(batch["input_ids"].numel() for batch in loader)
            rates.append(tokens / (time.perf_counter() - started))
        name = "with a document mask" if mask else "plain"
        print(f"{name:32}{statistics.median(rates) / 1e6:8.1f} Mtok/s")


def measure_default_step(corpus: Corpus, folder: Path) -> None:
    """Print the loader's time for a rank's share of a step of the default run, and of the step."""
    from llama_pretrain.data.dataset import create_pretrain_dataset
    from llama_pretrain.data.loader import TrainSampler, build_loader

    dataset = create_pretrain_dataset(corpus, "train", sequence_length=256, limits=[None])
    sampling = plan_sampling(compose("data=stdlib").data, global_batch_size=16)
    order = SampleOrder(sampling, num_sequences=dataset.num_sequences, seed=1)
    sampler = TrainSampler(
        order=order, batches=[range(500)], global_batch_size=16, rank=0, world_size=2
    )
    loader = iter(build_loader(dataset, sampler, micro_batch_size=8, num_workers=0))
    times = []
    for _ in range(500):
        started = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - started)
    command = [sys.executable, str(PROJECT_ROOT / "run.py"), "task=probe", "plan.probe_steps=8"]
    subprocess.run([*command, f"hydra.run.dir={folder}/probe"], check=True, capture_output=True)
    rows = steps(read_metrics(folder / "probe" / "metrics.jsonl"))
    step = statistics.median(16 * 256 / row.tokens_per_s for row in rows[2:])
    loading = statistics.mean(times)
    print(
        f"\na step of the default run: {loading * 1e3:.3f} ms of loading, {step * 1e3:.0f} ms in"
        f" all: {loading / step:.3%}"
    )


def measure_order(run: ResolvedRun) -> None:
    """Print the time to open an order and take a step's ids, by the number of rows."""
    print("\norder: open it and take 1,024 ids")
    for rows in (10**3, 10**6, 10**9, 10**12):
        started = time.perf_counter()
        sampling = plan_sampling(run.data, global_batch_size=1024)
        ids = SampleOrder(sampling, num_sequences=[rows], seed=1).ids(10 * rows, 1024)
        took = time.perf_counter() - started
        assert len(np.unique(ids)) <= 1024
        print(f"{rows:>17,} rows {took * 1e3:8.2f} ms")


if __name__ == "__main__":
    words = ["data=text", f"data.paths=['{sys.argv[1]}/*.txt']"] if len(sys.argv) > 1 else []
    with tempfile.TemporaryDirectory() as name:
        path, size = collect(Path(name), words)
        corpus = measure_preparing(path, size, Path(name))
        measure_loader(corpus)
        measure_default_step(corpus, Path(name))
    measure_order(compose("data=stdlib"))
