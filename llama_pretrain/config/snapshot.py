"""snapshot.yaml: a run's config, every value resolved, and itself a Hydra primary config."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llama_pretrain.config.fields import plain_value
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.sweep import SweepSettings
from llama_pretrain.config.tasks import DriftPolicy, Resume
from llama_pretrain.config.validate import parse_values
from llama_pretrain.files import read_regular

AnyRun = TypeVar("AnyRun", bound=Run)

SNAPSHOT_NAME = "snapshot"
HEADER = "# A run as it was started, every value resolved. To resume it: python run.py resume=DIR\n"
OTHER_VERSION = 3
"""Unknown keys from which a snapshot is taken for one of another version, not for a typo."""
DEFAULTS = ["run_schema", "_self_"]
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader if PyYAML has it: about ten times as fast."""
MAX_BYTES = 4 << 20
"""Maximum size of a snapshot: usually about ten thousand, plus a line for each data file."""
MAX_DEPTH = 12
MAX_DIGITS = 400
MAX_NUMBER = 1e300
UNPRINTABLE = re.compile("[\x00\ud800-\udfff]")
SPECIAL_KEY = re.compile(r"_\w*_")
"""Such as `_target_`, `_args_`, `_partial_`: they mean something to Hydra."""
FOREIGN = "names hydra settings, interpolations or _target_, which a snapshot never does"


def to_plain(section: Any) -> dict[str, Any]:
    """A run, or a section of one, as plain nested values: enums by name."""
    return {key: plain_value(value) for key, value in asdict(section).items()}


def render_snapshot(run: Run) -> str:
    """The text of snapshot.yaml."""
    return render_document({"defaults": DEFAULTS, **to_plain(run)})


def render_document(values: Mapping[str, Any]) -> str:
    """The text of a primary config."""
    return HEADER + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def without_command(run: AnyRun) -> AnyRun:
    """A run without what concerns only the command that started it, as snapshots have it."""
    return replace(
        run,
        resume=Resume(),
        reproduce_of=None,
        drift=DriftPolicy.warn,
        sweep=SweepSettings(),
    )


def config_hash(run: Run) -> str:
    """SHA-256 of what a run must keep to be the same run: not its length, ranks or ZeRO stage."""
    plain = to_plain(run)
    kept = {name: plain[name] for name in ("model", "optim", "seed", "precision")}
    kept["sequence_length"] = run.data.sequence_length
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load_snapshot(path: Path) -> ResolvedRun:
    """Read a snapshot without Hydra, as workers do. It may come from elsewhere: it is only data.

    Raises:
        UserError: if it does not exist, is not a snapshot, or names anything but the schema.
    """
    values = read_plain_yaml(path)
    if values.pop("defaults", None) != DEFAULTS:
        raise UserError([Problem(path=str(path), message="is not a snapshot of a run")])
    refuse(Problem(path=str(path), message=fault) for fault in _find_foreign(values))
    try:
        return parse_values(values, ResolvedRun)
    except UserError as error:
        unknown = [p.path for p in error.problems if p.message.startswith("unknown key")]
        if len(unknown) < OTHER_VERSION:
            raise
        message = f"was written by another version of llama-pretrain (unknown: {unknown[0]}, ...)"
        hint = "Use that version for this run, or start a new one"
        raise UserError([Problem(path=str(path), message=message, hint=hint)]) from error


