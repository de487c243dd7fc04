"""Which checkpoints of a run are complete, judged by their manifests; needs no torch."""

import contextlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llama_pretrain.files import hash_file, hash_text, parse_json, read_regular, write_json

MANIFEST = "manifest.json"
LATEST = "latest"
STATE = "state.json"
"""Everything of a checkpoint that is not a tensor."""
INDEX = "index.json"
"""Which rank's file holds which elements of each parameter and of its state."""
METRICS = "metrics.jsonl"
"""A checkpoint's copy of the run's metrics at that step."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds. Written last, so a checkpoint without one is incomplete."""

    step: int
    consumed_samples: int
    """Global positions of the data order that have been consumed."""
    global_batch_size: int
    world_size: int
    zero_stage: int
    precision: str
    config_hash: str
    """Hash of the settings that must not change within a run."""
    data: dict[str, str]
    """The data's fingerprint: hashes of the tokenizer and of each source, and the settings that
    decide which tokens a position has."""
    sample_hash: str
    """Hash of the last step's global batch."""
    files: dict[str, list[int | str]]
    """Name -> size in bytes and SHA-256."""


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """The file name of one rank's tensors."""
    return f"rank{rank:05d}.safetensors"


def list_folders(checkpoints: Path) -> list[Path]:
    """The folders with a checkpoint's name, by step. Everything else there is not ours."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(
            path
            for path in checkpoints.iterdir()
            if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir() and not path.is_symlink()
        )
    return []


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a checkpoint folder complete. The last key is a hash of the keys before it."""
    values = asdict(manifest)
    values["sha256"] = _hash_values(values)
    write_json(folder / MANIFEST, values)


def _hash_values(values: dict[str, Any]) -> str:
    return hash_text(json.dumps(values, indent=2))


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: if it is missing, truncated, or written by another program.
    """
    path = folder / MANIFEST
    if not path.is_file():
        pickles = sorted(file.name for file in folder.rglob("*.pt"))
        if pickles:
            raise ValueError(f"was written by another program (found {pickles[0]}, no {MANIFEST})")
        raise ValueError(f"is incomplete: it has no {MANIFEST}")
    try:
        values = parse_json(read_regular(path))
        if not isinstance(values, dict) or values.pop("sha256", None) != _hash_values(values):
            raise ValueError("its contents have changed")
        return TypeAdapter(Manifest).validate_python(values)
    except (ValueError, OSError) as error:
        lines = str(error).splitlines()
        raise ValueError(f"its manifest cannot be read: {' '.join(lines[:3])}") from error


def find_fault(folder: Path, *, config_hash: str | None = None) -> str | None:
    """Why a checkpoint cannot be used; `None` if every file is as it was written.

    Args:
        config_hash: the hash of the run that it must belong to; `None` accepts any run.
    """
    try:
        manifest = read_manifest(folder)
        if config_hash not in (None, manifest.config_hash):
            return "is of another run: its model, optimizer, seed or precision differ"
        if folder.name != checkpoint_name(manifest.step):
            return f"is of step {manifest.step}"
        return find_damaged_file(folder, manifest)
    except (ValueError, OSError) as error:
        return str(error)


def find_damaged_file(folder: Path, manifest: Manifest, *, hashes: bool = True) -> str | None:
    """The first file that is missing, too many or changed; only sizes without `hashes`."""
    wanted = {rank_file(rank) for rank in range(manifest.world_size)}
    for name in sorted({*wanted, STATE} - manifest.files.keys()):
        return f"its manifest lacks {name}"
    present = {path.name for path in folder.glob("rank*.safetensors")} | manifest.files.keys()
    for name in sorted(present - wanted):
        if name.startswith("rank"):
            return f"{name} is not of its {manifest.world_size} ranks"
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            return f"{name} is outside of the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} must have {size} bytes (got {path.stat().st_size})"
        if hashes and hash_file(path) != digest:
            return f"the contents of {name} have changed"
    return None


def newest_complete(
    checkpoints: Path, *, config_hash: str | None = None
) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a message for each newer one that was skipped."""
    skipped: list[str] = []
    for folder in reversed(list_folders(checkpoints)):
        fault = find_fault(folder, config_hash=config_hash)
        if fault is None:
            return folder, skipped
        skipped.append(f"{folder.name} is skipped: {fault}")
    return None, skipped


def _list_complete(checkpoints: Path) -> list[Path]:
    """Checkpoints with the manifest of their step; files are not read."""
    return [path for path in list_folders(checkpoints) if _has_own_manifest(path)]


def _has_own_manifest(folder: Path) -> bool:
    try:
        return checkpoint_name(read_manifest(folder).step) == folder.name
    except (ValueError, OSError):
        return False


def newest_of(checkpoints: Path) -> Path | None:
    """The newest checkpoint that has a manifest; its files are not checked."""
    return next(reversed(_list_complete(checkpoints)), None)


def forget_after(checkpoints: Path, *, step: int) -> None:
    """Delete the checkpoints of steps that are about to be repeated."""
    for folder in list_folders(checkpoints):
        if folder.name > checkpoint_name(step):
            make_way(folder)


def make_way(folder: Path) -> None:
    """Delete a checkpoint; rename a folder that only has the name of one."""
    if _has_own_manifest(folder):
        discard(folder)
        return
    number = 1
    while (renamed := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    folder.rename(renamed)


def prune(checkpoints: Path, *, keep_last: int, keep_every_steps: int | None = None) -> None:
    """Delete all but the newest complete checkpoints and every `keep_every_steps`-th step."""
    for folder in _list_complete(checkpoints)[:-keep_last]:
        step = int(folder.name.removeprefix("step-"))
        if keep_every_steps is None or step % keep_every_steps:
            discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that no partial checkpoint remains if killed."""
    renamed = folder.with_name(f".tmp-discarded-{folder.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed)


def temporary_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return checkpoints / f".tmp-{checkpoint_name(step)}"


def delete_temporary(checkpoints: Path) -> None:
    """Delete what interrupted saves and deletions have left."""
    for path in checkpoints.glob(".tmp-*"):
        if re.fullmatch(r"\.tmp-(discarded-)?step-\d{8}", path.name) and not path.is_symlink():
            shutil.rmtree(path)
