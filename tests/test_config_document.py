"""docs/configuration.md says what the schema, conf/ and a composed run say."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf

from llama_pretrain.config.document import (
    ROOT,
    SchemaDoc,
    read_comment,
    read_schema,
    read_sources,
    render_reference,
    render_type,
)
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.validate import flatten
from tests.conftest import compose_run

SMALL = '''
from enum import Enum
Count = Annotated[int, Gt(0)]
LATE = Stages((2, 3))

class Colour(str, Enum):
    red = "r"
    blue = "b"

@schema
class Inner:
    """Says
    something."""

    count: Count | None = None
    """How many,
    in rows."""
    share: Annotated[float, Interval(gt=0, le=1)] = 0.5
    pair: Annotated[list[float], Len(2, 2)] = field(default_factory=lambda: [1.0, 2.0])
    colour: Colour = Colour.blue
    extra: dict[str, Any] = field(default_factory=dict)
    bucket: Annotated[Count | None, LATE] = None
    last: Annotated[bool, Stages((3,))] = True

class NotASchema:
    other: int = 1
'''


@pytest.fixture(scope="module")
def shipped() -> SchemaDoc:
    return read_schema(read_sources())


def test_page_on_disk_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    hint = "run: python -m llama_pretrain.config.document > docs/configuration.md"
    assert page == render_reference(), hint


def test_every_field_and_class_has_its_string(shipped: SchemaDoc) -> None:
    bare = [name for name, found in shipped.classes.items() if not found.text]
    bare += [
        f"{name}.{item.name}"
        for name, found in shipped.classes.items()
        for item in found.fields
        if not item.text
    ]
    assert bare == []


def schema_classes(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for item in fields(cls):
        for kind in (item.type, *get_args(item.type)):  # list[Stage], dict[str, Source]
            if isinstance(kind, type) and is_dataclass(kind):
                yield from schema_classes(kind)


def test_source_is_read_as_python_reads_it(shipped: SchemaDoc) -> None:
    real = {cls.__name__: [item.name for item in fields(cls)] for cls in schema_classes(Run)}
    read = {name: [item.name for item in found.fields] for name, found in shipped.classes.items()}
    assert read == real


def setting_rows() -> dict[str, tuple[str, str]]:
    """Default and default run of each setting, as the page has them; `""` where it is silent."""
    rows = {}
    for table in render_reference().split("\n\n"):
        head, *lines = table.splitlines() or [""]
        columns = head.strip("| ").split(" | ")
        if columns[:3] != ["setting", "type", "default"]:
            continue
        for line in lines[1:]:
            cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
            in_default_run = cells[3] if columns[3] == "default run" else ""
            rows[cells[0]] = (cells[2], in_default_run)
    return rows


def same(text: str, value: Any) -> bool:
    """Whether the page's text is this value."""
    if text.startswith("${"):
        text = OmegaConf.create({"text": text}).text
    if value is None or isinstance(value, bool):
        return text == {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return type(value)(text) == value
    return text == ("{}" if value == {} else str(value) or '""')


def test_defaults_are_those_of_the_dataclasses() -> None:
    rows = setting_rows()
    values = dict(flatten(to_plain(Run())))
    assert rows.keys() == values.keys()
    wrong = {
        path: rows[path][0] for path, value in values.items() if not same(rows[path][0], value)
    }
    assert wrong == {}


def test_default_run_is_what_hydra_composes() -> None:
    rows = setting_rows()
    wrong = {
        path: rows[path]
        for path, value in flatten(to_plain(compose_run([])))
        if not same(rows[path][1] or rows[path][0], value)
    }
    assert wrong == {}


def test_every_option_of_every_group_is_listed() -> None:
    page = render_reference()
    files = [path for path in (ROOT / "conf").glob("*/*.yaml") if path.parent.name != "hydra"]
    files += (ROOT / "sweeps").glob("*/*.yaml")
    assert len(files) > 40
    assert [path for path in files if f"| `{path.parent.name}={path.stem}`" not in page] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("count", "int > 0 or `null`", id="named limit, optional"),
        pytest.param("share", "float > 0, <= 1", id="interval"),
        pytest.param("pair", "list of float (2 items)", id="length"),
        pytest.param("colour", "`r`, `b`", id="enum"),
        pytest.param("extra", "mapping", id="mapping"),
        pytest.param("bucket", "int > 0 or `null` (stages 2, 3)", id="stages by name"),
        pytest.param("last", "bool (stage 3)", id="one stage"),
    ],
)
def test_types_as_a_reader_wants_them(name: str, text: str) -> None:
    schema = read_schema(SMALL)
    field = next(item for item in schema.classes["Inner"].fields if item.name == name)
    assert render_type(schema, field.annotation) == text


def test_strings_are_joined_to_one_line() -> None:
    schema = read_schema(SMALL)
    assert list(schema.classes) == ["Inner"]
    assert schema.classes["Inner"].text == "Says something."
    assert [item.text for item in schema.classes["Inner"].fields[:2]] == ["How many, in rows.", ""]


def test_comment_of_a_yaml_file() -> None:
    text = "# @package _global_\n# Which is *fastest*?\n#   python run.py -m x\nkey: 1\n# later\n"
    assert read_comment(text) == r"Which is \*fastest\*? `python run.py -m x`"


def test_generator_is_light() -> None:
    code = (
        "import sys, llama_pretrain.config.document; print({'torch', 'hydra'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
