"""Ranks that are forked: the numbers of fresh ones, and nothing passes from one to the next."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.snapshot import load_snapshot, render_snapshot
from llama_pretrain.launch import kept as kept_module
from llama_pretrain.launch.ahead import KEEP_IMPORTS, SERVER
from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.launch.forks import ForkServers, ServerError
from llama_pretrain.launch.kept import _address
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import build_plan
from llama_pretrain.process import STARTED, is_alive, list_processes, read_beats
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.phases import NAMES
from llama_pretrain.tasks.pretrain import pretrain
from llama_pretrain.tasks.run import check_everything
from tests.conftest import OPERATORS, ROOT, SMALL, Command, Quiet, Runner, compose_run

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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
@pytest.mark.parametrize("forked", [True, False])
def test_each_rank_keeps_to_cores_of_its_own(train: Trainer, tmp_path: Path, forked: bool) -> None:
    """Where ranks take all cores that there are for the run; else they move freely."""
    two = set(sorted(os.sched_getaffinity(0))[:2])
    before = os.sched_getaffinity(0)
    seen: dict[int, set[int]] = {}

    def look(run_dir: RunDir) -> None:
        for rank, beat in enumerate(read_beats(run_dir.heartbeats, world_size=2)):
            if beat.count > STARTED and not beat.finished:
                with contextlib.suppress(ProcessLookupError):
                    seen[rank] = os.sched_getaffinity(beat.pid)

    os.sched_setaffinity(0, two)
    try:
        for name, words, bound in (
            ("all", (), True),
            ("more", ("launch.threads_per_process=2",), False),
            ("free", ("launch.bind_cores=false",), False),
        ):
            seen.clear()
            words = ("launch.num_processes=2", "train.max_steps=20", "kernels=plain", *words)
            train(name, *words, forked=forked, look=partial(look, RunDir(tmp_path / name)))
            assert sorted(seen) == [0, 1]
            assert seen[0] | seen[1] == two
            assert (len(seen[0]) == len(seen[1]) == 1) is bound
        assert os.sched_getaffinity(0) == two
    finally:
        os.sched_setaffinity(0, before)


def test_a_rank_that_dies_takes_the_others_and_the_server_stays(
    train: Trainer, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(run_dir: RunDir) -> None:
        from llama_pretrain.process import read_beats

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


def test_a_server_that_dies_ends_its_ranks_and_another_takes_its_place(
    train: Trainer, tmp_path: Path
) -> None:
    ranks: list[int] = []

    def kill_server(run_dir: RunDir) -> None:
        from llama_pretrain.process import read_beats

        beats = read_beats(run_dir.heartbeats, world_size=2)
        if not ranks and all(beat.count > 8 for beat in beats):
            ranks.extend(beat.pid for beat in beats)
            found = [each.parent for each in list_processes() if each.pid == ranks[0]]
            os.kill(found[0], signal.SIGKILL)

    words = ("launch.num_processes=2", "train.max_steps=2000", "train.eval_every_steps=null")
    with pytest.raises(RankError, match="the process that forks ranks has ended") as caught:
        train("no-server", *words, look=partial(kill_server, RunDir(tmp_path / "no-server")))
    assert caught.value.may_pass
    assert ranks
    assert not any(is_alive(pid) for pid in ranks)
    assert len([row for row in train("next", "launch.num_processes=2") if "loss" in row]) == 3


def test_the_seconds_of_a_start_are_kept_at_each_start(train: Trainer, tmp_path: Path) -> None:
    began = time.time()
    words = ("launch.num_processes=2", "checkpoint.every_steps=2", "train.max_steps=3")
    rows = train("timed", *words)
    (first,) = [row for row in rows if "start_seconds" in row]
    seconds = first["start_seconds"]
    assert list(seconds) == [name for name in NAMES if name in seconds]  # in their order
    assert {"plan", "spawn", "imports", "process_group", "model", "engine", "data"} <= set(seconds)
    assert {"evaluation", "first_step"} <= set(seconds)
    assert 0 < sum(seconds.values()) < time.time() - began
    assert first["step"] == 1
    assert "to step 1" in (tmp_path / "timed" / "report.html").read_text()
    again = train("timed", *words, f"resume.run_dir={tmp_path / 'timed'}", "train.max_steps=5")
    starts = [row for row in again if "start_seconds" in row]
    assert [row["step"] for row in starts] == [1, 3]  # it went on from step 2
    assert "checkpoint" in starts[1]["start_seconds"]
    assert "evaluation" not in starts[1]["start_seconds"]


def test_a_run_is_forked_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    servers = ForkServers()
    monkeypatch.setattr(servers, "of_environment", asked.append)
    run, _ = check_everything(compose_run(SMALL), detect_machine())
    servers.warm_up(replace(run, launch=replace(run.launch, fork=False)))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        servers.warm_up(run)
    assert asked == []
    servers.warm_up(run)
    assert asked == [worker_environment(run)]


def test_a_snapshot_of_before_that_forks_sweeps_is_read(tmp_path: Path) -> None:
    run, _ = check_everything(compose_run(SMALL), detect_machine())
    text = render_snapshot(run)
    assert "  fork: true\n  timeout_s:" in text
    old = text.replace("  fork: true\n  timeout_s:", "  timeout_s:")
    old = old.replace("  prune_after: 4\n", "  prune_after: 4\n  fork: true\n")
    assert old != text
    path = tmp_path / "snapshot.yaml"
    path.write_text(old)
    assert load_snapshot(path) == run


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
        with pytest.raises(ServerError, match="no torch today"):
            server.ask({"state": True})
        assert servers.of_environment({"PYTHONPATH": f"{tmp_path}:{ROOT}"}) is not server
    assert not [p for p in list_processes() if p.parent == os.getpid() and p.pid == server.pid]


class Kept:
    """Commands for which imports are kept, and the processes that keep them."""

    def __init__(self, runner: Runner, folder: Path, seconds: float):
        self._runner, self._folder = runner, folder
        self.variables = {KEEP_IMPORTS: str(seconds), "XDG_RUNTIME_DIR": str(folder)}

    def __call__(self, *words: str) -> Command:
        return self._runner(*words, variables=self.variables)

    def pids(self) -> list[int]:
        """Of processes that wait."""
        return [int(file.read_text()) for file in self._folder.glob("llama_pretrain-*/*.pid")]


@pytest.fixture
def kept(runner: Runner, tmp_path: Path) -> Iterator[Kept]:
    folder = tmp_path / "sockets"
    folder.mkdir()
    kept = Kept(runner, folder, 300)
    yield kept
    for pid in kept.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_imports_are_kept_for_the_next_command(runner: Runner, kept: Kept) -> None:
    """The numbers are those of imports of its own."""
    words = ("train.max_steps=4", "zero=stage2")
    own = runner(*words, variables={KEEP_IMPORTS: "0"})
    assert numbers(kept(*words).rows("step")) == numbers(own.rows("step"))
    (pid,) = kept.pids()
    again = kept(*words)
    assert numbers(again.rows("step")) == numbers(own.rows("step"))
    assert kept.pids() == [pid]
    (start,) = (row["start_seconds"] for row in again.rows("start_seconds"))
    assert start["imports"] < 1


def test_imports_are_kept_no_longer_than_was_said(tmp_path: Path) -> None:
    path, answers = tmp_path / "of.sock", list[str]()
    with _address(path) as address, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        path.with_suffix(".pid").touch()
        with (tmp_path / "log").open("w+b") as log:
            pid = kept_module._start(SERVER, {}, listener, path=path, seconds=1.5, log=log)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            told = json.dumps({"folder": str(tmp_path), "umask": 0o22}).encode()
            socket.send_fds(connection, [told], [sys.stderr.fileno()])
            answers.append(connection.makefile().readline())
        began = time.monotonic()
    assert json.loads(answers[0])["ready"] != pid
    os.waitpid(pid, 0)
    assert 1 < time.monotonic() - began < 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log"]


def test_a_command_that_is_killed_takes_its_ranks_and_leaves_the_imports(
    runner: Runner, kept: Kept, tmp_path: Path
) -> None:
    kept("train.max_steps=1")
    (pid,) = kept.pids()
    run_dir = RunDir(tmp_path / "killed")
    long = ("train.max_steps=10000", f"hydra.run.dir={run_dir.path}")
    data = (f"data.paths=['{runner.corpus}/*.py']", f"data.cache_dir={runner.cache_dir}")
    command = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *SMALL, *data, *long],
        env=os.environ | OPERATORS | kept.variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(read_metrics(run_dir.metrics)) > 4, seconds=60)
        ranks = [beat.pid for beat in read_beats(run_dir.heartbeats, world_size=2)]
    finally:
        command.kill()
        command.wait()
    wait_until(lambda: not any(map(is_alive, ranks)), seconds=10)
    assert is_alive(pid)


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_kept_imports_are_for_the_same_code_and_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kept_module, "PROJECT_ROOT", tmp_path)
    module = tmp_path / "llama_pretrain" / "module.py"
    module.parent.mkdir()
    module.touch()
    keys = [kept_module._key({"OMP_NUM_THREADS": "1"})]
    monkeypatch.setenv("COLUMNS", "77")
    assert kept_module._key({"OMP_NUM_THREADS": "1"}) == keys[0]
    keys.append(kept_module._key({"OMP_NUM_THREADS": "2"}))
    monkeypatch.setenv("TORCH_LOGS", "all")
    keys.append(kept_module._key({"OMP_NUM_THREADS": "2"}))
    os.utime(module, (1, 1))
    keys.append(kept_module._key({"OMP_NUM_THREADS": "2"}))
    lower = (
        "import os, sys; os.nice(1); from llama_pretrain.launch import kept; print(kept._key({}))"
    )
    nice = subprocess.run([sys.executable, "-c", lower], cwd=ROOT, capture_output=True, text=True)
    monkeypatch.undo()
    keys += [nice.stdout.strip(), kept_module._key({})]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("given", ["a while", "nan", "-1", "folder"])
def test_kept_imports_that_cannot_be(runner: Runner, tmp_path: Path, given: str) -> None:
    """A folder of sockets in which others may write, or no number of seconds."""
    (tmp_path / f"llama_pretrain-{os.getuid()}").mkdir()
    (tmp_path / f"llama_pretrain-{os.getuid()}").chmod(0o777)
    seconds = "9" if given == "folder" else given
    variables = {KEEP_IMPORTS: seconds, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = runner("train.max_steps=1", variables=variables, expect=1)
    shown = f"a number of seconds (got {given})"
    if given == "folder":
        shown = "yours alone (mode 700)"
    assert f"{KEEP_IMPORTS}: " in done.output
    assert shown in done.output
    assert "Traceback" not in done.output
