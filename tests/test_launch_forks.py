"""Ranks that are forked: the numbers of fresh ones, and nothing passes from one to the next."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.launch.forks import ForkServers
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.processes import is_alive, list_processes
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import build_plan
from llama_pretrain.runs.rundir import RunDir, read_metrics
from llama_pretrain.tasks import check_everything, pretrain
from tests.conftest import OPERATORS, ROOT, SMALL, Quiet, compose_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServers]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OPERATORS.items():
            patch.setenv(name, value)
        with ForkServers() as servers:
            yield servers


class Trainer:
    """Trains small runs in this process's ranks."""

    def __init__(self, forks: ForkServers, corpus: Path, cache_dir: Path, folder: Path):
        self.forks, self.folder = forks, folder
        self._words = [*SMALL, f"data.paths=['{corpus}/*.py']", f"data.cache_dir={cache_dir}"]

    def __call__(
        self,
        name: str,
        *words: str,
        forked: bool = True,
        look: Callable[[], None] = lambda: None,
    ) -> list[dict[str, Any]]:
        from llama_pretrain.data.corpus import prepare_corpus

        machine, run_dir = detect_machine(), RunDir(self.folder / name)
        run, problems = check_everything(compose_run([*self._words, *words]), machine)
        assert not problems
        plan = build_plan(run, prepare_corpus(run, report=Quiet()))
        start = partial(launch, forks=self.forks if forked else None, look=look)
        pretrain(run, plan, run_dir=run_dir, argv=[], machine=machine, launch=start)
        return read_metrics(run_dir.metrics)

    def server_state(self, *words: str) -> dict[str, Any]:
        """What the server that forked a run's ranks says of itself."""
        run, _ = check_everything(compose_run([*self._words, *words]), detect_machine())
        return self.forks.of_environment(worker_environment(run)).ask({"state": True})


@pytest.fixture
def train(forks: ForkServers, corpus: Path, cache_dir: Path, tmp_path: Path) -> Trainer:
    return Trainer(forks, corpus, cache_dir, tmp_path)


NUMBERS = ("loss", "grad_norm", "learning_rate", "sample_hash", "eval_loss")


def numbers(rows: list[dict[str, Any]]) -> list[Any]:
    return [{key: row[key] for key in NUMBERS if key in row} for row in rows]


@pytest.mark.slow
def test_no_state_passes_from_one_run_to_the_next(train: Trainer) -> None:
    last = ("zero=stage1", "precision=fp32", "train.max_steps=6")
    fresh = numbers(train("fresh", *last, forked=False))
    train("first", "zero=stage1", "precision=fp32", "train.max_steps=1")
    before = train.server_state("precision=fp32")
    # Of everything that a library keeps per process: other stages, precisions, optimizers, seeds,
    # numbers of ranks; and a run that dies of its own.
    train("stage3", "zero=stage3", "precision=bf16", "seed=9", "optim.learning_rate=1e-2")
    train("autocast", "zero=stage2", "precision=bf16_autocast", "train.gradient_checkpointing=true")
    with pytest.raises(RankError, match="NonFiniteError"):
        train("dies", "optim.learning_rate=1e30", "train.max_steps=9", "precision=fp32")
    assert numbers(train("last", *last)) == fresh
    assert len(fresh) > 6
    after = train.server_state("precision=fp32")
    assert after == before
    assert after["threads"] == after["python_threads"] == 1
    assert not after["process_group"]
    assert not after["deepspeed_group"]
    assert not any("LOCAL_RANK" in name for name in after["environment"])


def test_a_rank_that_dies_takes_the_others_and_the_server_stays(
    train: Trainer, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(run_dir: RunDir) -> None:
        from llama_pretrain.runs.heartbeat import read_beats

        beats = read_beats(run_dir.heartbeats, world_size=2)
        if not killed and all(beat.count > 8 for beat in beats):
            killed.extend(beat.pid for beat in beats)
            os.kill(beats[1].pid, signal.SIGKILL)

    look = partial(kill_one, RunDir(tmp_path / "dies"))
    words = ("launch.num_processes=2", "train.max_steps=2000", "train.eval_every_steps=null")
    with pytest.raises(RankError, match=r"rank 1 failed: ended by SIGKILL"):
        train("dies", *words, look=look)
    assert killed
    assert not any(is_alive(pid) for pid in killed)
    assert len([row for row in train("next", "launch.num_processes=2") if "loss" in row]) == 3


DYING_PARENT = """
import sys, time
from llama_pretrain.launch.forks import ForkServers
server = ForkServers().of_environment({})
print(server.pid, flush=True)
server.ask({"state": True})
print("ready", flush=True)
time.sleep(60)
"""


def test_the_server_dies_with_whoever_started_it() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", DYING_PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    assert is_alive(server)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 5
    while is_alive(server) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(server)


def test_a_server_that_cannot_import_says_why(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')")
    with ForkServers() as servers:
        server = servers.of_environment({"PYTHONPATH": f"{tmp_path}:{ROOT}"})
        with pytest.raises(ChildProcessError, match="no torch today"):
            server.ask({"state": True})
        assert servers.of_environment({"PYTHONPATH": f"{tmp_path}:{ROOT}"}) is not server
    assert not [p for p in list_processes() if p.parent == os.getpid() and p.pid == server.pid]
