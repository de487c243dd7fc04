"""docs/configuration.md has the settings of the schema."""

import runpy

from llama_pretrain.config.fields import walk_fields
from llama_pretrain.config.run import Run
from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == SCRIPT["render_page"](), "run: python docs/make_configuration.py"


def test_every_setting_has_a_line_with_its_meaning() -> None:
    cells = [line.split(" | ") for line in SCRIPT["render_tables"]().splitlines()]
    meanings = {row[0].strip("| `"): row[-1].strip("| ") for row in cells if len(row) == 4}
    assert [path for path, _ in walk_fields(Run) if not meanings.get(path)] == []
