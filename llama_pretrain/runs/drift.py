"""Drift: what differs now from when a run was made, and what it can do to the result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llama_pretrain.runs.provenance import PACKAGES


class Group(str, Enum):
    """What a drift can do."""

    results = "can change results"
    bits = "can change bits"
    harmless = "harmless"


class Kind(str, Enum):
    """What has drifted, the likeliest cause of another result first."""

    config = "config"
    data = "data"
    code = "code"
    versions = "versions"
    hardware = "hardware"
    threads = "threads"
    host = "host"


GROUP_OF = {
    Kind.config: Group.results,
    Kind.data: Group.results,
    Kind.code: Group.results,
    Kind.versions: Group.bits,
    Kind.hardware: Group.bits,
    Kind.threads: Group.bits,
    Kind.host: Group.harmless,
}


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One thing that differs."""

    kind: Kind
    path: str
    """A setting, a file, a package: what has another value now."""
    before: str
    now: str
    asked: bool = False
    """Whether the command line asked for it."""
    harmless: bool = False
    """Whether it is a setting that no number depends on."""

    @property
    def group(self) -> Group:
        return Group.harmless if self.harmless else GROUP_OF[self.kind]

    def __str__(self) -> str:
        asked = " (asked for on the command line)" if self.asked else ""
        return f"{self.path}: {self.before} -> {self.now}{asked}"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run was made with, as its directory tells it; empty where it doesn't."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings by dotted path."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of each source the SHA-256 of its files, by path."""


NO_NUMBER = (
    "data.cache_dir",
    "data.num_workers",
    "data.prepare_processes",
    "data.paths",
    "data.heldout_paths",
    "data.dataset",
    "tokenizer.path",
    "train.eval_every_steps",
    "train.sample_prompt",
    "train.sample_tokens",
    "train.profile_steps",
    "train.peak_tflops",
    "monitor",
    "export",
    "generate",
    "plan",
    "launch.device_memory",
    "launch.bind_cores",
    "launch.malloc_mmap_threshold",
    "launch.timeout_s",
    "launch.max_restarts",
    "zero.offload_optimizer.nvme_path",
    "zero.offload_param.nvme_path",
    "deepspeed.tensorboard",
    "deepspeed.wandb",
    "deepspeed.comet",
    "deepspeed.csv_monitor",
    "deepspeed.steps_per_print",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.memory_breakdown",
    "deepspeed.dump_state",
    "deepspeed.flops_profiler",
    "deepspeed.comms_logger",
)
"""Settings that no number of a run depends on. What lies at a path is known by its hash."""
NO_NUMBER_WITHOUT_ROLLBACK = ("checkpoint",)
"""Checkpoints are where a rollback goes back to."""
NOT_COMPARED = ("task", "of_run", "resume", "reproduce_of", "drift", "data.hash")
"""What a command line says of its own, and the hash that is compared as data."""
THREADS = ("launch.num_processes", "launch.threads_per_process", "launch.nodes")
HARDWARE = ("launch.device",)
MACHINE = ("gpu_name", "num_gpus", "gpu_capability", "cpu_bf16")
"""Of the machine: what a number can depend on."""
HARMLESS_VARIABLES = ("SLURM_", "CUDA_VISIBLE_DEVICES", "HF_", "LLAMA_PRETRAIN_", "LANG", "LC_")
SET_FOR_RANKS = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR", "TZ")
"""Variables that ranks get from the launcher, whatever they are outside."""
NOTHING = "nothing"
HASH = 64
LONGEST = 200


def find_drift(before: Made, now: Made, *, asked: Callable[[str], bool]) -> list[Drift]:
    """All that differs, in the order of kinds. What one of the two doesn't tell is left out.

    Args:
        asked: whether the command line has set a setting.
    """
    found = [
        *_config(before.config, now.config, asked=asked),
        *_data(before, now, asked=asked),
        *_code(before.provenance, now.provenance),
        *_versions(before.provenance, now.provenance),
        *_hardware(before.provenance, now.provenance),
        *_environment(before.provenance, now.provenance),
        *_host(before.provenance, now.provenance),
    ]
    order = list(Kind)
    return sorted(found, key=lambda drift: order.index(drift.kind))


def list_unknown(before: Made) -> list[str]:
    """What can't be compared, because the run's directory doesn't tell it."""
    missing = [] if before.provenance else ["provenance.json"]
    if not _dig(before.plan, "corpus"):
        missing.append("plan.json")
    if before.provenance:
        expected = ("code", "packages", "cpu_isa", "environment")
        missing += [f"{key} in provenance.json" for key in expected if key not in before.provenance]
    return missing


def unasked(drifts: Sequence[Drift]) -> list[Drift]:
    """Those that can change a result, to the bit, and that nobody has asked for."""
    return [drift for drift in drifts if drift.group is not Group.harmless and not drift.asked]


def _config(
    before: Mapping[str, Any], now: Mapping[str, Any], *, asked: Callable[[str], bool]
) -> Iterator[Drift]:
    if not before:
        return
    rollback = "rollback" in (before.get("train.spike"), now.get("train.spike"))
    quiet = NO_NUMBER if rollback else NO_NUMBER + NO_NUMBER_WITHOUT_ROLLBACK
    for path, was, is_now in _differences(before, now):
        if _is_in(path, NOT_COMPARED):
            continue
        kind = Kind.config
        if path in THREADS:
            kind = Kind.threads
        elif path in HARDWARE:
            kind = Kind.hardware
        yield Drift(
            kind=kind,
            path=path,
            before=was,
            now=is_now,
            asked=asked(path),
            harmless=_is_in(path, quiet),
        )


