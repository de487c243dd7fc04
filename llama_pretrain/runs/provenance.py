"""provenance.json: what a run was made with, beside its config."""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "hydra-core", "omegaconf", "tokenizers", "numpy")


def collect_provenance(
    *, argv: Sequence[str], root: Path, machine: dict[str, Any]
) -> dict[str, Any]:
    """Code, packages, machine and command line, as plain values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(argv),
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_changed_files": (_git(root, "status", "--porcelain") or "").splitlines(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "machine": machine,
    }


def render_provenance(values: dict[str, Any]) -> str:
    """The text of provenance.json."""
    return json.dumps(values, indent=2) + "\n"


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or sys.platform
