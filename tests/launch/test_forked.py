"""Launches in this process: forked ranks compute what fresh ones do, and no rank outlives them."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from benchmarks.faults import pieces, sockets_of
from llama_pretrain.checkpoint.manifest import checkpoint_name
from llama_pretrain.data.corpus import prepare_corpus
from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.launch.server import may_train
from llama_pretrain.launch.signals import Preempted, Stopped
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import build_training_plan
from llama_pretrain.process import PROC, STARTED, Beat, is_alive, list_processes, read_beats
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import StepRow, evaluations, read_metrics
from llama_pretrain.runs.phases import NAMES
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.pretrain import pretrain
from llama_pretrain.tasks.validate import resolve_valid
from tests.conftest import OPERATORS, ROOT, SMALL, Quiet, compose_run
from tests.machines import resolve_for

LONG = split("launch.num_processes=2 train.max_steps=2000 train.eval_every_steps=null")
"""A run that a test interrupts."""
NUMBERS = ("loss", "grad_norm", "learning_rate", "sample_hash", "eval_loss")
Poll = Callable[[RunDir], None]


class Trainer:
    """Trains small runs in run directories of one folder."""

    def __init__(self, corpus: Path, cache_dir: Path, folder: Path):
        self._folder = folder
        self._words = [*SMALL, f"data.paths=['{corpus}/*.py']", f"data.cache_dir={cache_dir}"]

    def run_dir(self, name: str = "run") -> RunDir:
        return RunDir(self._folder / name)

    def __call__(
        self, *words: str, name: str = "run", poll: Poll = lambda run_dir: None
    ) -> list[dict[str, Any]]:
        """Train, and return metrics.jsonl."""
        machine, run_dir = detect_machine(), self.run_dir(name)
        run = resolve_valid(compose_run([*self._words, *words]), machine)
        plan = build_training_plan(run, prepare_corpus(run, report=Quiet()))
        context = TaskContext(
            run_dir=run_dir, argv=[], origins={}, machine=machine, poll=lambda: poll(run_dir)
        )
        pretrain(run, plan, context)
        return [row.to_json() for row in read_metrics(run_dir.metrics)]

    def numbers(self, *words: str, name: str) -> list[Any]:
        rows = self(*words, name=name)
        return [{key: row[key] for key in NUMBERS if key in row} for row in rows]


@pytest.fixture
def train(
    corpus: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Trainer]:
    for name, value in OPERATORS.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(corpus, cache_dir, tmp_path)
    yield trainer
    files = tmp_path.glob("*/ranks/heartbeats")
    left = [beat.pid for file in files for beat in read_beats(file, ranks=2)]
    assert not any(is_alive(pid) for pid in left if pid)


class Once:
    """Calls something once, when both ranks have had so many heartbeats."""

    def __init__(self, act: Callable[[list[Beat]], None], *, after: int = STARTED + 5):
        self._act, self._after = act, after
        self.done_at = 0.0

    def __call__(self, run_dir: RunDir) -> None:
        beats = read_beats(run_dir.heartbeats(), ranks=2)
        if not self.done_at and all(beat.count >= self._after for beat in beats):
            self._act(beats)
            self.done_at = time.monotonic()


def servers() -> list[int]:
    """The server of forked ranks, if it is running: the child that leads a session."""
    mine = [process for process in list_processes() if process.parent == os.getpid()]
    return [each.pid for each in mine if each.session == each.pid and is_alive(each.pid)]


def test_which_commands_start_the_server_before_hydra() -> None:
    assert may_train(["seed=1", "zero=stage2"])
    for other in ("-m seed=1,2", "task=evaluate", "sweep=lr", "hydra/launcher=joblib"):
        assert not may_train(split(other)), other
    assert not may_train(["seed=1", "launch.fork=false"])


@pytest.mark.slow
def test_a_forked_rank_computes_what_a_fresh_one_does(train: Trainer) -> None:
    """Whatever the server's earlier ranks left in their libraries: the server itself trains
    nothing, so nothing passes from one run to the next."""
    last = ("zero=stage1", "precision=fp32", "train.max_steps=6")
    fresh = train.numbers(*last, "launch.fork=false", name="fresh")
    assert len(fresh) > 6
    train("zero=stage3", "precision=bf16", "seed=9", "optim.learning_rate=1e-2", name="stage3")
    train("zero=stage2", "precision=bf16_autocast", name="autocast")
    with pytest.raises(RankError, match="NonFiniteError"):
        train("optim.learning_rate=1e30", "train.max_steps=9", "precision=fp32", name="fails")
    assert train.numbers(*last, name="forked") == fresh
    (server,) = servers()
    assert len(list((PROC / str(server) / "task").iterdir())) == 1
    # An allocator that was not the server's cannot be had after the fork.
    assert train.numbers(*last, "kernels.allocator=plain", name="replaced") == fresh


@pytest.mark.parametrize("allocator", ["keep", "plain"])
def test_a_rank_has_the_environment_of_its_run(train: Trainer, allocator: str) -> None:
    """After the fork, or by a fresh interpreter where an import reads it."""
    seen: list[bytes] = []

    def look(beats: list[Beat]) -> None:
        seen.append((PROC / str(beats[0].pid) / "cmdline").read_bytes())
        parents = {process.pid: process.parent for process in list_processes()}
        assert servers() == [parents[beats[0].pid]]
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        train(*LONG, f"kernels.allocator={allocator}", poll=Once(look))
    assert (b"llama_pretrain.train.worker" in seen[0]) is (allocator == "plain")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
@pytest.mark.parametrize(
    ("words", "bound"),
    [
        *(("", True), ("launch.fork=false", True)),
        *(("launch.threads_per_process=2", False), ("launch.bind_cores=false", False)),
    ],
)
def test_each_rank_keeps_to_its_own_cores(train: Trainer, words: str, bound: bool) -> None:
    """When ranks take all cores of the command; otherwise each may use them all."""
    before = os.sched_getaffinity(0)
    two = set(sorted(before)[:2])
    seen: list[set[int]] = []
    look = Once(lambda beats: seen.extend(os.sched_getaffinity(beat.pid) for beat in beats))
    more = split(f"launch.num_processes=2 train.max_steps=20 kernels=plain {words}")
    os.sched_setaffinity(0, two)
    try:
        train(*more, poll=look)
        assert seen[0] | seen[1] == two
        assert (len(seen[0]) == len(seen[1]) == 1) is bound
        assert os.sched_getaffinity(0) == two
    finally:
        os.sched_setaffinity(0, before)


def kill(rank: int, beats: list[Beat]) -> None:
    os.kill(beats[rank].pid, signal.SIGKILL)


def test_a_killed_rank_ends_the_run_and_a_restart_completes_it(train: Trainer) -> None:
    """Its peers are killed within seconds; the restart forks from the same server."""
    train("train.max_steps=1", name="before")
    running = servers()
    poll = Once(partial(kill, 1))
    with pytest.raises(RankError, match=r"rank 1 failed: killed by SIGKILL \(by hand") as failed:
        train(*LONG, poll=poll)
    assert time.monotonic() - poll.done_at < 5
    assert "memory: the plan expects " in str(failed.value)
    assert failed.value.may_pass
    words = split("launch.num_processes=2 train.max_steps=40 checkpoint.every_steps=4")
    words.append("checkpoint.at_end=true")
    poll = Once(partial(kill, 1), after=40)
    rows = train(*words, "launch.max_restarts=1", name="restarted", poll=poll)
    (restart,) = [row for row in rows if "restarted" in row]
    assert restart["step"] > 0
    whole = train(*words, name="whole")
    one, other = ([row["sample_hash"] for row in s if "loss" in row] for s in (rows, whole))
    assert one == other
    last = [train.run_dir(name).checkpoints for name in ("restarted", "whole")]
    assert pieces(last[0] / checkpoint_name(40)) == pieces(last[1] / checkpoint_name(40))
    assert servers() == running


def test_a_server_that_dies_is_replaced(train: Trainer) -> None:
    def kill_server(beats: list[Beat]) -> None:
        os.kill(servers()[0], signal.SIGKILL)

    with pytest.raises(RankError, match="the server that ranks are forked from has died") as caught:
        train(*LONG, poll=Once(kill_server))
    assert caught.value.may_pass
    assert len([row for row in train(name="next") if "loss" in row]) == 3


def test_an_import_that_fails_is_in_the_error(
    train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid in servers():  # it has imported already
        os.kill(pid, signal.SIGKILL)
    (tmp_path / "torch.py").write_text("raise RuntimeError('no torch today')")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    try:
        with pytest.raises(RankError, match="no torch today"):
            train()
    finally:
        for pid in servers():
            os.kill(pid, signal.SIGKILL)


def test_the_phases_of_a_start_are_recorded_at_each_start(train: Trainer) -> None:
    began = time.time()
    words = ("launch.num_processes=2", "checkpoint.every_steps=2", "train.max_steps=3")
    (first,) = [row for row in train(*words) if "start_seconds" in row]
    seconds = first["start_seconds"]
    assert list(seconds) == [name for name in NAMES if name in seconds]  # in their order
    names = "plan spawn imports process_group model engine data evaluation first_step"
    assert {*split(names)} <= {*seconds}
    assert 0 < sum(seconds.values()) < time.time() - began
    assert first["step"] == 1
    run_dir = train.run_dir().path
    assert "to step 1" in (run_dir / "report.html").read_text()
    again = train(*words, f"resume.run_dir={run_dir}", "train.max_steps=5")
    starts = [row for row in again if "start_seconds" in row]
    assert [row["step"] for row in starts] == [1, 3]  # it resumed from step 2
    assert "checkpoint" in starts[1]["start_seconds"]
    assert "evaluation" not in starts[1]["start_seconds"]


def test_a_signal_while_ranks_start_ends_the_run(
    train: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    poll = Once(lambda beats: os.kill(os.getpid(), signal.SIGTERM), after=0)
    slow = "kernels.allocator=plain"  # fresh interpreters
    with pytest.raises(Preempted, match="preempted by SIGTERM") as ended:
        train(*LONG, slow, poll=poll)
    assert time.monotonic() - poll.done_at < 5
    assert "SIGTERM: exiting; no step has begun\n" in capsys.readouterr().out
    note = ended.value.__notes__[0]
    assert "the run has no checkpoint yet; to start again: python run.py" in note


def test_a_second_signal_kills_ranks_in_a_step_that_never_ends(train: Trainer) -> None:
    def interrupt_stopped(beats: list[Beat]) -> None:
        os.kill(beats[1].pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)

    first = Once(interrupt_stopped, after=30)

    def poll(run_dir: RunDir) -> None:
        first(run_dir)
        if first.done_at and time.monotonic() - first.done_at > 1.2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="stopped at once by SIGINT") as ended:
        train(*LONG, "checkpoint.every_steps=2", poll=poll)
    assert "to resume from step-" in ended.value.__notes__[0]


def test_a_signal_ends_an_evaluation_and_a_resumed_run_repeats_it(train: Trainer) -> None:
    def poll(run_dir: RunDir) -> None:
        if any(isinstance(row, StepRow) for row in read_metrics(run_dir.metrics)):
            os.kill(os.getpid(), signal.SIGTERM)

    words = split(
        "launch.num_processes=2 train.max_steps=2 train.eval_sequences=null"
        " train.eval_every_steps=1 data.sequence_length=16"
    )
    with pytest.raises(Preempted):
        train(*words, poll=poll)
    run_dir = train.run_dir()
    assert [row.step for row in evaluations(read_metrics(run_dir.metrics))] == [0]
    rows = train(*words, f"resume.run_dir={run_dir.path}")
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 1, 2]


@pytest.mark.slow
def test_a_hanging_rank_is_found_and_the_run_restarted(
    train: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = Once(lambda beats: os.kill(beats[1].pid, signal.SIGSTOP))
    words = ("train.max_steps=40", "launch.timeout_s=10", "launch.max_restarts=1")
    rows = train(*LONG, *words, "checkpoint.every_steps=4", poll=stop)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    output = capsys.readouterr().out
    assert "rank 1 failed: no heartbeat for 1" in output
    assert "(launch.timeout_s=10); it wrote no stack: it is stopped, or in a system call" in output
    log = train.run_dir().rank_log(0).read_text()
    assert "(most recent call first):" in log
    assert "in train_rank" in log  # in a step or a save


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs util-linux")
@pytest.mark.parametrize("allocator", ["plain", "keep"])
def test_a_rank_without_memory_says_what_to_lower(train: Trainer, allocator: str) -> None:
    """A checkpoint's thread may fail first, or oneDNN; neither says that memory was short."""

    def limit(beats: list[Beat]) -> None:
        lines = (PROC / str(beats[1].pid) / "status").read_text().splitlines()
        (kib,) = [line.split()[1] for line in lines if line.startswith("VmSize")]
        command = ["prlimit", f"--as={int(kib) * 1024}", "--pid", str(beats[1].pid)]
        subprocess.run(command, check=True)

    words = ("batch.global_batch_size=256", "checkpoint.every_steps=40")
    with pytest.raises(RankError) as failed:
        train(*LONG, *words, f"kernels.allocator={allocator}", poll=Once(limit))
    text = str(failed.value)
    memory = "\n  memory: the plan expects"
    if "can't start new thread" in text or "a primitive" in text:
        memory = "\n  memory, if that ran out (the error does not say): the plan expects"
    assert memory in text
    assert text.startswith("rank 1 failed: ")
    assert "  to reduce it, best first:\n    batch.micro_batch_size=64 " in text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=1", {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "3"}),
        ("kernels.compile=layers", {"TORCHDYNAMO_DISABLE": None}),
        ("launch.malloc_mmap_threshold=4096", {"MALLOC_MMAP_THRESHOLD_": "4096"}),
        ("launch.device=cuda", {"DS_ACCELERATOR": None, "CUDA_VISIBLE_DEVICES": None}),
    ],
)
def test_the_environment_follows_the_run(word: str, expected: dict[str, str | None]) -> None:
    run = resolve_for("launch.device=cpu", "launch.threads_per_process=3", word)
    values = worker_environment(run)
    assert {name: values.get(name) for name in expected} == expected


def listening_addresses(pids: set[int]) -> set[str]:
    """The addresses on which processes listen, as /proc/net/tcp has them."""
    inodes = set().union(*(sockets_of(pid) for pid in pids))
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return {line[1].partition(":")[0] for line in lines if line[9] in inodes}


@pytest.mark.parametrize("fork", [True, False])
def test_nothing_listens_beyond_this_machine(train: Trainer, fork: bool) -> None:
    """Neither the store of the rendezvous, whose keys anyone could set, nor gloo."""
    seen: list[str] = []

    def look(beats: list[Beat]) -> None:
        parents = {process.pid: process.parent for process in list_processes()}
        mine = {os.getpid(), *(beat.pid for beat in beats)}
        while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
            mine |= more
        seen.extend(listening_addresses(mine))
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        train(*LONG, f"launch.fork={fork}", poll=Once(look))
    assert set(seen) == {"0100007F"}  # 127.0.0.1
