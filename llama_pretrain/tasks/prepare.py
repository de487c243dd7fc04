"""task=prepare and task=inspect: make or find the tokens of a run."""

from llama_pretrain import console
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.tasks import Task
from llama_pretrain.files import write_text
from llama_pretrain.plan.plan import Corpus
from llama_pretrain.runs.layout import RunDir


def prepare_data(run: ResolvedRun, run_dir: RunDir) -> Corpus:
    """The run's tokens, made or found in the cache; with task=inspect also shown.

    Raises:
        UserError: if the data cannot be read, or the cache cannot be written.
    """
    # numpy and tokenizers take 0.3 s, which --help and task=plan need not pay
    from llama_pretrain.data.cache import disk_problems
    from llama_pretrain.data.corpus import describe_corpus, prepare_sources
    from llama_pretrain.data.inspect import inspect_data, render_inspection

    with disk_problems(run.data.cache_dir):
        tokenizer, prepared = prepare_sources(run, report=console.DataReport())
        corpus = describe_corpus(run, tokenizer, prepared)
        if run.task is Task.inspect:
            inspection = inspect_data(run, corpus, tokenizer, prepared)
            write_text(run_dir.inspection, render_inspection(run, inspection))
            console.show_inspection(inspection, run_dir.inspection)
    return corpus
