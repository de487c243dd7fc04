"""Operators are compiled by one process at a time, and only those that a run uses."""

import fcntl
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from llama_pretrain import console
from llama_pretrain.config.problems import UserError
from llama_pretrain.console import output
from llama_pretrain.launch import operators
from llama_pretrain.launch.operators import build_operators, describe_operators
from tests.machines import resolve_for


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def test_a_run_compiles_nothing_that_it_does_not_use(folder: Path, tmp_path: Path) -> None:
    run = resolve_for("optim=torch_adamw")
    build_operators(run, log=tmp_path / "log", taking_time=console.taking_time)
    assert not folder.exists()
    assert describe_operators(run) == {}


def test_it_reports_that_it_waits_for_another_build(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder.mkdir()
    other = (folder / ".build.lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)

    @contextmanager
    def taking_time(what: str) -> Iterator[None]:
        lines.append(what)
        (folder / f".cpu_adam-{operators._machine_key()}").touch()
        other.close()  # the other one is done
        yield

    build_operators(resolve_for("optim=cpu_adam"), log=tmp_path / "log", taking_time=taking_time)
    assert lines == ["waiting for another process that compiles operators on this machine"]


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("c++\nadam.cu(7): error: no CUDA\nRuntimeError: Error building it\n", "adam.cu(7): "),
        ("Traceback:\n  a line\nImportError: undefined symbol\n\n", "ImportError: undefined"),
        ("", "no output"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_failed_build_reports_the_compilers_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, shown: str
) -> None:
    code = f"import sys; sys.exit(print({printed!r}, end='') or 1)"
    monkeypatch.setattr(operators, "BUILD", code)
    run, log = resolve_for("optim=cpu_adam"), tmp_path / "build.log"
    with pytest.raises(UserError) as failed:
        build_operators(run, log=log, taking_time=console.taking_time)
    assert f"did not compile: {shown}" in str(failed.value)
    assert str(log) in str(failed.value)


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
def test_what_takes_time_is_alive_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    text = io.StringIO()
    out = Console(file=text, force_terminal=is_terminal, width=90, highlight=False)
    monkeypatch.setattr(output, "out", out)
    with console.taking_time("compiling DeepSpeed's cpu_adam"):
        time.sleep(1.2)
    if is_terminal:
        assert "0:00:00" in text.getvalue()
        assert "0:00:01" in text.getvalue()
        assert text.getvalue().endswith("compiling DeepSpeed's cpu_adam (1 s)\n")
    else:
        assert text.getvalue() == "compiling DeepSpeed's cpu_adam\n"
