"""What benchmarks share: a run of ours, and results as JSON with their provenance."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row, read_metrics
from llama_pretrain.runs.provenance import collect_provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FACTS = ("time", "argv", "git_commit", "git_changed_files", "python", "platform", "cpu", "machine")
"""The part of a run's provenance that says how a measurement was made."""


def run_ours(run_dir: Path, *overrides: str) -> list[Row]:
    """Execute `python run.py` with overrides, and return its metrics.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    command = [sys.executable, str(ROOT / "run.py"), *overrides, f"hydra.run.dir={run_dir}"]
    pipe, out = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=pipe, stderr=out)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout[-3000:]}")
    return read_metrics(RunDir(run_dir).metrics)


def write_record(
    name: str, values: Mapping[str, Any], *, packages: Sequence[str], folder: Path = RESULTS
) -> None:
    """Write NAME.json with its provenance into a folder."""
    record = {"provenance": describe_measurement(packages), **values}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def describe_measurement(packages: Sequence[str]) -> dict[str, Any]:
    """Command, commit, node and versions of the installed packages."""
    facts = collect_provenance(argv=sys.argv, root=ROOT, machine=asdict(detect_machine()))
    installed = {found.name: found.version for found in distributions() if found.name in packages}
    return {key: facts[key] for key in FACTS} | {"packages": installed}
