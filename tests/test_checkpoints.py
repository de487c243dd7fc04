"""Checkpoints that are damaged, torn or from elsewhere are passed over, by name."""

import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_pretrain.checkpoint.manifest import MANIFEST as MANIFEST_NAME
from llama_pretrain.checkpoint.manifest import (
    Manifest,
    checkpoint_name,
    find_fault,
    newest_complete,
    prune,
    write_manifest,
)
from llama_pretrain.checkpoint.tensors import (
    STATE,
    WEIGHT,
    piece_key,
    rank_file,
    write_bytes,
    write_tensors,
)

MANIFEST = Manifest(
    step=2,
    consumed_samples=8,
    global_batch_size=4,
    world_size=2,
    zero_stage=1,
    precision="fp32",
    config_hash="0" * 64,
    data={"tokenizer": "a" * 64},
    sample_hash="b" * 16,
    files={},
)


def write_checkpoint(checkpoints: Path, step: int, *, config_hash: str = "0" * 64) -> Path:
    """A whole one of two ranks."""
    folder = checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    files: dict[str, list[int | str]] = {}
    for rank in range(2):
        values = torch.randn(50)
        tensors = {
            piece_key("w", kind, 50 * rank): values for kind in (WEIGHT, "exp_avg", "exp_avg_sq")
        }
        files[rank_file(rank)] = list(write_tensors(folder / rank_file(rank), tensors))
    for name in (STATE, "metrics.jsonl", "config.json"):
        files[name] = list(write_bytes(folder / name, [b'{"parameters": {"w": [100]}}\n']))
    write_manifest(folder, replace(MANIFEST, step=step, files=files, config_hash=config_hash))
    return folder


def damage(
    folder: Path, kind: str, generator: random.Random, *, config_hash: str = "0" * 64
) -> str:
    """Spoil a checkpoint. Returns what must be said of it."""
    victim = generator.choice(sorted(folder.glob("*")))
    if kind == "no manifest":
        (folder / MANIFEST_NAME).unlink()
        return "has no manifest: its save was cut short"
    if kind == "cut manifest":
        content = (folder / MANIFEST_NAME).read_bytes()
        (folder / MANIFEST_NAME).write_bytes(content[: generator.randrange(len(content) - 2)])
        return "its manifest can't be read"
    if kind == "manifest of another version":
        values = json.loads((folder / MANIFEST_NAME).read_text())
        del values["config_hash"]
        (folder / MANIFEST_NAME).write_text(json.dumps(values))
        return "its manifest can't be read"
    if kind == "another run's":
        step = int(folder.name[5:])
        shutil.rmtree(folder)
        write_checkpoint(folder.parent, step, config_hash="f" * 64)
        return "is of another run"
    if kind == "renamed":
        shutil.rmtree(folder)
        write_checkpoint(folder.parent, 1, config_hash=config_hash).rename(folder)
        return "is of step 1"
    if kind == "pickles":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps({"module": {}}))
        return "is from elsewhere: no manifest, and pickles such as mp_rank_00_model_states.pt"
    if kind == "a link out":
        victim = folder / rank_file(1)
        elsewhere = folder.parent / "elsewhere"
        victim.rename(elsewhere)
        os.symlink(elsewhere, victim)
        return "rank00001.safetensors lies outside of it"
    if kind == "a path out":
        values = json.loads((folder / MANIFEST_NAME).read_text())
        del values["sha256"]
        values["files"]["../../secret"] = [1, "0"]
        write_manifest(folder, Manifest(**values))
        return "../../secret lies outside of it"
    if kind == "bit flipped in the manifest":
        victim = folder / MANIFEST_NAME
    while victim.name == MANIFEST_NAME and not kind.endswith("manifest"):
        victim = generator.choice(sorted(folder.glob("*")))
    content = victim.read_bytes()
    if kind == "missing":
        victim.unlink()
        return f"{victim.name} is missing"
    if kind == "truncated":
        size = generator.randrange(len(content))
        victim.write_bytes(content[:size])
        return f"{victim.name} has {size} bytes instead of {len(content)}"
    if kind == "longer":
        victim.write_bytes(content + b"x")
        return f"{victim.name} has {len(content) + 1} bytes instead of {len(content)}"
    assert kind.startswith("bit flipped")
    place, bit = generator.randrange(len(content)), generator.randrange(8)
    flipped = bytearray(content)
    flipped[place] ^= 1 << bit
    victim.write_bytes(bytes(flipped))
    if victim.name == MANIFEST_NAME:
        return "its manifest can't be read"
    return f"the contents of {victim.name} have changed"


KINDS = [
    *["truncated", "bit flipped", "missing", "bit flipped in the manifest"] * 4,
    *["truncated", "bit flipped"],
    *["cut manifest", "pickles"] * 2,
    "longer",
    "no manifest",
    "manifest of another version",
    "another run's",
    "renamed",
    "a link out",
    "a path out",
    "bit flipped",
]
"""Thirty, and every kind."""


@pytest.mark.parametrize(("number", "kind"), list(enumerate(KINDS)))
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, number: int, kind: str
) -> None:
    whole, spoilt = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 7)
    assert newest_complete(tmp_path, config_hash="0" * 64) == (spoilt, [])
    told = damage(spoilt, kind, random.Random(number))
    found, lines = newest_complete(tmp_path, config_hash="0" * 64)
    assert found == whole
    assert len(lines) == 1
    assert lines[0].startswith(f"{spoilt.name} is passed over: {told}")


def test_there_are_thirty() -> None:
    assert len(KINDS) == 30


def test_a_torn_save_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 7).rename(tmp_path / ".tmp-step-00000007")
    assert newest_complete(tmp_path)[0] == tmp_path / "step-00000003"


def test_an_unreadable_file_is_a_fault(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    (folder / rank_file(0)).unlink()
    (folder / rank_file(0)).mkdir()
    assert find_fault(folder) == "rank00000.safetensors is missing"


@pytest.mark.parametrize(
    ("every", "kept"), [(None, [9, 10]), (4, [4, 8, 9, 10]), (10, [9, 10]), (3, [3, 6, 9, 10])]
)
def test_what_is_kept(tmp_path: Path, every: int | None, kept: list[int]) -> None:
    for step in range(1, 11):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, keep_last=2, keep_every_steps=every)
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))] == kept
