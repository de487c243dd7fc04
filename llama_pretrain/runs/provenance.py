"""provenance.json: what a run was made with besides its config. It holds no secret."""

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
from llama_pretrain.files import hash_file, read_json, write_json, write_text
from llama_pretrain.runs.layout import RunDir

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
"""Packages that a result can depend on; the versions of all others are recorded too."""
VARIABLES = re.compile(
    r"(?:OMP|MKL|KMP|GOMP|OPENBLAS|NUMEXPR|ONEDNN|DNNL)_\w+|CUDA_\w+|CUBLAS_\w+|CUDNN_\w+|NVIDIA_\w+"
    r"|NCCL_\w+|GLOO_\w+|UCX_\w+|TORCH\w*|PYTORCH_\w+|DS_\w+|DEEPSPEED_\w+|PYTHONHASHSEED"
    r"|ATEN_CPU_CAPABILITY|MALLOC_\w+|LD_PRELOAD|TOKENIZERS_PARALLELISM|HF_HOME|HF_HUB_OFFLINE"
    r"|LLAMA_PRETRAIN_\w+|SLURM_JOB_ID|SLURM_JOB_NODELIST|SLURM_NNODES|SLURM_NTASKS|LANG|LC_ALL|TZ"
)
"""Recorded environment variables: how numbers are computed, and where a run was."""
ISA = re.compile(r"(?:sse4_[12]|avx\w*|amx_\w+|fma|f16c|bf16|asimd\w*|sve\w*|i8mm)")
CPU_INFO = Path("/proc/cpuinfo")
MAX_CHANGES = 1 << 20
"""Bytes of changed and untracked files that are kept, in total."""
MAX_UNTRACKED = 200
MAX_DATA_FILES = 20_000
"""Files of a source that are recorded; its own hash covers the rest."""
TIMEOUT_S = 10
MAX_LAUNCHES = 8
"""Earlier launches of a resumed run that are recorded."""


