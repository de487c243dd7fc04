"""snapshot.yaml: a run's config, every value resolved, and itself a Hydra primary config."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.sweep import SweepSettings
from llama_pretrain.config.tasks import DriftPolicy, Resume
from llama_pretrain.config.validate import parse_values

HEADER = "# A run as it was started, every value resolved. To go on: python run.py resume=DIR\n"
DEFAULTS = ["run_schema", "_self_"]
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML has it: some ten times as fast."""
FIRST_KERNELS = {
    "attention": "sdpa",
    **dict.fromkeys(("loss", "rms_norm", "rotary", "swiglu", "allocator"), "plain"),
}
"""Those of runs from before there was a choice."""
MAX_BYTES = 4 << 20
"""Of a snapshot: a run's has some ten thousand, and a line for each file of its data."""
MAX_DEPTH = 12
MAX_DIGITS = 400
MAX_NUMBER = 1e300
NO_TEXT = re.compile("[\x00\ud800-\udfff]")
SPECIAL_KEY = re.compile(r"_\w*_")
"""As `_target_`, `_args_`, `_partial_`: they mean something to Hydra."""
FOREIGN = "names hydra settings, interpolations or _target_, which a snapshot never does"


def to_plain(section: Any) -> dict[str, Any]:
    """A run, or a section of one, as plain nested values: enums by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    return {key: plain(value) for key, value in asdict(section).items()}


def render_snapshot(run: Run) -> str:
    """The text of snapshot.yaml."""
    return render_document({"defaults": DEFAULTS, **to_plain(run)})


def render_document(values: Mapping[str, Any]) -> str:
    """The text of a primary config."""
    return HEADER + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def as_written(run: Run) -> Run:
    """A run without what is a matter of the command line alone: its snapshot says what it was."""
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


def load_snapshot(path: Path) -> Run:
    """Read a snapshot without Hydra, as workers do. It may come from elsewhere: it is only data.

    Raises:
        UserError: if it isn't there, is no snapshot, or names anything but our schema.
    """
    text = _read_text(path)
    try:
        for fault in find_faults(text):
            raise UserError([Problem(path=str(path), message=fault)])
        values = yaml.load(text, Loader=YAML_LOADER)
    except yaml.YAMLError as error:
        # Where, but not what: the file may be none that its reader should see.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise UserError([Problem(path=str(path), message=f"is not YAML{where}")]) from error
    except (ValueError, OverflowError, RecursionError) as error:  # dates and numbers out of range
        raise UserError([Problem(path=str(path), message="is not YAML that we read")]) from error
    if not isinstance(values, dict) or values.pop("defaults", None) != DEFAULTS:
        raise UserError([Problem(path=str(path), message="is not a snapshot of a run")])
    refuse(Problem(path=str(path), message=fault) for fault in _find_foreign(values))
    if isinstance(values.get("sweep"), dict):
        values["sweep"].pop("fork", None)  # what launch.fork is now; of a run it said nothing
    kernels = values.setdefault("kernels", {**FIRST_KERNELS})
    if isinstance(kernels, dict):
        kernels.pop("huge_pages", None)  # what kernels.allocator is now
        kernels.setdefault("matmul", "plain")  # there was no other
    return parse_values(values)


def _read_text(path: Path) -> str:
    """The text of a file that may be anything; no more of it than a snapshot can have."""
    if not path.is_file():
        raise UserError([Problem(path=str(path), message="there is no snapshot here")])
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            message = f"is not a snapshot: it has more than {MAX_BYTES:,} bytes"
            raise UserError([Problem(path=str(path), message=message)])
        return content.decode("utf-8")
    except OSError as error:
        raise UserError([Problem(path=str(path), message=str(error.strerror))]) from error
    except UnicodeDecodeError as error:
        raise UserError([Problem(path=str(path), message="is not YAML in UTF-8")]) from error


def find_faults(text: str) -> Iterator[str]:
    """What YAML can do and no snapshot does, from the events of its parser: nothing is built yet.

    Aliases grow to any size where they are followed, tags name types, of equal keys the last one
    wins in silence, and deep nesting ends the interpreter's stack.

    Raises:
        yaml.YAMLError: if it is no YAML.
    """
    documents = 0
    mappings: list[set[str] | None] = []  # of each open mapping its keys; None for a list
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
            is_key = bool(mappings) and mappings[-1] is not None and expects_key[-1]
            if is_key and not isinstance(event, yaml.ScalarEvent):
                yield "is not a snapshot: it has a key that is no text"
            if is_key and isinstance(event, yaml.ScalarEvent):
                keys = mappings[-1]
                assert keys is not None
                if event.value in keys or event.value == "<<":
                    yield "is not a snapshot: it has a key twice"
                keys.add(event.value)
            if isinstance(event, yaml.ScalarEvent) and _is_long_number(event):
                yield "is not a snapshot: it has a number that is too long"
            if mappings:
                expects_key[-1] = not expects_key[-1]
            if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                mappings.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                expects_key.append(True)


def _is_long_number(event: yaml.ScalarEvent) -> bool:
    """Whether it would become a number whose conversion takes for ever."""
    plain = bool(event.implicit[0])
    return plain and len(event.value) > MAX_DIGITS and event.value[:1] in "+-.0123456789"


def _find_foreign(values: Any, path: str = "") -> Iterator[str]:
    """What Hydra, which is given these values, would make more of than a value.

    It runs what a `hydra` section or a `_target_` names, and an interpolation could read this
    machine's environment. How they were spelt in the file, with escapes or not, is past here.
    """
    if isinstance(values, dict):
        for key, item in values.items():
            if not isinstance(key, str):
                yield f"is not a snapshot: it has a key that is no text{_under(path)}"
            elif key == "hydra" or "${" in key or SPECIAL_KEY.fullmatch(key):
                yield FOREIGN
            elif not key.isprintable():
                yield f"is not a snapshot: it has a key that is no name{_under(path)}"
            yield from _find_foreign(item, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for item in values:
            yield from _find_foreign(item, path)
    elif isinstance(values, str):
        if "${" in values:
            yield FOREIGN
        if NO_TEXT.search(values):
            yield f"is not a snapshot: it has a text that no file can hold{_under(path)}"
    elif isinstance(values, int | float) and not isinstance(values, bool):
        if not abs(values) <= MAX_NUMBER:  # nor is a NaN
            yield f"is not a snapshot: it has a number out of range{_under(path)}"
    elif values is not None and not isinstance(values, bool):  # a date, say
        yield f"is not a snapshot: it has a value that is neither text nor number{_under(path)}"


def _under(path: str) -> str:
    return f" ({path})" if path and path.isprintable() else ""
