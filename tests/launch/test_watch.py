"""The parent's view of its ranks: which failed first, which hangs, what a signal asks for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_pretrain.launch.failures import Failure, find_first
from llama_pretrain.launch.signals import Requests, Stopped, describe_resume
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


def test_the_error_that_a_rank_wrote(tmp_path: Path) -> None:
    """As torch's `record` writes it; or cut, or not at all: then its time is now."""
    file = tmp_path / "error.json"
    failures = [Failure.of(1, file)]
    for written in (
        '{"message": {"mess',
        '{"message": "<NONE>"}',
        '{"message": {"message": "E: x", "extraInfo": {"timestamp": "7"}}}',
    ):
        file.write_text(written)
        failures.append(Failure.of(1, file))
    assert [(each.exitcode, each.text) for each in failures] == [(1, "")] * 3 + [(1, "E: x")]
    times = [each.timestamp for each in failures]
    assert times == [pytest.approx(time.time(), abs=5)] * 3 + [7]


def build_watch(folder: Path) -> tuple[Watch, Requests, list[str]]:
    """A watch over a rank that the test plays, the signals it reads and the lines it prints."""
    words = ["debug=smoke", "launch.num_processes=1", "launch.timeout_s=10"]
    run = resolve_valid(compose_run(words), detect_machine())
    plan: Any = SimpleNamespace(world_size=1)
    requests, lines = Requests(), list[str]()
    spec = LaunchSpec(run, plan, RunDir(folder))
    return Watch(spec, requests=requests, report=lines.append), requests, lines


BEAT = """
import sys, time
from pathlib import Path
from llama_pretrain.process import STARTED, Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), 0)
for _ in range(STARTED): heartbeat.beat()
time.sleep(60)
"""


def test_the_first_signal_is_forwarded_once_and_the_second_ends_the_run(tmp_path: Path) -> None:
    watch, requests, lines = build_watch(tmp_path)
    heartbeats = RunDir(tmp_path).heartbeats()
    command = [sys.executable, "-c", BEAT, str(heartbeats)]
    with subprocess.Popen(command, start_new_session=True) as process:
        deadline = time.monotonic() + 20
        while read_beats(heartbeats, ranks=1)[0].count <= STARTED:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        watch.check()
        assert lines == []
        requests.add(signal.SIGTERM)
        watch.check()
        assert process.wait(10) == -signal.SIGTERM
    watch.check()
    text = "SIGTERM: finishing the step and writing a checkpoint; repeat it to exit at once"
    assert lines == [text]
    requests._last = time.monotonic()
    requests.add(signal.SIGINT)  # `timeout` sends its signal twice
    watch.check()
    requests._last -= 2
    requests.add(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped at once by SIGINT"):
        watch.check()


def test_a_rank_that_does_not_start_is_reported_unless_it_is_done(tmp_path: Path) -> None:
    watch, _, _ = build_watch(tmp_path)
    watch.check()
    watch._began -= 11
    with pytest.raises(RankError, match=r"rank 0 failed: it did not start within 10 s"):
        watch.check()
    Heartbeat(RunDir(tmp_path).heartbeats(), 0).finish()
    watch.check()


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
