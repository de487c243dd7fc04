"""The config group `tokenizer`: how text becomes token ids."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from llama_pretrain.config.fields import IsPath, PositiveInt, UsedWhen, schema
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class TokenizerName(str, Enum):
    train = "train"
    pretrained = "pretrained"


TRAINED = UsedWhen("tokenizer.name", ("train",))
PRETRAINED = UsedWhen("tokenizer.name", ("pretrained",))


@schema
class Tokenizer:
    """How text becomes token ids."""

    name: TokenizerName = TokenizerName.train
    """`train`: a byte-level BPE trained on the training documents; `pretrained`: from `path`.
    With `prepared` data, `train` means the tokenizer that is stored with the tokens."""
    vocab_size: Annotated[int, Ge(260), TRAINED] = 32_000
    """`train`: maximum number of tokens, including the 256 bytes and the special tokens."""
    sample_bytes: Annotated[PositiveInt, TRAINED] = 200_000_000
    """`train`: bytes of text to train on, sampled from the whole corpus."""
    path: Annotated[str | None, IsPath()] = None
    """`pretrained`: directory with tokenizer.json, as written by `save_pretrained`."""
    add_pad_token: Annotated[bool, PRETRAINED] = False
    """`pretrained`: add [PAD] to a tokenizer without a padding token, and grow the embeddings.
    Training never pads; `false` lets the export pad with a token that is there: unk, a reserved
    one, or eos."""


def validate_tokenizer(run: "Run") -> Iterator[Problem]:
    """A pretrained tokenizer needs its directory; a trained one must fit the embeddings."""
    tokenizer, model = run.tokenizer, run.model
    trained = tokenizer.name is TokenizerName.train
    if not trained and tokenizer.path is None and run.task is not Task.plan:
        yield Problem(
            path="tokenizer.path",
            message="is required with tokenizer=pretrained",
            hint="Add tokenizer.path=DIR",
        )
    if trained and tokenizer.path is not None:
        yield Problem(
            path="tokenizer.path",
            message=f"names a tokenizer, but tokenizer=train trains one (got {tokenizer.path})",
            hint="Add tokenizer=pretrained",
        )
    too_large = tokenizer.vocab_size > model.vocab_size and not model.resize_embeddings
    if trained and model.path is None and too_large:
        yield Problem(
            path="tokenizer.vocab_size",
            message=f"is larger than model.vocab_size={model.vocab_size}"
            f" (got {tokenizer.vocab_size})",
            hint=f"Set model.vocab_size={tokenizer.vocab_size}, or model.resize_embeddings=true",
        )
