"""provenance.json: what a run was made with, beside its config. No secret is in it."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama_pretrain.config.secrets import is_secret_file, known_secrets, redact, redact_values
from llama_pretrain.files import write_text
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "tokenizers",
    "safetensors",
    "numpy",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "pyarrow",
    "datasets",
    "ninja",
    "triton",
)
"""Those that a result can depend on; of all others the version is noted too."""
VARIABLES = re.compile(
    r"(?:OMP|MKL|KMP|GOMP|OPENBLAS|NUMEXPR|ONEDNN|DNNL)_\w+|CUDA_\w+|CUBLAS_\w+|CUDNN_\w+|NVIDIA_\w+"
    r"|NCCL_\w+|GLOO_\w+|UCX_\w+|TORCH\w*|PYTORCH_\w+|DS_\w+|DEEPSPEED_\w+|PYTHONHASHSEED"
    r"|ATEN_CPU_CAPABILITY|MALLOC_\w+|LD_PRELOAD|TOKENIZERS_PARALLELISM|HF_HOME|HF_HUB_OFFLINE"
    r"|LLAMA_PRETRAIN_\w+|SLURM_JOB_ID|SLURM_JOB_NODELIST|SLURM_NNODES|SLURM_NTASKS|LANG|LC_ALL|TZ"
)
"""Environment variables that are noted: of how numbers are computed, or of where a run was."""
ISA = re.compile(r"(?:sse4_[12]|avx\w*|amx_\w+|fma|f16c|bf16|asimd\w*|sve\w*|i8mm)")
CPU_INFO = Path("/proc/cpuinfo")
CHANGES = 1 << 20
"""Bytes of changed and untracked files that are kept, in all."""
MAX_UNTRACKED = 200
MAX_DATA_FILES = 20_000
"""Of a source: beyond these its own hash must do."""
GIT_S = 10
KEPT_LAUNCHES = 8
"""Of a run that was resumed: what its earlier launches were made with."""


def collect_provenance(
    *,
    argv: Sequence[str],
    root: Path,
    machine: dict[str, Any],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Code, packages, machine, environment and command line, as plain values without secrets.

    Args:
        root: folder of run.py and of the package.
        environment: `None` = this process's.
    """
    variables = os.environ if environment is None else environment
    known = known_secrets(variables)
    commit = _git(root, "rev-parse", "HEAD")
    values = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(argv),
        "git_commit": commit,
        "git_changed_files": [] if commit is None else _changed_files(root),
        "code": hash_code(root),
        "python": platform.python_version(),
        "packages": list_packages(),
        "libc": "-".join(platform.libc_ver()),
        "host": platform.node(),
        "platform": platform.platform(),
        "paths": {"project": str(root), "python": sys.executable, "folder": os.getcwd()},
        "cpu": cpu_name(),
        "cpu_isa": cpu_isa(),
        "gpus": list_gpus(),
        "machine": machine,
        "environment": {
            name: value for name, value in sorted(variables.items()) if VARIABLES.fullmatch(name)
        },
    }
    redacted = redact_values(values, known=known)
    assert isinstance(redacted, dict)
    return redacted


def render_provenance(values: dict[str, Any]) -> str:
    """The text of provenance.json."""
    return json.dumps(values, indent=2) + "\n"


