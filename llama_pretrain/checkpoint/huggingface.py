"""Load models and tokenizers with transformers, which is never allowed to run their code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaForCausalLM

from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.plan.pretrained import NO_CODE, find_code

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""On a terminal, transformers would ask whether to run code that a file names."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a directory.

    Raises:
        UserError: if the directory names code to run, or a file is damaged.
    """
    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


def load_model(folder: Path, **options: Any) -> Any:
    """The LLaMA in a directory in Hugging Face format.

    Raises:
        UserError: if the directory names code to run, or a file is damaged.
    """
    with _reading(folder):
        return LlamaForCausalLM.from_pretrained(folder, **LOCAL, **options)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    refuse(Problem(path=str(folder), message=text, hint=NO_CODE) for text in find_code(folder))
    try:
        yield
    except Exception as error:  # a damaged file may raise anything
        first = next(iter(str(error).splitlines()), "")
        message = f"cannot be read: {type(error).__name__}: {first}"
        raise UserError([Problem(path=str(folder), message=message)]) from error
