"""Who failed first, who hangs, and what a signal asks for, as the parent finds it out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_pretrain.launch.failures import Failure, find_first
from llama_pretrain.launch.signals import Preempted, Requests, Stopped, how_to_go_on
from llama_pretrain.launch.stacks import (
    Frame,
    RankState,
    describe_stack,
    find_hanging,
    read_stacks,
)
from llama_pretrain.launch.watch import RankError, Watch
from llama_pretrain.process import (
    STARTED,
    Heartbeat,
    is_alive,
    kill_session,
    list_processes,
    read_beats,
)
from llama_pretrain.runs.layout import RunDir

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


def state(rank: int, count: int, *frames: Frame) -> RankState:
    return RankState(rank=rank, count=count, stacks=[frames] if frames else [])


@pytest.mark.parametrize(
    ("states", "rank"),
    [
        pytest.param([state(0, 9, REDUCE, LOOP), state(1, 9)], 1, id="writes-no-stack"),
        pytest.param([state(0, 9, READ, LOOP), state(1, 8, READ, LOOP)], 1, id="behind"),
        pytest.param(
            [state(0, 9, REDUCE, LOOP), state(1, 9, READ, LOOP)], 1, id="waits-for-nobody"
        ),
        pytest.param([state(0, 8, REDUCE, LOOP), state(1, 8, REDUCE, LOOP)], 0, id="both-wait"),
    ],
)
def test_the_rank_that_hangs_is_found(states: list[RankState], rank: int) -> None:
    assert find_hanging(states).rank == rank


def test_a_stack_is_told_with_the_innermost_frame_of_ours() -> None:
    text = describe_stack([READ, READ, READ, READ, READ, LOOP])
    assert text == " < ".join(["x/core.py:3 read".replace("x/", "numpy/")] * 4) + (
        " < train/loop.py:7 train_step"
    )


def raised(text: str, *, at: int = 100) -> Failure:
    return Failure(1, at, text)


def ended(signal_number: int, *, at: int = 100) -> Failure:
    return Failure(-signal_number, at)


LOST = "RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.mark.parametrize(
    ("failures", "killed", "rank"),
    [
        pytest.param({0: raised(LOST, at=99), 1: ended(9)}, set(), 1, id="killed-by-hand"),
        pytest.param({0: ended(9, at=99), 1: raised("ValueError: x")}, {0}, 1, id="killed-by-us"),
        pytest.param({0: ended(6, at=99), 1: ended(11)}, set(), 1, id="gloo-aborts"),
        pytest.param({0: raised(LOST, at=99), 1: ended(6)}, set(), 1, id="an-abort-of-its-own"),
        pytest.param({0: ended(15, at=99), 1: Failure(3, 100)}, set(), 1, id="ended-by-the-agent"),
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
def test_what_a_rank_wrote_of_its_error(tmp_path: Path, written: str | None, text: str) -> None:
    """As torch's `record` writes it; or cut, or not at all: then it is of now."""
    file = tmp_path / "error.json"
    if written is not None:
        file.write_text(written)
    failure = Failure.of(1, file)
    assert (failure.exitcode, failure.text) == (1, text)
    assert failure.timestamp == (7 if text else pytest.approx(time.time(), abs=5))


def build_watch(run_dir: RunDir, requests: Requests, lines: list[str]) -> Watch:
    return Watch(run_dir, world_size=1, timeout_s=10, requests=requests, report=lines.append)


