"""Drift: what differs now from when a run was made, and what the difference can do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llama_pretrain.runs.contents import flatten
from llama_pretrain.runs.provenance import PACKAGES
from llama_pretrain.runs.units import format_value

Values = Mapping[str, Any]


class Group(str, Enum):
    """The effect that a drift can have."""

    results = "can change results"
    bits = "can change bits"
    harmless = "harmless"


class Kind(str, Enum):
    """What has drifted, the likeliest cause of a different result first."""

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
    """The option, file or package whose value changed."""
    before: str
    now: str
    asked: bool = False
    """Whether the command line asked for it."""
    harmless: bool = False
    """Whether no number of a run depends on it, whatever its kind."""

    @property
    def group(self) -> Group:
        return Group.harmless if self.harmless else GROUP_OF[self.kind]

    def __str__(self) -> str:
        asked = " (asked for on the command line)" if self.asked else ""
        return f"{self.path}: {self.before} -> {self.now}{asked}"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run was made with, from its directory; empty where the directory lacks it."""

    config: Values = field(default_factory=dict)
    """Options by dotted path."""
    provenance: Values = field(default_factory=dict)
    plan: Values = field(default_factory=dict)
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """SHA-256 of the files of each source, by path."""


WITHOUT_EFFECT = (
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
    "data.node_cache_dir",
    "launch.name",
    "launch.node_rank",
    "launch.master",
    "launch.interface",
    "launch.hosts",
    "launch.hostfile",
    "launch.ssh",
    "launch.slurm",
    "launch.join_timeout_s",
    "launch.min_nodes",
    "launch.rejoin_timeout_s",
    "launch.allow_node_drift",
    "launch.device_memory",
    "launch.bind_cores",
    "launch.malloc_mmap_threshold",
    "launch.timeout_s",
    "launch.max_restarts",
    "zero.offload_optimizer.nvme_path",
    "zero.offload_param.nvme_path",
    "deepspeed.tensorboard",
    "deepspeed.extra.wandb",
    "deepspeed.extra.comet",
    "deepspeed.extra.csv_monitor",
    "deepspeed.steps_per_print",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.memory_breakdown",
    "deepspeed.dump_state",
    "deepspeed.flops_profiler",
    "deepspeed.comms_logger",
)
"""Options that no number of a run depends on. What a path leads to is known by its hash."""
NOT_COMPARED = ("task", "of_run", "resume", "reproduce_of", "drift", "data.hash")
"""Options of the command itself, and the hash that is compared as data."""
KIND_OF_OPTION = {
    "launch.num_processes": Kind.threads,
    "launch.threads_per_process": Kind.threads,
    "launch.nodes": Kind.threads,
    "launch.sequence_parallel_size": Kind.threads,
    "launch.device": Kind.hardware,
}
SECTIONS = (
    ("code", "{}", Kind.code),
    ("git_commit", "git commit", Kind.code),
    ("python", "python", Kind.versions),
    ("libc", "libc", Kind.versions),
    ("packages", "{}", Kind.versions),
    ("operators", "compiled operator {}", Kind.versions),
    ("cpu", "cpu", Kind.hardware),
    ("cpu_isa", "cpu_isa", Kind.hardware),
    ("gpus", "gpus", Kind.hardware),
    ("machine", "machine.{}", Kind.hardware),
    ("environment", "environment variable {}", Kind.threads),
    ("host", "host", Kind.host),
    ("platform", "platform", Kind.host),
    ("paths", "path of {}", Kind.host),
)
"""Keys of the provenance, and what their entries are called. `{}` stands for a key of a mapping."""
MACHINE = ("gpu_name", "num_gpus", "gpu_capability", "cpu_bf16")
"""Facts about the machine that a number can depend on."""
HARMLESS_VARIABLES = ("SLURM_", "CUDA_VISIBLE_DEVICES", "HF_", "LLAMA_PRETRAIN_", "LANG", "LC_")
SET_BY_LAUNCHER = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR", "TZ")
ABSENT = "nothing"
MAX_LENGTH = 200


def find_drift(before: Made, now: Made, *, asked: Callable[[str], bool]) -> list[Drift]:
    """Everything that differs, ordered by kind. What one side does not record is left out.

    Args:
        asked: whether the command line set an option.
    """
    found = [
        *_config(before.config, now.config, asked=asked),
        *_data(before, now, asked=asked),
        *_provenance(before.provenance, now.provenance),
    ]
    order = list(Kind)
    return sorted(found, key=lambda drift: order.index(drift.kind))