def read_plain_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file of YAML that may come from elsewhere, without what YAML can do.

    Raises:
        UserError: if it does not exist, is not YAML, or is more than plain nested values.
    """
    try:
        text = _read_text(path)
        for fault in find_yaml_faults(text):
            raise UserError([Problem(path=str(path), message=fault)])
        values = yaml.load(text, Loader=YAML_LOADER)
    except OSError as error:
        raise UserError([Problem(path=str(path), message=str(error.strerror))]) from error
    except yaml.YAMLError as error:
        # Where, but not what: it may be a file that its reader should not see.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise UserError([Problem(path=str(path), message=f"is not YAML{where}")]) from error
    except UnicodeDecodeError as error:
        raise UserError([Problem(path=str(path), message="is not YAML in UTF-8")]) from error
    except (ValueError, OverflowError, RecursionError) as error:  # dates and numbers out of range
        raise UserError([Problem(path=str(path), message="is not supported YAML")]) from error
    if not isinstance(values, dict):
        raise UserError([Problem(path=str(path), message="is not a snapshot of a run")])
    return values


def _read_text(path: Path) -> str:
    """The text of a file that may be anything; no more of it than a snapshot can have."""
    if not path.is_file():
        raise UserError([Problem(path=str(path), message="there is no snapshot here")])
    try:
        return read_regular(path, max_bytes=MAX_BYTES).decode("utf-8")
    except OSError as error:
        message = f"is not a snapshot: it {error.strerror}"
        raise UserError([Problem(path=str(path), message=message)]) from error


def find_yaml_faults(text: str) -> Iterator[str]:
    """What YAML allows and no snapshot has, from the parser's events: nothing is constructed yet.

    Aliases expand to any size, tags name types, the last of equal keys silently wins, and deep
    nesting overflows the interpreter's stack.

    Raises:
        yaml.YAMLError: if it is not YAML.
    """
    documents = 0
    mappings: list[set[str] | None] = []  # keys of each open mapping; None for a list
    expects_key: list[bool] = []
    for event in yaml.parse(text, Loader=YAML_LOADER):
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            yield "is not a snapshot: it has an anchor or an alias"
        if getattr(event, "tag", None) is not None:
            yield "is not a snapshot: it has a tag"
        if documents > 1 or len(mappings) > MAX_DEPTH:
            yield "is not a snapshot: it has several documents, or is nested too deeply"
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            mappings.pop()
            expects_key.pop()
        elif isinstance(event, yaml.NodeEvent):
            keys = mappings[-1] if mappings else None
            if keys is not None and expects_key[-1]:
                if not isinstance(event, yaml.ScalarEvent):
                    yield "is not a snapshot: it has a key that is not text"
                elif event.value in keys or event.value == "<<":
                    yield "is not a snapshot: it has a duplicate key"
                else:
                    keys.add(event.value)
            if isinstance(event, yaml.ScalarEvent) and _is_long_number(event):
                yield "is not a snapshot: it has a number that is too long"
            if mappings:
                expects_key[-1] = not expects_key[-1]
            if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                mappings.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                expects_key.append(True)


def _is_long_number(event: yaml.ScalarEvent) -> bool:
    """Whether it would be converted to a number, which takes quadratic time."""
    plain = bool(event.implicit[0])
    return plain and len(event.value) > MAX_DIGITS and event.value[:1] in "+-.0123456789"


def _find_foreign(values: Any, path: str = "") -> Iterator[str]:
    """What Hydra, which composes these values, would not treat as a plain value.

    It runs what a `hydra` section or a `_target_` names, and an interpolation could read the
    environment. Escapes in the file have been resolved by now.
    """
    where = f" ({path})" if path and path.isprintable() else ""
    if isinstance(values, dict):
        for key, item in values.items():
            if not isinstance(key, str):
                yield f"is not a snapshot: it has a key that is not text{where}"
            elif key == "hydra" or "${" in key or SPECIAL_KEY.fullmatch(key):
                yield FOREIGN
            elif not key.isprintable():
                yield f"is not a snapshot: it has an unprintable key{where}"
            yield from _find_foreign(item, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for item in values:
            yield from _find_foreign(item, path)
    elif isinstance(values, str):
        if "${" in values:
            yield FOREIGN
        if UNPRINTABLE.search(values):
            yield f"is not a snapshot: it has text that no file can hold{where}"
    elif isinstance(values, int | float) and not isinstance(values, bool):
        if not abs(values) <= MAX_NUMBER:  # NaN too
            yield f"is not a snapshot: it has a number out of range{where}"
    elif values is not None and not isinstance(values, bool):  # a date, for example
        yield f"is not a snapshot: it has a value that is neither text nor number{where}"
