"""The parent's view of its ranks: which failed first, which hangs, what a signal asks for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_pretrain.launch.failures import Failure, find_first
from llama_pretrain.launch.signals import Preempted, Requests, Stopped, describe_resume
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.stacks import Frame, describe_stack, find_hanging, read_stacks
from llama_pretrain.launch.watch import RankError, Watch
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.process import (
    STARTED,
    Heartbeat,
    is_alive,
    kill_session,
    list_processes,
    read_beats,
)
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks.validate import resolve_valid
from tests.conftest import compose_run

SLEEPER = """
import faulthandler, signal, threading, time
faulthandler.register(signal.SIGUSR2, all_threads=True)
def sleep_in_a_thread():
    time.sleep(60)
def sleep_in_main():
    print("ready", flush=True); time.sleep(60)
threading.Thread(target=sleep_in_a_thread, daemon=True).start()
time.sleep(0.2)
sleep_in_main()
"""


def test_stacks_are_those_that_faulthandler_writes() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.5)
    process.kill()
    stacks = read_stacks(process.communicate()[1])
    assert [stack[0].function for stack in stacks] == ["sleep_in_a_thread", "sleep_in_main"]
    assert describe_stack(stacks[-1]) == "<string>:7 sleep_in_main < <string>:10 <module>"


LOOP = Frame("/x/llama_pretrain/train/loop.py", 7, "train_step")
REDUCE = Frame("/x/torch/distributed/distributed_c10d.py", 9, "all_reduce")
READ = Frame("/x/numpy/core.py", 3, "read")


@pytest.mark.parametrize(
    ("stacks", "counts", "rank"),
    [
        pytest.param({0: [[REDUCE, LOOP]], 1: []}, [9, 9], 1, id="writes-no-stack"),
        pytest.param({0: [[READ, LOOP]], 1: [[READ, LOOP]]}, [9, 8], 1, id="behind"),
        pytest.param({0: [[REDUCE, LOOP]], 1: [[READ, LOOP]]}, [9, 9], 1, id="waits-for-nobody"),
        pytest.param({0: [[REDUCE]], 1: [[REDUCE]]}, [8, 8], 0, id="both-wait"),
        pytest.param({1: [[REDUCE]]}, [8, 9], 1, id="the-other-is-done"),
    ],
)
def test_the_rank_that_hangs_is_found(stacks: Any, counts: list[int], rank: int) -> None:
    assert find_hanging(stacks, counts) == rank


def test_a_stack_shows_the_innermost_frame_of_this_package() -> None:
    text = describe_stack([READ] * 5 + [LOOP])
    assert text == "numpy/core.py:3 read < " * 4 + "train/loop.py:7 train_step"


def raised(text: str, *, at: int = 100) -> Failure:
    return Failure(1, at, text)


def killed_by(signal_number: int, *, at: int = 100) -> Failure:
    return Failure(-signal_number, at)


LOST = "RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.mark.parametrize(
    ("failures", "killed", "rank"),
    [
        pytest.param({0: raised(LOST, at=99), 1: killed_by(9)}, set(), 1, id="killed-by-hand"),
        pytest.param({0: killed_by(9, at=99), 1: raised("E: x")}, {0}, 1, id="killed-by-us"),
        pytest.param({0: killed_by(6, at=99), 1: killed_by(11)}, set(), 1, id="gloo-aborts"),
        pytest.param({0: raised(LOST, at=99), 1: killed_by(6)}, set(), 1, id="abort-of-its-own"),
        pytest.param({0: killed_by(15, at=99), 1: Failure(3, 100)}, set(), 1, id="by-the-agent"),
        pytest.param({0: raised("B", at=101), 1: raised("A")}, set(), 1, id="the-earlier"),
    ],
)
def test_the_failure_that_caused_the_others(
    failures: dict[int, Failure], killed: set[int], rank: int
) -> None:
    assert find_first(failures, killed=killed) == rank


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('{"message": {"message": "E: x", "extraInfo": {"timestamp": "7"}}}', "E: x"),
        ('{"message": {"mess', ""),
        ('{"message": "<NONE>"}', ""),
        (None, ""),
    ],
)
def test_the_error_that_a_rank_wrote(tmp_path: Path, written: str | None, text: str) -> None:
    """As torch's `record` writes it; or cut, or not at all: then its time is now."""
    file = tmp_path / "error.json"
    if written is not None:
        file.write_text(written)
    failure = Failure.of(1, file)
    assert (failure.exitcode, failure.text) == (1, text)
    assert failure.timestamp == (7 if text else pytest.approx(time.time(), abs=5))


