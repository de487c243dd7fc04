"""What benchmarks share: runs that only step, and results as JSON with their provenance."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.provenance import collect_provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FACTS = ("time", "argv", "git_commit", "git_changed_files", "python", "platform", "cpu", "machine")
"""What of a run's provenance says how a measurement was made."""

STEPS_ALONE = (
    "train.eval_every_steps=null",
    "train.eval_sequences=2",
    "train.sample_prompt=''",
    "checkpoint.every_steps=null",
    "checkpoint.at_end=false",
    "checkpoint.export=false",
    "monitor=none",
    "launch.device=cpu",
)
"""A run of steps, and of next to nothing else."""


def train_alone(run_dir: Path, *words: str) -> None:
    """Train on a CPU with these overrides.

    Raises:
        SystemExit: with the end of what it printed, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "run.py", *STEPS_ALONE, *words, f"hydra.run.dir={run_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stdout[-3000:]}")


def write_record(
    name: str, values: Mapping[str, Any], *, packages: Sequence[str], folder: Path = RESULTS
) -> Path:
    """Write NAME.json into a folder. Returns its path."""
    provenance = describe_measurement(packages)
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance, **values}, indent=1) + "\n")
    return path


def describe_measurement(packages: Sequence[str]) -> dict[str, Any]:
    """What a measurement was made with: command, commit, machine, versions of packages."""
    facts = collect_provenance(argv=sys.argv, root=ROOT, machine=asdict(detect_machine()))
    return {key: facts[key] for key in FACTS} | {"packages": find_versions(packages)}


def find_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
