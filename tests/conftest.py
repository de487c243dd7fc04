"""What tests share: a small corpus, one cache for the session, and the public command."""

import io
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_pretrain.config.run import Run
from llama_pretrain.data.packed import write_packed
from llama_pretrain.process import STOPPING
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from tests.browser import browser, open_page  # noqa: F401  # fixtures for all tests

ROOT = Path(__file__).resolve().parents[1]

SMALL = (
    "debug=smoke",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=null",
    "data=text",
    "data.sequence_length=64",
    "data.heldout_fraction=0.1",
    "checkpoint.export=false",
    "checkpoint.at_end=false",
    "monitor=none",
)
"""A run of seconds: tests add what they are about."""


OPERATORS = {
    "TORCH_EXTENSIONS_DIR": os.environ.get(
        "TORCH_EXTENSIONS_DIR", str(Path("~/.cache/llama_pretrain/torch_extensions").expanduser())
    )
}
"""Compiled operators are kept between test sessions: two minutes each."""


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A world of one rank in this process, and what its environment says of it."""
    import deepspeed
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        _describe_rank(patch)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        yield
        dist.destroy_process_group()
        # DeepSpeed keeps the groups that it has seen, for the next module too.
        deepspeed.comm.comm.cdb = None
        for name, value in list(vars(deepspeed.utils.groups).items()):
            if isinstance(value, dist.ProcessGroup):
                setattr(deepspeed.utils.groups, name, None)


def _describe_rank(patch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (values | OPERATORS | {"MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}).items():
        patch.setenv(name, value)


@dataclass(frozen=True)
class Command:
    """A finished `python run.py`."""

    code: int
    output: str
    run_dir: RunDir

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that have `key`."""
        rows = (row.to_json() for row in read_metrics(self.run_dir.metrics))
        return [row for row in rows if key in row]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows("loss")]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """A folder with some forty English-and-Python texts that every Python has."""
    return Path(sysconfig.get_path("stdlib")) / "email"


class Quiet:
    """A report of preparing that keeps its lines to itself."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, text: None


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of a size as in 420k; skips where none may be mounted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def write_tokens(prefix: Path, documents: Sequence[Sequence[int]], *, dtype: str) -> None:
    """PREFIX.bin and PREFIX.idx by our own writer."""
    with write_packed(prefix, dtype=dtype) as writer:
        for document in documents:
            writer.add(np.asarray(document, dtype=dtype))


class Runner:
    """Calls `python run.py` with the session's cache and a run directory of its own.

    By default in this process, where the server that workers are forked from stays warm; with
    `process=True`, or with variables that must be there before Python starts, in a new one.
    """

    def __init__(self, *, cache_dir: Path, corpus: Path, folder: Path):
        self.cache_dir, self.corpus, self.folder = cache_dir, corpus, folder
        self._count = 0

    def __call__(self, *overrides: str, **options: Any) -> Command:
        """`run.py` with SMALL and these overrides."""
        self._count += 1
        given = [word for word in overrides if word.startswith("hydra.run.dir=")]
        folder = self.folder / f"run{self._count}"
        place = given or [f"hydra.run.dir={folder}"]
        run_dir = RunDir(Path(place[-1].partition("=")[2]))
        paths = f"data.paths=['{self.corpus}/*.py']"
        words = [*SMALL, paths, f"data.cache_dir={self.cache_dir}", *overrides, *place]
        return self.bare(*words, run_dir=run_dir, **options)

    def bare(
        self,
        *words: str,
        run_dir: RunDir | None = None,
        expect: int | None = 0,
        variables: dict[str, str] | None = None,
        process: bool = False,
    ) -> Command:
        """`run.py` with only these words."""
        if process or variables:
            done = run_cli(*words, variables=variables, cwd=self.folder)
            code, output = done.returncode, done.stdout
        else:
            code, output = run_in_process(*words, cwd=self.folder)
        result = Command(code, output, run_dir or RunDir(self.folder))
        if expect is not None and code != expect:
            logs = "\n".join(
                path.read_text(errors="replace")[-3000:] for path in self.folder.rglob("rank*.log")
            )
            pytest.fail(f"exit code {code}\n{output}\n{logs}")
        return result


def run_in_process(*words: str, cwd: Path) -> tuple[int, str]:
    """`python run.py WORDS` in this process: the exit code, and its two outputs in one text."""
    from llama_pretrain.cli.main import main

    output = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["run.py"])
        for name, value in ({"COLUMNS": "200"} | OPERATORS).items():
            patch.setenv(name, value)
        patch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it for its process
        try:
            with redirect_stdout(output), redirect_stderr(output):
                code = main(words)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, output.getvalue()


def run_cli(
    *words: str, cwd: Path, variables: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """`python run.py WORDS` in a process of its own, its two outputs in one text."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=900,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200"} | OPERATORS | (variables or {}),
    )


def run_module(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """`python -m llama_pretrain WORDS` on a terminal of 40 columns."""
    return subprocess.run(
        [sys.executable, "-m", "llama_pretrain", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "40"},
    )


@pytest.fixture
def runner(cache_dir: Path, corpus: Path, tmp_path: Path) -> Runner:
    return Runner(cache_dir=cache_dir, corpus=corpus, folder=tmp_path)


@pytest.fixture(scope="module")
def shared_runner(
    cache_dir: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runner:
    """A runner for module-scoped fixtures: runs that several tests look at."""
    folder = tmp_path_factory.mktemp("runs")
    return Runner(cache_dir=cache_dir, corpus=corpus, folder=folder)


def compose_run(overrides: Sequence[str]) -> Run:
    """The checked `Run` that overrides compose to."""
    from llama_pretrain.config.compose import compose_run

    return compose_run(overrides)
