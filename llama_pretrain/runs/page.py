"""Render an HTML page from templates/: one file that loads nothing from anywhere."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llama_pretrain.runs.chart import tick_label


def render_page(template: str, **values: Any) -> str:
    """The HTML of a page; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["tick_label"] = tick_label
    return environment.get_template(f"{template}.html.j2").render(values)
