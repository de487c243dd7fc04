"""The table of all runs: what it finds, which have crashed, and how it is drawn."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.__main__ import main
from llama_pretrain.checkpoint.manifest import checkpoint_name, write_manifest
from llama_pretrain.cli.list_runs import render_list
from llama_pretrain.cli.listing import list_runs
from llama_pretrain.config.model import Model
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.config.tasks import Task
from llama_pretrain.runs.layout import RunDir, hold
from llama_pretrain.runs.metrics import Row
from tests.checkpoint.damage import EXAMPLE
from tests.conftest import ROOT, run_module
from tests.rows import evaluation_row, step_row, write_rows


def write_run(
    folder: Path,
    *,
    status: str | None = "completed",
    step: int = 3,
    started: str = "2026-05-04T03:02:01+00:00",
    rows: Sequence[Row] | None = None,
    task: Task = Task.pretrain,
) -> RunDir:
    run_dir = RunDir(folder)
    folder.mkdir(parents=True)
    run_dir.snapshot.write_text(render_snapshot(Run(task=task, model=Model(name="tiny"))))
    run_dir.plan.write_text(json.dumps({"steps": {"total": 1200}}))
    run_dir.provenance.write_text(json.dumps({"time": started}))
    if status is not None:
        run_dir.status.write_text(json.dumps({"status": status, "pid": 1, "error": None}))
        run_dir.lock.touch()
    if rows is None:
        rows = [evaluation_row(0, 6.25), *(falling(number) for number in range(1, step + 1))]
    write_rows(run_dir.metrics, rows)
    return run_dir


def falling(step: int) -> Row:
    return step_row(step, loss=6.0 - step / 1000, tokens_per_s=1234.5)


def write_checkpoint(run_dir: RunDir, step: int) -> None:
    folder = run_dir.checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    write_manifest(folder, replace(EXAMPLE, step=step))


def listed(root: Path) -> dict[str, Any]:
    return {str(run.path.relative_to(root)): run for run in list_runs(root)}


def test_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", step=7)
    (run,) = list_runs(tmp_path)
    assert (run.kind, run.status, run.model) == ("run", "completed", "tiny")
    assert (run.step, run.steps, run.loss, run.eval_loss) == (7, 1200, 5.993, 6.25)
    assert (run.started, run.tokens_per_s) == ("2026-05-04T03:02:01+00:00", 1234.5)
    head, line, *_ = render_list([run], root=tmp_path, width=None)
    assert head.split("  ")[:2] == ["run", "started (UTC)"]
    expected = "a 2026-05-04 03:02 completed tiny 7/1,200 5.9930 6.2500 1,234"
    assert " ".join(line.split()) == expected


def test_where_runs_are_found(tmp_path: Path) -> None:
    write_run(tmp_path / "2026" / "b", started="2026-05-04T02:00:00+00:00")
    sweep = tmp_path / "sweeps" / "x"
    write_run(sweep / "0-lr=1", started="2026-05-04T01:00:00+00:00")
    (sweep / "sweep.json").touch()
    finished = [evaluation_row(2, 4.5, checkpoint="step-00000002", finished=True)]
    evaluation = tmp_path / "2026" / "b" / "evaluations" / "now"
    write_run(evaluation, status=None, rows=finished, task=Task.evaluate)
    write_run(
        tmp_path / "2026" / "b" / "evaluations" / "cut", status=None, rows=[], task=Task.evaluate
    )
    write_run(tmp_path / "proof" / "whole", status=None, task=Task.verify_resume)
    for inside in ("export/x", "checkpoints/step-00000003", ".hidden"):
        write_run(tmp_path / "2026" / "b" / inside)
    (tmp_path / "again").symlink_to(tmp_path / "2026")
    (tmp_path / "empty").mkdir()
    found = listed(tmp_path)
    assert {place: (run.kind, run.status) for place, run in found.items()} == {
        "sweeps/x/0-lr=1": ("sweep", "completed"),
        "2026/b": ("run", "completed"),
        "2026/b/evaluations/now": ("evaluation", "completed"),
        "2026/b/evaluations/cut": ("evaluation", "unfinished"),
        "proof/whole": ("run", "unfinished"),
    }
    assert next(iter(found)) == "sweeps/x/0-lr=1"  # the newest last
    text = "\n".join(render_list(list(found.values()), root=tmp_path, width=None))
    assert "sweeps/x/0-lr=1 (sweep)" in text
    assert "3 completed, 2 unfinished" in text


def test_a_run_has_crashed_if_nobody_holds_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a b", status="running")
    write_checkpoint(run_dir, 2)
    write_run(tmp_path / "none", status="running", started="")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with hold(run_dir):
        assert listed(tmp_path)["a b"].status == "running"
        with pytest.raises(BlockingIOError), hold(run_dir):
            pass
    found = listed(tmp_path)
    assert (found["a b"].status, found["a b"].checkpoint) == ("crashed", "step-00000002")
    *_, none, with_one = render_list(list(found.values()), root=tmp_path, width=40)
    command = f"python run.py 'resume={tmp_path}/a b'"
    assert with_one == f"crashed, resume from step-00000002: {command}"
    command = f"python run.py reproduce={tmp_path}/none"
    assert none == f"crashed, no complete checkpoint, start again: {command}"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert before == {**after, run_dir.lock: before[run_dir.lock]}  # hold() opened it


def test_the_lock_of_a_reader_stops_no_run(tmp_path: Path) -> None:
    """`list` and a run that begins may meet; and two lists see the same."""
    import fcntl
    import threading

    run_dir = write_run(tmp_path / "a", status="running")
    with run_dir.lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert listed(tmp_path)["a"].status == "crashed"
        threading.Timer(0.03, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        with hold(run_dir):
            pass


def test_damaged_and_missing_files_stop_nothing(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", step=9)
    with run_dir.metrics.open("a") as file:
        file.write('no json\n[1]\n{"step": 10, "loss": 5.5')
    for name in ("plan.json", "provenance.json"):
        (run_dir.path / name).write_text("{")
    run_dir.snapshot.write_text("model: [1, 2\n")
    empty = write_run(tmp_path / "b")
    for path in (empty.status, empty.plan, empty.provenance, empty.metrics):
        path.unlink()
    closed = write_run(tmp_path / "c")
    closed.metrics.unlink()
    closed.metrics.mkdir()  # reading it is an error, even for root
    found = listed(tmp_path)
    assert (found["a"].step, found["a"].loss, found["a"].steps) == (9, 5.991, None)
    assert (found["b"].status, found["b"].step) == ("unknown", None)
    assert found["c"].status == "unreadable"
    lines = render_list(list(found.values()), root=tmp_path, width=None)
    assert " ".join(lines[1].split()) == "a - completed - 9 5.9910 6.2500 1,234"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_of_others_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a")
    run_dir.path.chmod(0)
    try:
        assert listed(tmp_path)["a"].status == "unreadable"
    finally:
        run_dir.path.chmod(0o700)


def test_a_narrow_terminal_gets_narrow_lines(tmp_path: Path) -> None:
    write_run(tmp_path / "2026-05-04" / "03-02-01-123456")
    write_run(tmp_path / "sweeps" / "2026-05-04" / "03-02-01" / ("1-lr=" + "9" * 90))
    runs = list_runs(tmp_path)
    for width in (30, 60, 100):
        lines = render_list(runs, root=tmp_path, width=width)
        assert max(map(len, lines[: lines.index("")])) <= width
        assert lines[0].startswith("run")
        assert "status" in lines[0]
    assert lines[0].endswith("tokens/s")  # the middle of a path goes before a column
    assert lines[2].startswith("sweeps/")
    assert "...9" in lines[2]
    whole = render_list(runs, root=tmp_path, width=None)
    assert any("9" * 90 in line and "1,234" in line for line in whole)


def test_the_command(tmp_path: Path) -> None:
    assert run_module("list", cwd=tmp_path).stdout == "no runs in outputs\n"
    wrong = run_module("list", "nowhere", cwd=tmp_path)
    fault = "error: nowhere is not a folder\n"
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", fault)
    write_run(tmp_path / "outputs" / "a\x1b[31m\n")
    write_run(tmp_path / "outputs" / "b", status="running")
    done = run_module("list", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a?[31m?  2026-05-04 03:02  completed" in done.stdout  # in a pipe lines stay whole
    assert "1 completed, 1 crashed" in done.stdout
    (crashed,) = json.loads(
        run_module("list", "--status", "crashed", "--json", cwd=tmp_path).stdout
    )
    assert (crashed["path"], crashed["kind"], crashed["step"]) == ("outputs/b", "run", 3)
    none = run_module("list", "--status", "failed", cwd=tmp_path)
    assert none.stdout == "no failed runs in outputs\n"


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "snapshot.yaml").touch()
    words = [sys.executable, "-m", "llama_pretrain", "list", str(tmp_path)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"run")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_five_hundred_runs_take_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last evaluation is far back in a long file, which is the slow case."""
    first = write_run(tmp_path / "0", step=3000)
    assert first.metrics.stat().st_size > 200_000
    files = [(path.name, path.read_bytes()) for path in first.path.iterdir()]
    for number in range(1, 500):
        (tmp_path / str(number)).mkdir()
        for name, content in files:
            (tmp_path / str(number) / name).write_bytes(content)
    started = time.process_time()  # not that of others on a busy machine
    assert main(["list", str(tmp_path)]) == 0
    assert time.process_time() - started < 3
    assert capsys.readouterr().out.count("completed") == 501


def test_the_command_is_light() -> None:
    """No library of training is imported, which takes longer than the work."""
    code = (
        "import sys; from llama_pretrain.__main__ import build_parser; build_parser();"
        "print([n for n in ('torch', 'numpy', 'transformers', 'hydra')"
        " if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