def collect_provenance(
    *,
    argv: Sequence[str],
    root: Path,
    machine: dict[str, Any],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Code, packages, machine, environment and command line as plain values, without secrets.

    Args:
        root: the folder of run.py and the package.
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


def add_provenance(run_dir: RunDir, **values: Any) -> None:
    """Add what is known only after a run has started."""
    before = read_json(run_dir.provenance) or {}
    if any(before.get(name) != value for name, value in values.items()):
        write_json(run_dir.provenance, before | values)


def earlier_launches(run_dir: RunDir) -> list[dict[str, Any]]:
    """The provenance of a run's launches so far, the oldest first."""
    newest = read_json(run_dir.provenance) or {}
    before = newest.pop("earlier_launches", [])
    before = before if isinstance(before, list) else []
    return [*before, newest][-MAX_LAUNCHES:] if newest else []


def list_data_files(metas: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """SHA-256 of the files from which each source's tokens were made, by path.

    Args:
        metas: the source's meta.json (data/meta.py), by the source's name.
    """
    found: dict[str, dict[str, str]] = {}
    for name, path in metas.items():
        try:
            files = (read_json(path) or {})["files"]
            found[name] = {str(file): str(digest) for file, _, digest in files[:MAX_DATA_FILES]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def hash_code(root: Path) -> dict[str, str]:
    """SHA-256 of run.py and of every file of the package, by path."""
    files = [root / "run.py", *sorted((root / "llama_pretrain").rglob("*.py"))]
    return {file.relative_to(root).as_posix(): hash_file(file) for file in files if file.is_file()}


def describe_installation() -> dict[str, dict[str, str | None]]:
    """What must be equal on all nodes of a run: the code, Python, and the main packages."""
    packages = list_packages()
    return {
        "code": dict(hash_code(Path(__file__).resolve().parents[2])),
        "packages": {name: packages[name] for name in PACKAGES},
        "interpreter": {"python": platform.python_version()},
    }


def list_packages() -> dict[str, str | None]:
    """The version of every installed distribution, by normalized name.

    Read from folder names, which is ten times as fast as reading each one's metadata.
    """
    found: dict[str, str | None] = {}
    for place in sys.path:
        folder = Path(place)
        names = sorted(os.listdir(folder)) if place and folder.is_dir() else []
        for name in names:
            match = re.fullmatch(r"(.+?)-(\d[^-]*)(?:-py[\d.]+)?\.(?:dist|egg)-info", name)
            if match is not None:  # the first on the path is the one that is imported
                found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    others = sorted({*found} - {*PACKAGES})
    return {name: found.get(name) for name in (*PACKAGES, *others)}


def cpu_name() -> str:
    """The CPU's model."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(CPU_INFO), re.M)
    return match.group(1) if match else platform.processor() or sys.platform


def cpu_isa() -> list[str]:
    """Instruction sets that affect how numbers are computed."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(CPU_INFO), re.M)
    return sorted({name for name in match[1].split() if ISA.fullmatch(name)}) if match else []


def list_gpus(driver: Path = Path("/proc/driver/nvidia")) -> list[dict[str, str]]:
    """Name and driver of each GPU, from the kernel module or from nvidia-smi (one second)."""
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
    # Without the user's hooks and pagers, and without a lock for a status.
    safe = ["-c", "core.fsmonitor=false", "--no-optional-locks", "--no-pager"]
    return _run(["git", "-C", str(root), *safe, *words])


def _run(words: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _changed_files(root: Path) -> list[str]:
    return (_git(root, "status", "--porcelain", "--", ".") or "").splitlines()


def write_changes(
    root: Path,
    target: Path,
    *,
    include_untracked: bool = False,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """Record what git lacks: a patch of changed files, and the hashes of untracked ones.

    Both are bounded. Secrets inside the patch are redacted; files whose names suggest secrets,
    links, binary files and the files of other runs are left out.

    Args:
        include_untracked: copy untracked files too, with secrets redacted.

    Returns:
        What was recorded and what was left out; `None` outside of git or without changes.
    """
    shutil.rmtree(target, ignore_errors=True)  # of an earlier launch
    if _git(root, "rev-parse", "HEAD") is None or not _changed_files(root):
        return None
    known, room = known_secrets(environment), MAX_CHANGES
    patch, left_out = "", list[str]()
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
    if patch:
        write_text(target / "changes.patch", patch)
    untracked: list[dict[str, Any]] = []
    for name in _list_untracked(root):
        fault = "too many" if len(untracked) == MAX_UNTRACKED else ""
        text, fault = ("", fault) if fault else _read_untracked(root / name)
        if not fault and include_untracked and len(text.encode()) > room:
            fault = "its size"
        if fault:
            left_out.append(f"{name} ({fault})")
            continue
        size = (root / name).stat().st_size
        untracked.append({"name": name, "size": size, "sha256": hash_file(root / name)})
        if include_untracked:
            text = redact(text, known=known)
            room -= len(text.encode())
            write_text(target / "untracked" / name, text)
    more = len(left_out) - MAX_UNTRACKED
    named = left_out[:MAX_UNTRACKED] + ([f"and {more} more"] if more > 0 else [])
    return {"patch": bool(patch), "untracked": untracked, "left_out": named}


def _list_untracked(root: Path) -> Iterator[str]:
    """Untracked files that git does not ignore, without those of run directories."""
    runs: dict[Path, bool] = {}
    for name in _paths(root, "ls-files", "-z", "--others", "--exclude-standard"):
        folders = [*Path(name).parents][:-1]  # the last is the root
        for folder in folders:
            if folder not in runs:
                runs[folder] = (root / folder / "snapshot.yaml").is_file()
        if not any(runs[folder] for folder in folders):
            yield name


def _diff(root: Path) -> Iterator[tuple[str, str]]:
    """Each changed file's path, and its part of the patch."""
    options = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--relative", "HEAD")
    names = list(_paths(root, "diff", "--name-only", "-z", *options))
    text = _git(root, "diff", *options) or ""
    # Lines of a file's content begin with a space, + or -, so none looks like this.
    parts = [part + "\n" for part in re.split(r"\n(?=diff --git )", text) if part]
    if len(parts) == len(names):
        yield from zip(names, parts, strict=True)


def _paths(root: Path, *words: str) -> Iterator[str]:
    """Paths that git lists, terminated by zero bytes."""
    for name in (_git(root, *words) or "").split("\0"):
        if name and ".." not in Path(name).parts:
            yield name


def _read_untracked(file: Path) -> tuple[str, str]:
    """A file's text, or why it is not recorded."""
    if is_secret_file(file.name):
        return "", "its name"
    if file.is_symlink() or not file.is_file():
        return "", "not a regular file"
    try:
        if file.stat().st_size > MAX_CHANGES:
            return "", "its size"
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "", "not text"
    except OSError as error:
        return "", str(error.strerror)
    return ("", "not text") if "\0" in text else (text, "")