def _data(before: Made, now: Made, *, asked: Callable[[str], bool]) -> Iterator[Drift]:
    old, new = (_dig(side.plan, "corpus") for side in (before, now))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return
    on_purpose = any(asked(path) for path in (*before.config, *now.config) if _is_of_data(path))
    changed = False
    for name, was, is_now in _differences(_sources(old), _sources(new)):
        files = _file_changes(before.files.get(name), now.files.get(name))
        for path, one, other in files or [(f"data of {name}", was, is_now)]:
            changed = True
            yield Drift(kind=Kind.data, path=path, before=one, now=other, asked=on_purpose)
    was, is_now = (str(side.get("tokenizer_hash")) for side in (old, new))
    if was != is_now:
        changed = True
        yield Drift(
            kind=Kind.data, path="tokenizer", before=_short(was), now=_short(is_now),
            asked=on_purpose,
        )  # fmt: skip
    was, is_now = (str(side.get("content_hash")) for side in (old, new))
    if was != is_now and not changed:
        yield Drift(
            kind=Kind.data, path="data.hash", before=_short(was), now=_short(is_now),
            asked=on_purpose,
        )  # fmt: skip


def _is_of_data(path: str) -> bool:
    return path.startswith(("data.", "tokenizer."))


def _sources(corpus: Mapping[str, Any]) -> dict[str, Any]:
    sources = corpus.get("sources")
    found = sources if isinstance(sources, list) else []
    return {
        str(item.get("name")): item.get("data_hash") for item in found if isinstance(item, dict)
    }


def _file_changes(
    before: Mapping[str, str] | None, now: Mapping[str, str] | None
) -> list[tuple[str, str, str]]:
    """Files of a source whose text is another; where they lie doesn't matter."""
    if not before or not now:
        return []
    known, kept = set(before.values()), set(now.values())
    old = {path: digest for path, digest in before.items() if digest not in kept}
    new = {path: digest for path, digest in now.items() if digest not in known}
    return [
        (path, _short(old.get(path, NOTHING)), _short(new.get(path, NOTHING)))
        for path in dict.fromkeys([*old, *new])
    ]


def _code(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    old, new = _mapping(before, "code"), _mapping(now, "code")
    if old and new:
        for path, was, is_now in _differences(old, new):
            yield Drift(kind=Kind.code, path=path, before=was, now=is_now)
    if before.get("git_commit") != now.get("git_commit") and "git_commit" in before:
        was, is_now = (_short(_text(side.get("git_commit"))) for side in (before, now))
        yield Drift(  # where the files are the same, another commit does nothing
            kind=Kind.code, path="git commit", before=was, now=is_now, harmless=bool(old and new)
        )


def _versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    for name in ("python", "libc"):
        if name in before and before[name] != now.get(name):
            was, is_now = _short(_text(before[name])), _short(_text(now.get(name)))
            yield Drift(kind=Kind.versions, path=name, before=was, now=is_now)
    old, new = _mapping(before, "packages"), _mapping(now, "packages")
    if len(old) < len(PACKAGES):  # of a version that noted fewer
        new = {name: version for name, version in new.items() if name in old}
    for name, was, is_now in _differences(old, new):
        matters = name in PACKAGES or name.startswith("nvidia-")
        yield Drift(kind=Kind.versions, path=name, before=was, now=is_now, harmless=not matters)
    for name, was, is_now in _differences(
        dict(_flat(_mapping(before, "operators"))), dict(_flat(_mapping(now, "operators")))
    ):
        if before.get("operators") and now.get("operators"):
            yield Drift(
                kind=Kind.versions, path=f"compiled operator {name}", before=was, now=is_now
            )


def _hardware(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    for name in ("cpu", "cpu_isa", "gpus"):
        if name in before and before[name] != now.get(name):
            was, is_now = _short(_text(before[name])), _short(_text(now.get(name)))
            yield Drift(kind=Kind.hardware, path=name, before=was, now=is_now)
    old, new = _mapping(before, "machine"), _mapping(now, "machine")
    for name, was, is_now in _differences(old, new) if old else ():
        kind = Kind.hardware if name in MACHINE else Kind.host
        yield Drift(kind=kind, path=f"machine.{name}", before=was, now=is_now)


def _environment(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    if not isinstance(before.get("environment"), dict):
        return
    old, new = _mapping(before, "environment"), _mapping(now, "environment")
    for name, was, is_now in _differences(old, new):
        harmless = name.startswith(HARMLESS_VARIABLES) or name in SET_FOR_RANKS
        yield Drift(
            kind=Kind.host if harmless else Kind.threads,
            path=f"environment variable {name}",
            before=was,
            now=is_now,
        )


def _host(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    for name in ("host", "platform"):
        if name in before and before[name] != now.get(name):
            was, is_now = _short(_text(before[name])), _short(_text(now.get(name)))
            yield Drift(kind=Kind.host, path=name, before=was, now=is_now)
    if "paths" in before:
        for name, was, is_now in _differences(_mapping(before, "paths"), _mapping(now, "paths")):
            yield Drift(kind=Kind.host, path=f"path of {name}", before=was, now=is_now)


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Keys with another value: the key, then and now as texts."""
    for key in dict.fromkeys([*before, *now]):
        was, is_now = before.get(key, NOTHING), now.get(key, NOTHING)
        if was != is_now and _text(was) != _text(is_now):
            yield _short(str(key)), _short(_text(was)), _short(_text(is_now))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_in(path: str, sections: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in sections)


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _dig(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def _short(text: str) -> str:
    """A hash by its beginning, another text in one line: files from elsewhere may hold anything."""
    if len(text) in (40, HASH) and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
