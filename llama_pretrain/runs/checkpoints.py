"""Which checkpoints of a run are whole: told by their manifests, without torch."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_pretrain.runs.rundir import write_text

MANIFEST = "manifest.json"
LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds; written last, so that a checkpoint without one is torn."""

    step: int
    consumed_samples: int
    world_size: int
    zero_stage: int
    precision: str
    data: dict[str, str]
    """The data's fingerprint: hashes of the tokenizer and of each source, and the settings that
    decide which tokens a position has."""
    sample_hash: str
    """Of the last step's global batch."""
    files: dict[str, list[int | str]]
    """Name -> size in bytes and SHA-256."""


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a checkpoint folder complete."""
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def hash_files(folder: Path) -> dict[str, list[int | str]]:
    """Size and SHA-256 of every file below a folder but the manifest."""
    files: dict[str, list[int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # DeepSpeed doesn't; the manifest must not come first
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[str(path.relative_to(folder))] = [path.stat().st_size, digest]
    return files


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: if it is missing, cut short, or not ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError("has no manifest: its save was cut short")
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"its manifest can't be read: {error}") from error


def find_fault(folder: Path) -> str | None:
    """Why a checkpoint can't be used, or `None` if every file is as it was written."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"the contents of {name} have changed"
    return None


def newest_complete(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that was passed over."""
    passed_over: list[str] = []
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} is passed over: {fault}")
    return None, passed_over


def forget_after(checkpoints: Path, *, step: int) -> None:
    """Delete checkpoints of steps that are about to be done again: passed over, or foreign."""
    for folder in checkpoints.glob("step-*"):
        if folder.name > checkpoint_name(step):
            shutil.rmtree(folder)


def prune(checkpoints: Path, *, keep_last: int) -> None:
    """Delete all but the newest complete checkpoints, and what torn saves left."""
    complete = [path for path in sorted(checkpoints.glob("step-*")) if (path / MANIFEST).is_file()]
    torn = [path for path in checkpoints.iterdir() if path.name.startswith(".tmp-")]
    for folder in [*complete[:-keep_last], *torn]:
        shutil.rmtree(folder)
