"""The config group `model`: the architecture, under the names of transformers' LlamaConfig."""

from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from llama_pretrain.config.fields import (
    Fraction,
    IsPath,
    PositiveFloat,
    PositiveInt,
    UsedWhen,
    divisors_near,
    schema,
)
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class RopeType(str, Enum):
    default = "default"
    linear = "linear"
    llama3 = "llama3"


STRETCHED = UsedWhen(".rope_type", ("linear", "llama3"))
LLAMA3 = UsedWhen(".rope_type", ("llama3",))

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)
"""Fields of transformers' LlamaConfig that `Model` has under the same names."""


@schema
class RopeParameters:
    """Rotary position embedding, as transformers' `rope_parameters` names it."""

    rope_type: RopeType = RopeType.default
    """`default`, `linear` (arXiv 2306.15595) or `llama3` (the scaling of LLaMA 3.1 and later)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    factor: Annotated[PositiveFloat | None, STRETCHED] = None
    """The context is stretched by this factor; required by `linear` and `llama3`."""
    low_freq_factor: Annotated[PositiveFloat | None, LLAMA3] = None
    """`llama3`: wavelengths above original_max_position_embeddings / this are scaled fully."""
    high_freq_factor: Annotated[PositiveFloat | None, LLAMA3] = None
    """`llama3`: wavelengths below original_max_position_embeddings / this are not scaled."""
    original_max_position_embeddings: Annotated[PositiveInt | None, LLAMA3] = None
    """`llama3`: context length before stretching, in tokens."""


@schema
class Model:
    """The architecture, under the names of transformers' LlamaConfig."""

    name: str = "custom"
    """A label for plans and reports; the other fields define the shape."""
    path: Annotated[str | None, IsPath()] = None
    """Directory of a Hugging Face LLaMA checkpoint (config.json and safetensors) to start from;
    its config.json then gives the shape. `null` starts from random weights."""
    vocab_size: PositiveInt = 32_000
    """Rows of the embedding matrix; at least the size of the tokenizer."""
    hidden_size: PositiveInt = 4096
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 11_008
    """Width of the SwiGLU feed-forward layer."""
    num_hidden_layers: PositiveInt = 32
    """Number of decoder layers."""
    num_attention_heads: PositiveInt = 32
    """Number of query heads."""
    num_key_value_heads: PositiveInt | None = None
    """Number of key and value heads (grouped-query attention); `null` = num_attention_heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; `null` = hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt = 4096
    """Longest sequence that the model is made for, in tokens."""
    rms_norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    """Rotary position embedding."""
    tie_word_embeddings: bool = False
    """Whether the output head shares the embedding matrix."""
    attention_bias: bool = False
    """Whether the four attention projections have biases."""
    mlp_bias: bool = False
    """Whether the three feed-forward projections have biases."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities during training."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial normal distribution of linear and embedding weights."""
    resize_embeddings: bool = False
    """Whether the embeddings grow to fit a tokenizer larger than vocab_size; `false` refuses such a
    tokenizer."""
    pad_embeddings_to_multiple_of: Annotated[
        PositiveInt, UsedWhen("model.resize_embeddings", (True,))
    ] = 8
    """Embeddings that grow are rounded up to a multiple of this many rows."""


def validate_model(run: "Run") -> Iterator[Problem]:
    """Widths that must divide, rotary parameters, and the length of a sequence."""
    model = run.model
    if model.name == "pretrained" and model.path is None:
        yield Problem(path="model.path", message="is required", hint="Add model.path=DIR")
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    head_dim = model.head_dim or model.hidden_size // heads
    if model.head_dim is None and model.hidden_size % heads:
        yield Problem(
            path="model.num_attention_heads",
            message=f"must divide model.hidden_size={model.hidden_size} (got {heads})",
            hint=f"Nearest divisors: {_divisors(model.hidden_size, heads)}, or set model.head_dim",
        )
    elif head_dim % 2:
        yield Problem(
            path="model.head_dim",
            message=f"must be even for rotary embeddings (got {head_dim})",
            hint="Choose another model.num_attention_heads or an even model.head_dim",
        )
    if groups is not None and heads % groups:
        yield Problem(
            path="model.num_key_value_heads",
            message=f"must divide model.num_attention_heads={heads} (got {groups})",
            hint=f"Nearest divisors: {_divisors(heads, groups)}",
        )
    rope = model.rope_parameters
    required = {
        RopeType.default: (),
        RopeType.linear: ("factor",),
        RopeType.llama3: (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    for name in required[rope.rope_type]:
        if getattr(rope, name) is None:
            yield Problem(
                path=f"model.rope_parameters.{name}",
                message=f"is required with rope_type={rope.rope_type.value} (got null)",
                hint=f"Add model.rope_parameters.{name}=...",
            )
    if run.data.sequence_length > model.max_position_embeddings:
        yield Problem(
            path="data.sequence_length",
            message=f"is longer than model.max_position_embeddings={model.max_position_embeddings}"
            f" (got {run.data.sequence_length})",
            hint=f"Set it to at most {model.max_position_embeddings}, or set"
            f" model.max_position_embeddings={run.data.sequence_length}",
        )


def _divisors(number: int, wanted: int) -> str:
    return ", ".join(str(divisor) for divisor in divisors_near(number, wanted))