def beating(run_dir: RunDir, *, beats: int) -> "subprocess.Popen[bytes]":
    """A process that has beaten so often, and sleeps."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from llama_pretrain.runs.heartbeat import Heartbeat\n"
        "heartbeat = Heartbeat(Path(sys.argv[1]), 0)\n"
        f"for _ in range({beats - 1}): heartbeat.beat()\n"
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(run_dir.heartbeats)]
    process = subprocess.Popen(words, start_new_session=True)
    end = time.monotonic() + 20
    while read_beats(run_dir.heartbeats, world_size=1)[0].count < beats:
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


def test_the_first_signal_is_passed_on_once_and_the_second_ends_it(tmp_path: Path) -> None:
    run_dir, requests, lines = RunDir(tmp_path), Requests(), list[str]()
    watch = build_watch(run_dir, requests, lines)
    process = beating(run_dir, beats=STARTED + 1)
    watch.look()
    assert lines == []
    requests.add(signal.SIGTERM)
    watch.look()
    assert process.wait(10) == -signal.SIGTERM
    watch.look()
    assert lines == [
        "SIGTERM: finishing the step and writing a checkpoint; once more to leave at once"
    ]
    requests._last = time.monotonic()
    requests.add(signal.SIGINT)  # `timeout` sends its signal twice
    watch.look()
    requests._last -= 2
    requests.add(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped at once by SIGINT"):
        watch.look()


def test_nothing_is_waited_for_where_nothing_was_begun(tmp_path: Path) -> None:
    run_dir, requests, lines = RunDir(tmp_path), Requests(), list[str]()
    watch = build_watch(run_dir, requests, lines)
    process = beating(run_dir, beats=STARTED)
    requests.add(signal.SIGHUP)
    with pytest.raises(Preempted, match="preempted by SIGHUP"):
        watch.look()
    assert lines == ["SIGHUP: leaving; no step has been begun"]
    watch.kill()
    assert process.wait(10) == -signal.SIGKILL


def test_the_others_end_soon_after_a_rank_has_died(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    watch = Watch(
        run_dir, world_size=2, timeout_s=10, requests=Requests(), report=lambda line: None
    )
    process = beating(run_dir, beats=9)
    code = (
        "import sys; from pathlib import Path\n"
        "from llama_pretrain.runs.heartbeat import Heartbeat\n"
        "Heartbeat(Path(sys.argv[1]), 1)"
    )
    dead = subprocess.Popen([sys.executable, "-c", code, str(run_dir.heartbeats)])
    dead.wait()
    watch.look()
    assert process.poll() is None  # it may have words to write down
    time.sleep(1.1)
    watch.look()
    assert process.wait(10) == -signal.SIGKILL
    assert watch.killed == {0}


def test_a_rank_that_has_done_its_work_is_no_dead_one(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    heartbeat = Heartbeat(run_dir.heartbeats, 0)
    heartbeat.finish()
    (beat,) = read_beats(run_dir.heartbeats, world_size=1)
    assert beat.finished
    watch = build_watch(run_dir, Requests(), [])
    watch._began -= 100
    watch.look()


def test_a_rank_that_never_begins_is_reported(tmp_path: Path) -> None:
    watch = build_watch(RunDir(tmp_path), Requests(), [])
    watch.look()
    watch._began -= 11
    with pytest.raises(RankError, match=r"rank 0 failed: it did not begin within 10 s"):
        watch.look()


def test_a_restart_is_only_tried_where_it_may_help(tmp_path: Path) -> None:
    def may_pass(error: str, *, stopping: bool = False) -> bool:
        return RankError(rank=0, error=error, log=tmp_path, stopping=stopping).may_pass

    assert may_pass("ended by SIGKILL")
    assert not may_pass("NonFiniteError: the loss")
    assert not may_pass("ended by SIGKILL", stopping=True)


def test_a_session_ends_whatever_groups_are_in_it() -> None:
    code = "import subprocess, time\nsubprocess.Popen(['sleep', '60'], process_group=0)\n"
    leader = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)"], start_new_session=True
    )
    end = time.monotonic() + 20
    members: list[int] = []
    while len(members) < 2:
        assert time.monotonic() < end
        members = [each.pid for each in list_processes() if each.session == leader.pid]
    kill_session(leader.pid)
    leader.wait(10)
    time.sleep(0.1)
    assert not any(is_alive(pid) for pid in members)
    assert is_alive(os.getpid())


def test_the_command_that_goes_on_can_be_copied(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    text = how_to_go_on(folder, checkpoint=folder / "checkpoints" / "step-00000012")
    assert text == f"to go on from step-00000012: python run.py resume='{folder}'"
    text = how_to_go_on(folder, checkpoint=None)
    assert text == f"it has no checkpoint yet; to start it anew: python run.py reproduce='{folder}'"
