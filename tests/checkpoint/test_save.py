"""A failed save leaves older checkpoints intact; an asynchronous one is a snapshot of its step."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.checkpoint.engine_state import load_checkpoint
from llama_pretrain.checkpoint.manifest import find_fault, newest_complete
from llama_pretrain.checkpoint.save import CheckpointError, Saver
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import build_training_plan
from llama_pretrain.runs.metrics import CheckpointRow
from tests.conftest import small_disk
from tests.machines import plan_for_cluster
from tests.plan.test_plan import CORPUS
from tests.train.engines import RANK, build_small_engine, random_batches, take_step

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one and a half checkpoints."""
    with small_disk(tmp_path / "checkpoints", "420k") as folder:
        yield folder


def build_saver(
    engine: Any, folder: Path, *words: str, asynchronous: bool = False, num_steps: int = 0
) -> Saver:
    """A saver of an engine that has taken some steps."""
    small = ("launch.device=cpu", "launch.num_processes=1", "batch.global_batch_size=2")
    saves = f"checkpoint.asynchronous={asynchronous}"
    run = plan_for_cluster(*small, saves, *words, machine=detect_machine())
    for batch in random_batches(num_steps):
        take_step(engine, batch)
    return Saver(engine, run, build_training_plan(run, CORPUS), RANK, folder)


def save(saver: Saver, step: int) -> list[CheckpointRow]:
    more: Any = {"progress": {"step": step}, "files": {"metrics.jsonl": b"{}\n"}}
    return saver.begin(step, consumed_samples=2 * step, sample_hash="", **more)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_reported_and_survived(
    disk: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    saver = build_saver(build_small_engine(1), disk, asynchronous=asynchronous, num_steps=2)
    rows = save(saver, 1) + saver.finish()
    assert [row.checkpoint for row in rows] == ["step-00000001"]
    (row,) = save(saver, 2) + saver.finish()
    assert row.checkpoint_error.startswith("step-00000002 was not written: it needs 0.")
    # The disk fills up between the check and the write.
    plenty = shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    (row,) = save(saver, 2) + saver.finish()
    fault = "step-00000002 was not written: No space left on device (rank 0)"
    assert row == CheckpointRow(step=2, tokens=2 * 2 * 256, checkpoint_error=fault)
    assert [path.name for path in disk.glob("*step-*")] == ["step-00000001"]
    assert newest_complete(disk) == (disk / "step-00000001", [])
    assert load_checkpoint(build_small_engine(1), disk / "step-00000001", RANK) == {"step": 1}
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    (row,) = save(saver, 3) + saver.finish()
    assert row.checkpoint == "step-00000003"
    assert find_fault(disk / "step-00000003") is None


def test_a_failed_save_may_stop_the_run(disk: Path) -> None:
    saver = build_saver(build_small_engine(1), disk, "checkpoint.on_error=stop", num_steps=2)
    save(saver, 1)
    with pytest.raises(CheckpointError, match="step-00000002 was not written: it needs 0"):
        save(saver, 2)
    assert find_fault(disk / "step-00000001") is None


def test_an_unusable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    (row,) = save(build_saver(build_small_engine(1), tmp_path / "checkpoints"), 1)
    assert "step-00000001 was not written: File exists" in row.checkpoint_error


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_asynchronous_save_is_a_snapshot_of_its_step(tmp_path: Path, stage: int) -> None:
    """Training continues at once, and the files equal those of a synchronous save."""
    engine = build_small_engine(stage)
    save(build_saver(engine, tmp_path / "synchronous", num_steps=3), 3)
    saver = build_saver(engine, tmp_path / "asynchronous", asynchronous=True)
    save(saver, 3)
    for batch in random_batches(3):
        take_step(engine, batch)
    (row,) = saver.finish()
    assert (row.checkpoint_stall_seconds or 0) < (row.checkpoint_seconds or 0)
    file = "step-00000003/rank00000.safetensors"
    first, second = (tmp_path / name / file for name in ("synchronous", "asynchronous"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad luck"), SystemExit(3)])
def test_whatever_goes_wrong_is_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, error: BaseException
) -> None:
    """The older checkpoint stays, and the next save works."""
    words = ("checkpoint.keep_last=1",)
    saver = build_saver(build_small_engine(1), tmp_path, *words, asynchronous=asynchronous)
    save(saver, 1)
    saver.finish()

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("llama_pretrain.checkpoint.save.write_tensors", fail)
        (row,) = save(saver, 2) + saver.finish()
    text = {"MemoryError": "MemoryError", "RuntimeError": "RuntimeError: bad luck"}
    expected = text.get(type(error).__name__, "SystemExit: 3")
    assert row.checkpoint_error == f"step-00000002 was not written: {expected} (rank 0)"
    assert newest_complete(tmp_path) == (tmp_path / "step-00000001", [])
    (row,) = save(saver, 3) + saver.finish()
    assert newest_complete(tmp_path) == (tmp_path / "step-00000003", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_nothing_is_deleted_before_the_new_checkpoint_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that reports success and leaves a short file."""
    saver = build_saver(build_small_engine(1), tmp_path, "checkpoint.keep_last=1")
    save(saver, 1)

    def lose(path: Path, chunks: object) -> tuple[int, str]:
        path.write_bytes(b"")
        return 7, "0" * 64

    monkeypatch.setattr("llama_pretrain.checkpoint.save.write_and_hash", lose)
    (row,) = save(saver, 2)
    assert "must have 7 bytes (got 0)" in row.checkpoint_error
    assert newest_complete(tmp_path) == (tmp_path / "step-00000001", [])


def test_a_folder_in_the_way_is_renamed(tmp_path: Path) -> None:
    saver = build_saver(build_small_engine(1), tmp_path)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "notes.txt").write_text("mine")
    (row,) = save(saver, 2)
    assert row.checkpoint == "step-00000002"
    assert find_fault(tmp_path / "step-00000002") is None
    assert (tmp_path / "step-00000002.damaged-1" / "notes.txt").read_text() == "mine"