class Watched:
    """A watch over ranks that the test plays, with what it prints."""

    def __init__(self, folder: Path, *, world_size: int = 1):
        words = ["debug=smoke", f"launch.num_processes={world_size}", "launch.timeout_s=10"]
        run = resolve_valid(compose_run(words), detect_machine())
        plan: Any = SimpleNamespace(world_size=world_size)
        self.run_dir, self.requests, self.lines = RunDir(folder), Requests(), list[str]()
        self.watch = Watch(
            LaunchSpec(run, plan, self.run_dir), requests=self.requests, report=self.lines.append
        )

    @contextmanager
    def rank(
        self, number: int, *, beats: int, sleeps: bool = True
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """A process with so many heartbeats, which then sleeps or exits."""
        code = (
            "import sys, time\nfrom pathlib import Path\n"
            "from llama_pretrain.process import Heartbeat\n"
            f"heartbeat = Heartbeat(Path(sys.argv[1]), {number})\n"
            f"for _ in range({beats - 1}): heartbeat.beat()\n"
            f"time.sleep({60 if sleeps else 0})"
        )
        words = [sys.executable, "-c", code, str(self.run_dir.heartbeats)]
        with subprocess.Popen(words, start_new_session=True) as process:
            deadline = time.monotonic() + 20
            while self.count(number) < beats:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            try:
                yield process
            finally:
                process.kill()

    def count(self, number: int) -> int:
        return read_beats(self.run_dir.heartbeats, world_size=2)[number].count

    def let_pass(self, seconds: float) -> None:
        self.watch._began -= seconds


def test_the_first_signal_is_forwarded_once_and_the_second_ends_the_run(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    with watched.rank(0, beats=STARTED + 1) as process:
        watched.watch.check()
        assert watched.lines == []
        watched.requests.add(signal.SIGTERM)
        watched.watch.check()
        assert process.wait(10) == -signal.SIGTERM
    watched.watch.check()
    text = "SIGTERM: finishing the step and writing a checkpoint; repeat it to exit at once"
    assert watched.lines == [text]
    watched.requests._last = time.monotonic()
    watched.requests.add(signal.SIGINT)  # `timeout` sends its signal twice
    watched.watch.check()
    watched.requests._last -= 2
    watched.requests.add(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped at once by SIGINT"):
        watched.watch.check()


def test_a_signal_before_the_first_step_waits_for_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    with watched.rank(0, beats=STARTED) as process:
        watched.requests.add(signal.SIGHUP)
        with pytest.raises(Preempted, match="preempted by SIGHUP"):
            watched.watch.check()
        watched.watch.kill()
        assert process.wait(10) == -signal.SIGKILL


def test_the_others_are_killed_soon_after_a_rank_has_died(tmp_path: Path) -> None:
    watched = Watched(tmp_path, world_size=2)
    with watched.rank(0, beats=9) as process:
        with watched.rank(1, beats=1, sleeps=False) as dead:
            dead.wait(10)
        watched.watch.check()
        assert process.poll() is None  # it may still write its error down
        time.sleep(1.1)
        watched.watch.check()
        assert process.wait(10) == -signal.SIGKILL
    assert watched.watch.killed == {0}


def test_a_rank_that_has_done_its_work_is_not_hanging(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    Heartbeat(watched.run_dir.heartbeats, 0).finish()
    watched.let_pass(100)
    watched.watch.check()


def test_a_rank_that_never_starts_is_reported(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.watch.check()
    watched.let_pass(11)
    with pytest.raises(RankError, match=r"rank 0 failed: it did not start within 10 s"):
        watched.watch.check()


def test_a_restart_is_tried_only_where_it_may_help() -> None:
    for error, stopping, may_pass in (
        ("killed by SIGKILL", False, True),
        ("NonFiniteError: the loss", False, False),
        ("killed by SIGKILL", True, False),
    ):
        failed = RankError(rank=0, error=error, log=Path(), stopping=stopping)
        assert failed.may_pass is may_pass


def test_a_killed_session_includes_every_process_group() -> None:
    code = "import subprocess, time\nsubprocess.Popen(['sleep', '60'], process_group=0)\n"
    leader = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)"], start_new_session=True
    )
    deadline = time.monotonic() + 20
    members: list[int] = []
    while len(members) < 2:
        assert time.monotonic() < deadline
        members = [each.pid for each in list_processes() if each.session == leader.pid]
    kill_session(leader.pid)
    leader.wait(10)
    time.sleep(0.1)
    assert not any(is_alive(pid) for pid in members)
    assert is_alive(os.getpid())


def test_the_command_that_continues_a_run_can_be_copied() -> None:
    for checkpoint, text in (
        (Path("step-12"), "to resume from step-12: python run.py resume='/runs/a run'"),
        (None, "no checkpoint yet; to start again: python run.py reproduce='/runs/a run'"),
    ):
        assert describe_resume(Path("/runs/a run"), checkpoint=checkpoint).endswith(text)
