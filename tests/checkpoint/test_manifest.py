"""Damaged, incomplete and foreign checkpoints are skipped, each with its reason."""

import random
from pathlib import Path

import pytest

from llama_pretrain.checkpoint.manifest import find_fault, newest_complete, prune
from llama_pretrain.checkpoint.tensors import rank_file
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
