"""Preparing and loading data, against what a user would use instead, on the same text.

    python benchmarks/data.py [FOLDER]

prints: preparing against the bare tokenizer and against datasets.map + group_texts, with one
process and with two; the loader; and the order. The text is the sources of the standard library and
some docstrings of the installed packages, 30 MB in all, or FOLDER's *.txt. The ways take turns, and
each ratio is the median of the rounds' ratios: the speed of a shared node may halve in a minute.
"""

import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.record import run_ours
from llama_pretrain.config.compose import compose_run
from llama_pretrain.config.resolved import ResolvedRun
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
from llama_pretrain.runs.metrics import steps

ROUNDS = 3
MAX_BYTES = 30_000_000
VOCAB_SIZE = 32_000
SEQUENCE_LENGTH = 2048
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class NoReport:
    """A report that prints nothing."""

    def say(self, line: str) -> None: ...

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, text: None


def compose(*overrides: str) -> ResolvedRun:
    """The resolved run of some overrides."""
    return resolve(compose_run(overrides), detect_machine())


def collect(folder: Path, text_folder: str | None) -> tuple[Path, int]:
    """Write the text as one .jsonl, which all ways read. Returns it and its bytes of text."""
    target, size = folder / "text.jsonl", 0
    runs = [compose("data=stdlib"), compose("data=docstrings")]
    if text_folder is not None:
        runs = [compose("data=text", f"data.paths=['{text_folder}/*.txt']")]
    with target.open("w", encoding="utf-8") as out:
        for run in runs:
            cache = Cache(folder=Path("~/.cache/llama_pretrain").expanduser(), report=NoReport())
            source = open_source(run.data, path="data", cache=cache)
            for text in sample_texts([(source, 0.0)], num_bytes=10**12):
                if text_folder is None and size >= MAX_BYTES:
                    break
                size += len(text.encode("utf-8"))
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return target, size


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


def prepare(path: Path, cache: Path, processes: int) -> tuple[float, Corpus]:
    """Seconds of preparing with an existing tokenizer, and the result."""
    run = compose(
        "data=text", f"data.paths=['{path}']", f"data.cache_dir={cache}",
        f"data.sequence_length={SEQUENCE_LENGTH}", f"data.prepare_processes={processes}",
        f"tokenizer.vocab_size={VOCAB_SIZE}", f"model.vocab_size={VOCAB_SIZE}",
        "model.max_position_embeddings=4096",
    )  # fmt: skip
    shutil.rmtree(cache / "tokens", ignore_errors=True)
    began = time.perf_counter()
    corpus = prepare_corpus(run, report=NoReport())
    return time.perf_counter() - began, corpus


def time_prepare(path: Path, cache: Path, processes: int) -> float:
    """Seconds of preparing."""
    return prepare(path, cache, processes)[0]


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


def measure_preparing(path: Path, size: int, folder: Path) -> Corpus:
    """Print a table of MB/s. Returns the corpus."""
    _, corpus = prepare(path, folder / "cache", 1)
    tokenizer_dir = Path(corpus.tokenizer_dir)
    bare, one, both = "encode_batch_fast", "task=prepare, 1 process", "encode_batch_fast, 2 at once"
    ways: dict[str, tuple[Any, ...]] = {
        bare: (encode_bare, path, tokenizer_dir),
        one: (time_prepare, path, folder / "cache", 1),
        "task=prepare, 2 processes": (time_prepare, path, folder / "cache", 2),
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
            jobs = [pool.submit(encode_bare, path, tokenizer_dir) for _ in range(2)]
            seconds[both].append(max(job.result() for job in jobs) / 2)
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


def time_loader(corpus: Corpus, length: int, *, mask: bool = False, steps: int = 400) -> float:
    """Seconds of a step's micro batch of 8 sequences, on one of two ranks."""
    dataset = create_pretrain_dataset(
        corpus, "train", sequence_length=length, limits=[None], document_mask=mask
    )
    sampling = plan_sampling(compose("data=stdlib").data, global_batch_size=16)
    order = SampleOrder(sampling, num_sequences=dataset.num_sequences, seed=1)
    sampler = TrainSampler(
        order=order, batches=[range(steps)], global_batch_size=16, rank=0, world_size=2
    )
    loader = build_loader(dataset, sampler, micro_batch_size=8, num_workers=0)
    began = time.perf_counter()
    assert sum(1 for _ in loader) == steps
    return (time.perf_counter() - began) / steps


def measure_loader(corpus: Corpus, folder: Path) -> None:
    """Print the loader's speed, and its share of a step of the default run."""
    print(f"\nloader, sequences of {SEQUENCE_LENGTH}, micro batches of 8, one of two ranks")
    for mask in (False, True):
        times = [time_loader(corpus, SEQUENCE_LENGTH, mask=mask) for _ in range(ROUNDS)]
        speed = 8 * SEQUENCE_LENGTH / statistics.median(times) / 1e6
        print(f"{'with a document mask' if mask else 'plain':32}{speed:8.1f} Mtok/s")
    rows = steps(run_ours(folder / "probe", "task=probe", "plan.probe_steps=8"))
    step = statistics.median(16 * 256 / row.tokens_per_s for row in rows[2:])
    loading = time_loader(corpus, 256)
    print(
        f"\na step of the default run: {step * 1e3:.0f} ms, of which {loading * 1e3:.3f} ms loading"
    )


def measure_order(run: ResolvedRun) -> None:
    """Print the time to open an order and compute a step's ids, by the number of sequences."""
    print("\norder: open it and compute 1,024 ids")
    sampling = plan_sampling(run.data, global_batch_size=1024)
    for count in (10**3, 10**6, 10**9, 10**12):
        began = time.perf_counter()
        SampleOrder(sampling, num_sequences=[count], seed=1).ids(10 * count, 1024)
        print(f"{count:>17,} sequences {(time.perf_counter() - began) * 1e3:8.2f} ms")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        path, size = collect(Path(name), sys.argv[1] if len(sys.argv) > 1 else None)
        corpus = measure_preparing(path, size, Path(name))
        measure_loader(corpus, Path(name))
    measure_order(compose("data=stdlib"))
