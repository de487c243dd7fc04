"""report.html: one self-contained page about a run."""

from llama_pretrain.runs.rundir import RunDir


def render_report(run_dir: RunDir) -> str:
    return "<html></html>"
