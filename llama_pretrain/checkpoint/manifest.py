"""Which checkpoints of a run are whole: told by their manifests, without torch."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llama_pretrain.files import write_text

MANIFEST = "manifest.json"


LATEST = "latest"


METRICS = "metrics.jsonl"
"""A checkpoint's copy of what the run had measured by then."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds; written last, so that a checkpoint without one is torn."""

    step: int
    consumed_samples: int
    """Global positions of the data order that are behind it."""
    global_batch_size: int
    world_size: int
    zero_stage: int
    precision: str
    config_hash: str
    """Of what a run must keep to be the same run."""
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
    """Make a checkpoint folder complete. The last line is a hash of what stands before it."""
    values = asdict(manifest)
    values["sha256"] = _hash_of(values)
    write_text(folder / MANIFEST, json.dumps(values, indent=2) + "\n")


def _hash_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, indent=2).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: if it is missing, cut short, or not ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        pickles = sorted(file.name for file in folder.rglob("*.pt"))
        if pickles:
            raise ValueError(f"is from elsewhere: no manifest, and pickles such as {pickles[0]}")
        raise ValueError("has no manifest: its save was cut short")
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or values.pop("sha256", None) != _hash_of(values):
            raise ValueError("its contents have changed")
        return TypeAdapter(Manifest).validate_python(values)
    except (ValueError, OSError) as error:
        lines = str(error).splitlines()
        raise ValueError(f"its manifest can't be read: {' '.join(lines[:3])}") from error


def find_fault(folder: Path, *, config_hash: str | None = None) -> str | None:
    """Why a checkpoint can't be used, or `None` if every file is as it was written.

    Args:
        config_hash: of the run that it should be of; `None` takes any run's.
    """
    try:
        manifest = read_manifest(folder)
        if config_hash not in (None, manifest.config_hash):
            return "is of another run: its model, optimizer, seed or precision differ"
        if folder.name != checkpoint_name(manifest.step):
            return f"is of step {manifest.step}"
        if not manifest.files:
            return "its manifest names no files"
        for name, (size, digest) in manifest.files.items():
            if fault := _find_fault_of_file(folder, name, size, digest):
                return fault
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _find_fault_of_file(folder: Path, name: str, size: int | str, digest: int | str) -> str | None:
    path = folder / name
    if Path(name).name != name or path.is_symlink():
        return f"{name} lies outside of it"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes instead of {size}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            return f"the contents of {name} have changed"
    return None


def newest_complete(
    checkpoints: Path, *, config_hash: str | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that was passed over."""
    passed_over: list[str] = []
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        fault = find_fault(folder, config_hash=config_hash)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} is passed over: {fault}")
    return None, passed_over


def newest_of(checkpoints: Path) -> Path | None:
    """The newest one that has a manifest; its files are not looked into."""
    complete = [path for path in sorted(checkpoints.glob("step-*")) if (path / MANIFEST).is_file()]
    return complete[-1] if complete else None


def forget_after(checkpoints: Path, *, step: int) -> None:
    """Delete checkpoints of steps that are about to be done again: passed over, or foreign."""
    for folder in checkpoints.glob("step-*"):
        if folder.name > checkpoint_name(step):
            discard(folder)


def prune(checkpoints: Path, *, keep_last: int, keep_every_steps: int | None = None) -> None:
    """Delete all but the newest complete checkpoints and those that are kept for good."""
    complete = [path for path in sorted(checkpoints.glob("step-*")) if (path / MANIFEST).is_file()]
    for folder in complete[:-keep_last]:
        step = int(folder.name.removeprefix("step-"))
        if keep_every_steps is None or step % keep_every_steps:
            discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. Its name goes first: killed in the middle, no half of one is left."""
    doomed = folder.with_name(f".tmp-discarded-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
