"""Complete checkpoints, and ways to damage them."""

import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from llama_pretrain.checkpoint.manifest import (
    MANIFEST,
    STATE,
    Manifest,
    checkpoint_name,
    rank_file,
    write_manifest,
)
from llama_pretrain.checkpoint.tensors import WEIGHT, fragment_key, write_and_hash, write_tensors

EXAMPLE = Manifest(
    step=2, consumed_samples=8, global_batch_size=4, world_size=2, zero_stage=1, precision="fp32",
    config_hash="0" * 64, data={"tokenizer": "a" * 64}, sample_hash="b" * 16, files={},
)  # fmt: skip
KINDS = [
    *["truncated", "bit flipped", "missing", "bit flipped in the manifest"] * 4,
    *["truncated", "bit flipped"],
    *["manifest truncated", "pickles"] * 2,
    *["extended", "no manifest", "manifest of another version", "another run's", "renamed"],
    *["link outside", "path outside", "bit flipped"],
]
"""Thirty damages of every kind."""


def write_checkpoint(checkpoints: Path, step: int, *, config_hash: str = "0" * 64) -> Path:
    """A complete checkpoint of two ranks."""
    folder = checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    files: dict[str, list[int | str]] = {}
    for rank in range(2):
        values = torch.randn(50)
        kinds = (WEIGHT, "exp_avg", "exp_avg_sq")
        tensors = {fragment_key("w", kind, 50 * rank): values for kind in kinds}
        files[rank_file(rank)] = list(write_tensors(folder / rank_file(rank), tensors))
    for name in (STATE, "metrics.jsonl", "config.json"):
        files[name] = list(write_and_hash(folder / name, [b'{"parameters": {"w": [100]}}\n']))
    write_manifest(folder, replace(EXAMPLE, step=step, files=files, config_hash=config_hash))
    return folder


def damage(
    folder: Path, kind: str, generator: random.Random, *, config_hash: str = "0" * 64
) -> str:
    """Damage a checkpoint. Returns the message that must report it."""
    manifest = folder / MANIFEST
    match kind:
        case "no manifest":
            manifest.unlink()
            return "is incomplete: it has no manifest.json"
        case "manifest truncated":
            content = manifest.read_bytes()
            manifest.write_bytes(content[: generator.randrange(len(content) - 2)])
            return "its manifest cannot be read"
        case "manifest of another version":
            values = json.loads(manifest.read_text())
            del values["config_hash"]
            manifest.write_text(json.dumps(values))
            return "its manifest cannot be read"
        case "another run's":
            step = int(folder.name[5:])
            shutil.rmtree(folder)
            write_checkpoint(folder.parent, step, config_hash="f" * 64)
            return "is of another run"
        case "renamed":
            shutil.rmtree(folder)
            write_checkpoint(folder.parent, 1, config_hash=config_hash).rename(folder)
            return "is of step 1"
        case "pickles":
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps({"module": {}}))
            return "was written by another program (found mp_rank_00_model_states.pt"
        case "link outside":
            target = folder.parent / "elsewhere"
            (folder / rank_file(1)).rename(target)
            os.symlink(target, folder / rank_file(1))
            return "rank00001.safetensors is outside of the checkpoint"
        case "path outside":
            values = json.loads(manifest.read_text())
            del values["sha256"]
            values["files"]["../../secret"] = [1, "0"]
            write_manifest(folder, Manifest(**values))
            return "../../secret is outside of the checkpoint"
    files = [path for path in sorted(folder.glob("*")) if path != manifest]
    victim = manifest if kind.endswith("manifest") else generator.choice(files)
    return _damage_content(victim, kind, generator)


def _damage_content(victim: Path, kind: str, generator: random.Random) -> str:
    content = victim.read_bytes()
    sizes = f"{victim.name} must have {len(content)} bytes"
    if kind == "missing":
        victim.unlink()
        return f"{victim.name} is missing"
    if kind == "truncated":
        size = generator.randrange(len(content))
        victim.write_bytes(content[:size])
        return f"{sizes} (got {size})"
    if kind == "extended":
        victim.write_bytes(content + b"x")
        return f"{sizes} (got {len(content) + 1})"
    assert kind.startswith("bit flipped")
    flipped = bytearray(content)
    flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    victim.write_bytes(bytes(flipped))
    if victim.name == MANIFEST:
        return "its manifest cannot be read"
    return f"the contents of {victim.name} have changed"
