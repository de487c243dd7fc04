"""task=prepare and task=inspect: make or find the tokens of a run."""

from llama_pretrain import console
from llama_pretrain.config.run import Run
from llama_pretrain.config.tasks import Task
from llama_pretrain.files import write_text
from llama_pretrain.plan.plan import Corpus
from llama_pretrain.runs.layout import RunDir


def prepare_data(run: Run, run_dir: RunDir) -> Corpus:
    """The run's tokens, made or found; with task=inspect shown as well."""
    from llama_pretrain.data.corpus import describe_corpus, prepare_sources  # tokenizers

    tokenizer, prepared = prepare_sources(run, report=console.DataReport())
    corpus = describe_corpus(run, tokenizer, prepared)
    if run.task is Task.inspect:
        from llama_pretrain.data.inspect import inspect_data, render_page_of

        inspection = inspect_data(run, tokenizer, prepared)
        write_text(run_dir.inspection, render_page_of(run, inspection))
        console.show_inspection(inspection, run_dir.inspection)
    return corpus