def read_provenance(run_dir: RunDir) -> dict[str, Any]:
    """What provenance.json says; empty where there is none that can be read."""
    try:
        values = json.loads(run_dir.provenance.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def add_provenance(run_dir: RunDir, **values: Any) -> None:
    """Note what is known only when a run has begun."""
    before = read_provenance(run_dir)
    if any(before.get(name) != value for name, value in values.items()):
        write_text(run_dir.provenance, render_provenance(before | values))


def earlier_launches(run_dir: RunDir) -> list[dict[str, Any]]:
    """What a run that is about to be resumed has been made with so far, the oldest first."""
    newest = read_provenance(run_dir)
    before = newest.pop("earlier_launches", [])
    before = before if isinstance(before, list) else []
    return [*before, newest][-KEPT_LAUNCHES:] if newest else []


def initial_weights(run_dir: RunDir) -> str | None:
    """SHA-256 of the weights that a run began with, as rank 0 has written it."""
    found = (row["initial_weights"] for row in read_metrics(run_dir.metrics) if _has_weights(row))
    return next(found, None)


def list_data_files(metas: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """SHA-256 of the files that each source's tokens were made from, by path.

    Args:
        metas: the source's meta.json (data/meta.py), by the source's name.
    """
    found: dict[str, dict[str, str]] = {}
    for name, path in metas.items():
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["files"]
            found[name] = {str(file): str(digest) for file, _, digest in files[:MAX_DATA_FILES]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _has_weights(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("initial_weights"), str)


def hash_code(root: Path) -> dict[str, str]:
    """SHA-256 of run.py and of every file of the package, by path."""
    files = [root / "run.py", *sorted((root / "llama_pretrain").rglob("*.py"))]
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def list_packages() -> dict[str, str | None]:
    """The version of every installed distribution, by its normalised name.

    From the names of their folders: reading each one's metadata takes ten times as long.
    """
    found: dict[str, str | None] = {}
    for place in sys.path:
        folder = Path(place)
        names = sorted(os.listdir(folder)) if place and folder.is_dir() else []
        for name in names:
            match = re.fullmatch(r"(.+?)-(\d[^-]*)(?:-py[\d.]+)?\.(?:dist|egg)-info", name)
            if match is not None:  # what comes first on the path is what is imported
                found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return {name: found.get(name) or _version(name) for name in PACKAGES} | {
        name: found[name] for name in sorted(found) if name not in PACKAGES
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(CPU_INFO), re.M)
    return match.group(1) if match else platform.processor() or sys.platform


def cpu_isa() -> list[str]:
    """Instruction sets that numbers are computed with."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(CPU_INFO), re.M)
    return sorted({name for name in match[1].split() if ISA.fullmatch(name)}) if match else []


def list_gpus(driver: Path = Path("/proc/driver/nvidia")) -> list[dict[str, str]]:
    """Name and driver of each GPU: from the kernel's module, or else of nvidia-smi, in a second."""
    version = re.search(r"Kernel Module\D*([\d.]+)", _read(driver / "version"))
    models = [
        match[1]
        for file in sorted(driver.glob("gpus/*/information"))
        if (match := re.search(r"^Model:\s*(.+?)\s*$", _read(file), re.M))
    ]
    if version is not None and models:
        return [{"name": name, "driver": version[1]} for name in models]
    program = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = _run([program, *query]) if program else None
    lines = [line.split(", ") for line in (answer or "").splitlines()]
    return [{"name": line[0], "driver": line[1]} for line in lines if len(line) == 2]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _git(root: Path, *words: str) -> str | None:
    # No hooks, no pagers, no filters of the user's own, and no lock taken for a status.
    safe = ["-c", "core.fsmonitor=false", "--no-optional-locks", "--no-pager"]
    return _run(["git", "-C", str(root), *safe, *words])


def _run(words: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _changed_files(root: Path) -> list[str]:
    return (_git(root, "status", "--porcelain", "--", ".") or "").splitlines()


def write_changes(
    root: Path, target: Path, *, environment: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Keep what git hasn't: a patch of changed files and copies of untracked ones, bounded.

    Files that are secret by their name are left out, and so are links and what is no text; what
    looks like a secret in a line is cut out of it. Returns what was kept and what was not; `None`
    outside of git, or where nothing has changed.
    """
    shutil.rmtree(target, ignore_errors=True)  # of an earlier launch
    if _git(root, "rev-parse", "HEAD") is None or not _changed_files(root):
        return None
    known, left_out, room = known_secrets(environment), [], CHANGES
    kept: list[str] = []
    patch = ""
    for name, part in _diff(root):
        reason = "its name" if is_secret_file(name) else ""
        if not reason and len(part.encode()) > room:
            reason = "its size"
        if reason:
            left_out.append(f"{name} ({reason})")
            continue
        part = redact(part, known=known)
        room -= len(part.encode())
        patch += part
    for name in _paths(root, "ls-files", "-z", "--others", "--exclude-standard"):
        text, reason = "", "too many" if len(kept) >= MAX_UNTRACKED else ""
        if not reason:
            text, reason = _read_untracked(root / name, name, room=room)
        if reason:
            left_out.append(f"{name} ({reason})")
            continue
        text = redact(text, known=known)
        room -= len(text.encode())
        kept.append(name)
        write_text(target / "untracked" / name, text)
    if patch:
        write_text(target / "changes.patch", patch)
    more = len(left_out) - MAX_UNTRACKED
    named = left_out[:MAX_UNTRACKED] + ([f"and {more} more"] if more > 0 else [])
    return {"patch": bool(patch), "untracked": kept, "left_out": named}


def _diff(root: Path) -> Iterator[tuple[str, str]]:
    """Each changed file's path, and its part of the patch."""
    options = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--relative", "HEAD")
    names = list(_paths(root, "diff", "--name-only", "-z", *options))
    text = _git(root, "diff", *options) or ""
    # Lines of a file begin with a space, + or -: none begins like this.
    parts = [part + "\n" for part in re.split(r"\n(?=diff --git )", text) if part]
    if len(parts) == len(names):
        yield from zip(names, parts, strict=True)


def _paths(root: Path, *words: str) -> Iterator[str]:
    """Paths that git lists, ended by zero bytes."""
    for name in (_git(root, *words) or "").split("\0"):
        if name and ".." not in Path(name).parts:
            yield name


def _read_untracked(file: Path, name: str, *, room: int) -> tuple[str, str]:
    """An untracked file's text, or why it isn't kept."""
    if is_secret_file(name):
        return "", "its name"
    if file.is_symlink() or not file.is_file():
        return "", "no plain file"
    try:
        if file.stat().st_size > room:
            return "", "its size"
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "", "no text"
    except OSError as error:
        return "", str(error.strerror)
    return ("", "no text") if "\0" in text else (text, "")
