"""A save that fails for want of space, or on a broken disk, leaves the older checkpoints alone."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.checkpoint.load import CheckpointError, load_checkpoint
from llama_pretrain.checkpoint.manifest import find_fault, newest_complete
from llama_pretrain.checkpoint.save import Saver
from llama_pretrain.config.run import Run
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import Corpus, Plan, SourceTokens, build_plan
from llama_pretrain.plan.resolve import resolve_choices
from tests.conftest import compose_run, small_disk
from tests.test_train import own_linear, random_batches
from tests.test_train_state import RANK, engine_at, step

__all__ = ["own_linear"]  # a fixture

SOURCE = SourceTokens(
    name="stdlib",
    tokens_dir="/nowhere",
    data_hash="0" * 64,
    train_rows=1000,
    train_tokens=32_000,
    heldout_rows=10,
    heldout_bytes_per_token=3.0,
)
CORPUS = Corpus(
    tokenizer_dir="/nowhere",
    tokenizer_hash="1" * 64,
    tokenizer_size=64,
    eos_id=0,
    content_hash="2" * 64,
    fingerprint={"tokenizer": "1" * 64},
    sources=[SOURCE],
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    with small_disk(tmp_path / "checkpoints", "420k") as folder:
        yield folder


AT_ONCE = "checkpoint.asynchronous=false"


def run_and_plan(*words: str) -> tuple[Run, Plan]:
    small = ("launch.device=cpu", "launch.num_processes=1", "batch.global_batch_size=2")
    run = resolve_choices(compose_run([*small, *words]), detect_machine())
    return run, build_plan(run, CORPUS)


def saver_of(engine: Any, folder: Path, *words: str) -> Saver:
    at_once = () if any("asynchronous" in word for word in words) else (AT_ONCE,)
    return Saver(engine, *run_and_plan(*at_once, *words), RANK, folder)


def save(saver: Saver, number: int) -> list[dict[str, Any]]:
    return saver.begin(
        number,
        consumed_samples=2 * number,
        sample_hash="",
        progress={"step": number},
        files={"metrics.jsonl": b"{}\n"},
    )


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.usefixtures("process_group")
def test_a_full_disk_is_told_and_survived(
    disk: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    engine = engine_at(1)
    saver = saver_of(engine, disk, f"checkpoint.asynchronous={asynchronous}")
    for batch in random_batches(2):
        step(engine, batch)
    rows = save(saver, 1) + saver.finish()
    assert [row.get("checkpoint") for row in rows] == ["step-00000001"]
    (told,) = save(saver, 2) + saver.finish()
    assert told["checkpoint_error"].startswith("step-00000002 was not written: it takes 0.")
    # The disk is filled between the look and the write.
    plenty = shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    (told,) = save(saver, 2) + saver.finish()
    assert told == {
        "step": 2,
        "tokens": 2 * 2 * 256,
        "checkpoint_error": "step-00000002 was not written: No space left on device (rank 0)",
    }
    assert [path.name for path in disk.glob("step-*")] == ["step-00000001"]
    assert not list(disk.glob(".tmp-*"))
    assert newest_complete(disk) == (disk / "step-00000001", [])
    assert load_checkpoint(engine_at(1), disk / "step-00000001", RANK) == {"step": 1}
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    (row,) = save(saver, 3) + saver.finish()
    assert row["checkpoint"] == "step-00000003"
    assert find_fault(disk / "step-00000003") is None


@pytest.mark.usefixtures("process_group")
def test_a_run_may_stop_for_it(disk: Path) -> None:
    engine = engine_at(1)
    saver = saver_of(engine, disk, "checkpoint.on_error=stop")
    for batch in random_batches(2):
        step(engine, batch)
    save(saver, 1)
    with pytest.raises(CheckpointError, match="step-00000002 was not written: it takes 0"):
        save(saver, 2)
    assert find_fault(disk / "step-00000001") is None


@pytest.mark.usefixtures("process_group")
def test_a_broken_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    (told,) = save(saver_of(engine_at(1), tmp_path / "checkpoints"), 1)
    assert "step-00000001 was not written: File exists" in told["checkpoint_error"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_an_asynchronous_save_is_of_its_step(tmp_path: Path, stage: int) -> None:
    """Training goes on at once, and what is written is what was there."""
    engine, batches = engine_at(stage), random_batches(6)
    plain, other = saver_of(engine, tmp_path / "plain"), None
    for batch in batches[:3]:
        step(engine, batch)
    save(plain, 3)
    other = saver_of(engine, tmp_path / "other", "checkpoint.asynchronous=true")
    save(other, 3)
    for batch in batches[3:]:
        step(engine, batch)
    (row,) = other.finish()
    assert row["checkpoint_stall_seconds"] < row["checkpoint_seconds"]
    name = "step-00000003/rank00000.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