def list_unknown(before: Made) -> list[str]:
    """What cannot be compared because the run's directory does not record it."""
    missing = [] if before.provenance else ["provenance.json"]
    if not before.plan.get("corpus"):
        missing.append("plan.json")
    if before.provenance:
        expected = ("code", "packages", "cpu_isa", "environment")
        missing += [f"{key} in provenance.json" for key in expected if key not in before.provenance]
    return missing


def unasked(drifts: Sequence[Drift]) -> list[Drift]:
    """Drifts that can change a result or its bits and that nobody asked for."""
    return [drift for drift in drifts if drift.group is not Group.harmless and not drift.asked]


def _config(before: Values, now: Values, *, asked: Callable[[str], bool]) -> Iterator[Drift]:
    rollback = "rollback" in (before.get("train.spike"), now.get("train.spike"))
    # A rollback returns to a checkpoint, so that when they are saved matters.
    harmless = WITHOUT_EFFECT if rollback else (*WITHOUT_EFFECT, "checkpoint")
    for path, was, is_now in _differences(before, now) if before else ():
        if not _is_in(path, NOT_COMPARED):
            yield Drift(
                kind=KIND_OF_OPTION.get(path, Kind.config),
                path=path,
                before=was,
                now=is_now,
                asked=asked(path),
                harmless=_is_in(path, harmless),
            )


def _data(before: Made, now: Made, *, asked: Callable[[str], bool]) -> Iterator[Drift]:
    old, new = _mapping(before.plan, "corpus"), _mapping(now.plan, "corpus")
    if not old or not new:
        return
    changes: list[tuple[str, str, str]] = []
    for name, was, is_now in _differences(_sources(old), _sources(new)):
        files = _file_changes(before.files.get(name), now.files.get(name))
        changes += files or [(f"data of {name}", was, is_now)]
    for key, path in (("tokenizer_hash", "tokenizer"), ("content_hash", "data.hash")):
        if path == "tokenizer" or not changes:
            pair = ({path: str(side.get(key))} for side in (old, new))
            changes += _differences(*pair)
    options = (*before.config, *now.config)
    on_purpose = any(asked(path) for path in options if _is_in(path, ("data", "tokenizer")))
    for path, was, is_now in changes:
        yield Drift(kind=Kind.data, path=path, before=was, now=is_now, asked=on_purpose)


def _sources(corpus: Values) -> dict[str, Any]:
    sources = corpus.get("sources")
    found = sources if isinstance(sources, list) else []
    return {
        str(item.get("name")): item.get("data_hash") for item in found if isinstance(item, dict)
    }


def _file_changes(
    before: Mapping[str, str] | None, now: Mapping[str, str] | None
) -> list[tuple[str, str, str]]:
    """Files of a source whose content changed; a file that only moved has not."""
    if not before or not now:
        return []
    shared = {*before.values()} & {*now.values()}
    old, new = (
        {path: digest for path, digest in side.items() if digest not in shared}
        for side in (before, now)
    )
    return list(_differences(old, new))


def _provenance(before: Values, now: Values) -> Iterator[Drift]:
    """Code, versions, hardware, environment and host, as far as `before` records them."""
    # Where files are compared, a different commit has no effect of its own.
    has_files = bool(_mapping(before, "code") and _mapping(now, "code"))
    for key, path, kind in SECTIONS:
        if "{}" in path:
            old, new = (flatten(_mapping(side, key)) for side in (before, now))
            if not new and key in ("code", "operators"):
                continue
        else:
            old, new = ({path: side[key]} if key in side else {} for side in (before, now))
        for name, was, is_now in _differences(old, new) if old else ():
            yield Drift(
                kind=kind,
                path=path.format(name),
                before=was,
                now=is_now,
                harmless=has_files if key == "git_commit" else _is_harmless(key, name),
            )


def _is_harmless(key: str, name: str) -> bool:
    """Whether an entry of a section has no effect on numbers."""
    match key:
        case "packages":
            return name not in PACKAGES and not name.startswith("nvidia-")
        case "machine":
            return name not in MACHINE
        case "environment":
            return name.startswith(HARMLESS_VARIABLES) or name in SET_BY_LAUNCHER
    return False


def _differences(before: Values, now: Values) -> Iterator[tuple[str, str, str]]:
    """Keys whose values differ: key, then and now as short texts."""
    for key in dict.fromkeys([*before, *now]):
        was, is_now = before.get(key, ABSENT), now.get(key, ABSENT)
        if format_value(was) != format_value(is_now):
            yield _short(key), _short(was), _short(is_now)


def _is_in(path: str, sections: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in sections)


def _mapping(values: Values, key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> str:
    return format_value(value, max_length=MAX_LENGTH)
