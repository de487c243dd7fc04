"""task=prepare and task=inspect: make or find the tokens of a run."""

from llama_pretrain import console
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.tasks import Task
from llama_pretrain.data.cache import disk_problems
from llama_pretrain.files import write_text
from llama_pretrain.plan.plan import Corpus
from llama_pretrain.runs.layout import RunDir


def prepare_data(run: ResolvedRun, run_dir: RunDir) -> Corpus:
    """The run's tokens, made or found in the cache; with task=inspect also shown.

    Raises:
        UserError: if the data cannot be read, or the cache cannot be written.
    """
    # numpy and tokenizers take 0.2 s to import, which --cfg and task=plan need not pay
    from llama_pretrain.data import corpus, inspect

    with disk_problems(run.data.cache_dir):
        tokenizer, prepared = corpus.prepare_sources(run, report=console.DataReport())
        described = corpus.describe_corpus(run, tokenizer, prepared)
        if run.task is Task.inspect:
            inspection = inspect.inspect_data(run, described, tokenizer, prepared)
            write_text(run_dir.inspection, inspect.render_inspection(run, inspection))
            table = inspect.list_sources(inspection)
            console.show_inspection(inspection, table, run_dir.inspection)
    return described
