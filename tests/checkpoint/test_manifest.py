"""Damaged, incomplete and foreign checkpoints are skipped, each with its reason."""

import random
import shutil
from pathlib import Path

import pytest

from llama_pretrain.checkpoint.manifest import (
    delete_temporary,
    find_fault,
    forget_after,
    newest_complete,
    newest_of,
    prune,
    rank_file,
    read_manifest,
    write_manifest,
)
from tests.checkpoint.damage import KINDS, damage, write_checkpoint


@pytest.mark.parametrize(("number", "kind"), list(enumerate(KINDS)))
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, number: int, kind: str) -> None:
    complete, damaged = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 7)
    assert newest_complete(tmp_path, config_hash="0" * 64) == (damaged, [])
    message = damage(damaged, kind, random.Random(number))
    found, lines = newest_complete(tmp_path, config_hash="0" * 64)
    assert found == complete
    assert len(lines) == 1
    assert lines[0].startswith(f"{damaged.name} is skipped: {message}")


def test_an_incomplete_save_is_no_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 7).rename(tmp_path / ".tmp-step-00000007")
    assert newest_complete(tmp_path)[0] == folder
    (folder / rank_file(0)).unlink()
    (folder / rank_file(0)).mkdir()
    assert find_fault(folder) == "rank00000.safetensors is missing"


@pytest.mark.parametrize(
    ("every", "kept"), [(None, [9, 10]), (4, [4, 8, 9, 10]), (10, [9, 10]), (3, [3, 6, 9, 10])]
)
def test_prune(tmp_path: Path, every: int | None, kept: list[int]) -> None:
    for step in range(1, 11):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, keep_last=2, keep_every_steps=every)
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))] == kept


def test_only_checkpoints_count_and_only_they_are_deleted(tmp_path: Path) -> None:
    """Whatever else lies there, or has a name like a checkpoint's, stays."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 4).rename(tmp_path / "step-zz")
    write_checkpoint(tmp_path, 5).rename(tmp_path / "step-00000009.bak")
    write_checkpoint(tmp_path, 6).rename(tmp_path / "step-00000008")  # not of its step
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-10")
    (tmp_path / "step-00000007").write_text("a file")
    (tmp_path / "step-00000006").symlink_to(tmp_path / "step-00000003")
    (tmp_path / ".tmp-mine").mkdir()
    foreign = {path.name for path in tmp_path.iterdir()}
    foreign -= {f"step-0000000{step}" for step in (1, 2, 3)}
    found, skipped = newest_complete(tmp_path)
    assert found == newest_of(tmp_path) == tmp_path / "step-00000003"
    assert skipped == ["step-00000008 is skipped: is of step 6"]
    delete_temporary(tmp_path)
    prune(tmp_path, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == foreign | {"step-00000003"}
    forget_after(tmp_path, step=2)
    renamed = foreign - {"step-00000008"} | {"step-00000008.damaged-1"}
    assert {path.name for path in tmp_path.iterdir()} == renamed


@pytest.mark.parametrize("name", ["rank00000.safetensors", "rank00001.safetensors", "state.json"])
def test_a_manifest_lists_the_files_of_all_its_ranks(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    manifest = read_manifest(folder)
    del manifest.files[name]
    write_manifest(folder, manifest)
    assert find_fault(folder) == f"its manifest lacks {name}"


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_of_another_rank_does_not_belong(tmp_path: Path, listed: bool) -> None:
    """A reader would take its tensors for the checkpoint's."""
    folder = write_checkpoint(tmp_path, 3)
    shutil.copy(folder / rank_file(1), folder / rank_file(2))
    manifest = read_manifest(folder)
    if listed:
        manifest.files[rank_file(2)] = manifest.files[rank_file(1)]
        write_manifest(folder, manifest)
    assert find_fault(folder) == "rank00002.safetensors is not of its 2 ranks"
