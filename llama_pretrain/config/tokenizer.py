"""The config group `tokenizer`: how text becomes token ids."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from llama_pretrain.config.fields import PositiveInt, schema
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class TokenizerName(str, Enum):
    train = "train"
    pretrained = "pretrained"


@schema
class Tokenizer:
    """How text becomes token ids."""

    name: TokenizerName = TokenizerName.train
    """`train`: a byte-level BPE learnt from the training documents; `pretrained`: from `path`.
    With `prepared` data, `train` stands for the tokenizer that lies with the tokens."""
    vocab_size: Annotated[int, Ge(260)] = 32_000
    """`train`: largest number of tokens, the 256 bytes and the special ones included."""
    sample_bytes: PositiveInt = 200_000_000
    """`train`: bytes of text to learn from, taken from all over the corpus."""
    path: str | None = None
    """`pretrained`: directory with tokenizer.json, as `save_pretrained` writes it."""


def validate_tokenizer(run: "Run") -> Iterator[Problem]:
    """Rules of the section `tokenizer`."""
    tokenizer, model = run.tokenizer, run.model
    pretrained = tokenizer.name is TokenizerName.pretrained
    if pretrained and tokenizer.path is None and run.task is not Task.plan:
        yield Problem(
            path="tokenizer.path",
            message="tokenizer=pretrained needs a directory",
            hint="add tokenizer.path=DIR",
        )
    if tokenizer.name is TokenizerName.train and tokenizer.path is not None:
        yield Problem(
            path="tokenizer.path",
            message=f"is not read with tokenizer=train (got {tokenizer.path})",
            hint="add tokenizer=pretrained",
        )
    if pretrained and tokenizer.vocab_size not in (Tokenizer().vocab_size, model.vocab_size):
        yield Problem(
            path="tokenizer.vocab_size",
            message=f"is not read with tokenizer=pretrained (got {tokenizer.vocab_size})",
            hint=f"set it to {model.vocab_size}, or add tokenizer=train",
        )
    too_large = tokenizer.vocab_size > model.vocab_size and not model.resize_embeddings
    if tokenizer.name is TokenizerName.train and model.path is None and too_large:
        yield Problem(
            path="tokenizer.vocab_size",
            message=f"is larger than model.vocab_size={model.vocab_size}"
            f" (got {tokenizer.vocab_size})",
            hint=f"set model.vocab_size={tokenizer.vocab_size}, or model.resize_embeddings=true",
        )
    if pretrained and tokenizer.sample_bytes != Tokenizer().sample_bytes:
        yield Problem(
            path="tokenizer.sample_bytes",
            message=f"is not read with tokenizer=pretrained (got {tokenizer.sample_bytes})",
            hint="leave it out, or add tokenizer=train",
        )
