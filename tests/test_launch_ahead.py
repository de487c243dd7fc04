"""Imports that are begun before the config is composed: used where the guess was right."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llama_pretrain.launch import ahead
from llama_pretrain.launch.ahead import (
    KEEP_IMPORTS,
    LABEL_BYTES,
    own_folder,
    remember,
    start_ahead,
    start_server,
)
from llama_pretrain.launch.forks import ForkServers
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.process import PROC, is_alive, list_processes
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.tasks.run import check_everything
from tests.conftest import OPERATORS, ROOT, SMALL, Runner, compose_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this user's processes leave what they know."""
    monkeypatch.delenv(KEEP_IMPORTS, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """With what servers would be started, and none is."""
    values: list[dict[str, str]] = []
    monkeypatch.setattr(ahead, "start_server", values.append)
    return values


def test_the_guess_is_the_last_environment(folder: Path, started: list[dict[str, str]]) -> None:
    start_ahead(["seed=1"])
    assert started == []
    remember({"A": "1"})
    remember({"A": "2"})
    start_ahead(["seed=1"])
    assert started == [{"A": "2"}]
    assert [path.name for path in own_folder().iterdir()] == [ahead._memory().name]


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "seed=1,2"],
        ["task=evaluate"],
        ["sweep=lr"],
        ["hydra/launcher=joblib"],
        ["seed=1", "launch.fork=false"],
    ],
)
def test_commands_that_may_fork_nothing(started: list[dict[str, str]], words: list[str]) -> None:
    remember({"A": "1"})
    assert start_ahead(words) is None
    assert started == []


def test_kept_imports_need_no_guess(
    started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    remember({"A": "1"})
    monkeypatch.setenv(KEEP_IMPORTS, "60")
    assert start_ahead([]) is None
    monkeypatch.setenv(KEEP_IMPORTS, "0")
    start_ahead([])
    assert started == [{"A": "1"}]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"A": 1}', "\udcff"])
def test_a_broken_memory_is_none(started: list[dict[str, str]], content: str) -> None:
    ahead._memory().write_bytes(content.encode(errors="surrogateescape"))
    assert start_ahead([]) is None
    assert started == []
    remember({"A": "1"})
    start_ahead([])
    assert started == [{"A": "1"}]


def test_a_folder_of_others_is_not_used(folder: Path, started: list[dict[str, str]]) -> None:
    remember({"A": "1"})
    own_folder().chmod(0o770)
    assert start_ahead([]) is None
    assert started == []
    remember({"A": "2"})  # in silence
    other = folder / f"llama_pretrain-{os.getuid()}"
    other.rename(folder / "other")
    other.symlink_to(folder / "other")
    with pytest.raises(PermissionError, match="yours alone"):
        own_folder()


def test_what_was_begun_is_used_where_it_fits() -> None:
    server = start_server({"A": "1"})
    with ForkServers(ahead=server) as servers:
        assert servers.of_environment({"A": "1"}).pid == server.process.pid
        assert servers.of_environment({"A": "1"}).pid == server.process.pid
    assert not is_alive(server.process.pid)
    with ForkServers(ahead=server) as servers:  # another run of the same command
        assert is_alive(servers.of_environment({"A": "1"}).pid)


def test_another_environment_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server({"A": "1"})
    assert server.suits({"A": "1"})
    with monkeypatch.context() as patch:
        patch.setenv("B", "1")
        assert not server.suits({"A": "1"})
    with ForkServers(ahead=server) as servers:
        assert servers.of_environment({"A": "2"}).pid != server.process.pid
        assert server.process.returncode is not None


@pytest.mark.parametrize("wanted", [True, False])
def test_what_was_begun_for_nothing_is_ended(wanted: bool) -> None:
    """Where ranks are not forked at once, for the cores are theirs; else at the end."""
    run, _ = check_everything(compose_run(SMALL), detect_machine())
    server = start_server({"A": "1"})
    with ForkServers(ahead=server) as servers:
        if wanted:
            servers.warm_up(replace(run, launch=replace(run.launch, fork=False)))
            assert server.process.returncode is not None
    assert server.process.returncode is not None


def test_a_label_is_shown() -> None:
    """In the room that a command line has for it, as far as it fits."""
    code = "from llama_pretrain.train.forkserver import show; show(%r); input()"
    for label, room, shown in (("/runs/ü", LABEL_BYTES, "/runs/ü"), ("/runs", 3, "/ru")):
        process = subprocess.Popen(
            [sys.executable, "-c", code % label, " " * room],
            stdin=subprocess.PIPE,
            cwd=ROOT,
        )
        place = PROC / str(process.pid) / "cmdline"
        wanted = shown.encode().ljust(room)
        deadline = time.monotonic() + 60
        while place.read_bytes().split(b"\0")[-2:] != [wanted, b""]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.communicate(b"\n")


def began(pid: int) -> float:
    """When a process was started, in seconds since the machine was."""
    ticks = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def test_the_second_run_imports_while_it_composes(runner: Runner, folder: Path) -> None:
    """And its numbers are those of the first."""
    runs = []
    for name in ("first", "second"):
        run_dir = folder / name
        words = [*SMALL, f"data.paths=['{runner.corpus}/*.py']"]
        words += [f"data.cache_dir={runner.cache_dir}", f"hydra.run.dir={run_dir}"]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *words],
            stdout=subprocess.DEVNULL,
            cwd=folder,
            env=os.environ | OPERATORS,
        )
        start, servers, shown = began(process.pid), dict[int, float](), set[bytes]()
        while process.poll() is None:
            for child in list_processes():
                if child.parent == process.pid or child.parent in servers:
                    try:
                        command = (PROC / str(child.pid) / "cmdline").read_bytes()
                        if b"forkserver" in command and child.parent == process.pid:
                            servers[child.pid] = began(child.pid) - start
                        elif b"forkserver" in command:
                            shown.add(command.split(b"\0")[-2].strip())
                    except OSError:
                        continue
            time.sleep(0.02)
        assert process.returncode == 0
        runs.append((servers, shown, run_dir))
    (late,), (early,) = (servers.values() for servers, *_ in runs)
    rows = [read_metrics(RunDir(run_dir).metrics) for *_, run_dir in runs]
    composed = [
        row["start_seconds"]["compose"] for of in rows for row in of if "start_seconds" in row
    ]
    assert late > composed[0]
    assert early < composed[1] / 2
    assert [shown for _, shown, _ in runs] == [{str(place).encode()} for *_, place in runs]
    losses = [[row.get("loss") for row in of] for of in rows]
    assert losses[0] == losses[1]
