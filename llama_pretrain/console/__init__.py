"""What a person sees."""

from llama_pretrain.console.config import show_config, show_warnings
from llama_pretrain.console.data import DataReport, show_corpus, show_inspection
from llama_pretrain.console.output import (
    PIPE_WIDTH,
    PlainConsole,
    errors,
    note,
    out,
    say,
    show_failure,
    show_problems,
    styled,
    taking_time,
)
from llama_pretrain.console.plan import (
    show_cost,
    show_fits,
    show_jobs,
    show_plan,
    show_sources,
)
from llama_pretrain.console.progress import follow_metrics
from llama_pretrain.console.result import show_evaluation, show_result, show_verification

__all__ = [
    "PIPE_WIDTH",
    "DataReport",
    "PlainConsole",
    "errors",
    "follow_metrics",
    "note",
    "out",
    "say",
    "show_config",
    "show_corpus",
    "show_cost",
    "show_evaluation",
    "show_failure",
    "show_fits",
    "show_inspection",
    "show_jobs",
    "show_plan",
    "show_problems",
    "show_result",
    "show_sources",
    "show_verification",
    "show_warnings",
    "styled",
    "taking_time",
]
