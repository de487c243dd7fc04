"""Writes the tables of docs/configuration.md from the schema, conf/ and sweeps/.

python docs/make_configuration.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llama_pretrain.config.compose import compose_run, list_groups
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.validate import flatten

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
MARKER = "<!-- Everything below is written by docs/make_configuration.py. -->\n"
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "object": "map"}


def render_tables() -> str:
    """The generated part of the page."""
    schema = TypeAdapter(Run).json_schema()
    chosen = dict(flatten(to_plain(compose_run([]))))
    del chosen["data.cache_dir"]  # it follows the environment
    top = dict(_settings(schema["properties"], schema["$defs"], nested=False))
    lines = ["## Settings", "", *_table(top, chosen)]
    groups = list_groups()
    for name, field in schema["properties"].items():
        section = _resolve(field, schema["$defs"])
        if "properties" not in section:
            continue
        lines += [f"### `{name}`", "", _one_line(section.get("description", "")), ""]
        settings = _settings(section["properties"], schema["$defs"], prefix=f"{name}.")
        lines += _table(dict(settings), chosen)
        if name in groups:
            lines += _options(name)
    for overlay in ("experiment", "sweep", "debug"):
        lines += [f"### `{overlay}=`", "", *_options(overlay)]
    return "\n".join(lines)


def _resolve(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    name = field.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = definitions[name] if name else field
    return found


def _settings(
    fields: dict[str, Any], definitions: dict[str, Any], *, prefix: str = "", nested: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted path and schema of every setting, those of nested sections too."""
    for name, field in fields.items():
        inner = _resolve(field, definitions)
        if "properties" not in inner:
            # pydantic finds no docstrings of inherited fields: those of `data` are a source's
            source = definitions["Source"]["properties"].get(name, {})
            text = field.get("description") or source.get("description", "")
            kind = _kind(field, definitions)
            yield f"{prefix}{name}", {**field, "description": text, "kind": kind}
        elif nested:
            yield from _settings(inner["properties"], definitions, prefix=f"{prefix}{name}.")


def _kind(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A type as in `int > 0 or null`."""
    if "anyOf" in field:
        return " or ".join(_kind(part, definitions) for part in field["anyOf"])
    field = _resolve(field, definitions)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}), definitions)}"
    if field.get("type") == "null":
        return "`null`"
    if "properties" in field:
        return str(field["title"])
    bounds = [f"{sign} {field[key]}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([TYPES.get(field.get("type", ""), "any"), ", ".join(bounds)]).strip()


def _table(settings: dict[str, dict[str, Any]], chosen: dict[str, Any]) -> list[str]:
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for path, field in settings.items():
        default = field.get("default")
        shown = f"`{_yaml(default)}`"
        if path in chosen and chosen[path] != default and default not in ([], {}):
            shown += f"; here `{_yaml(chosen[path])}`"
        cells = (f"`{path}`", field["kind"], shown, _one_line(field["description"]))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _options(group: str) -> list[str]:
    """The options of a group, each with the comment at the top of its file."""
    lines = ["| option | meaning |", "| --- | --- |"]
    for file in sorted([*ROOT.glob(f"conf/{group}/*.yaml"), *ROOT.glob(f"sweeps/{group}/*.yaml")]):
        top = []
        for line in file.read_text().splitlines():
            if not line.startswith("#"):
                break
            top += [line.lstrip("# ")] if not line.startswith("# @package") else []
        link = f"[`{group}={file.stem}`](../{file.relative_to(ROOT)})"
        lines.append(f"| {link} | {_one_line(' '.join(top))} |")
    return [*lines, ""]


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if not isinstance(value, str) else value or '""'


def _one_line(text: str) -> str:
    return " ".join(text.split())


def render_page() -> str:
    """The page with its tables as they should be."""
    return PAGE.read_text(encoding="utf-8").partition(MARKER)[0] + MARKER + "\n" + render_tables()


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
