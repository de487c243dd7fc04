"""The config group `model`: the architecture, under the names of transformers' LlamaConfig."""

from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING

from llama_pretrain.config.fields import Fraction, PositiveFloat, PositiveInt, _name_near, schema
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class RopeType(str, Enum):
    default = "default"
    linear = "linear"
    llama3 = "llama3"


@schema
class RopeParameters:
    """Rotary position embedding, as transformers' `rope_parameters` names it."""

    rope_type: RopeType = RopeType.default
    """`default`, `linear` (arXiv 2306.15595) or `llama3` (the scaling of LLaMA 3.1 and later)."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    factor: PositiveFloat | None = None
    """Context is stretched by this factor; needed by `linear` and `llama3`."""
    low_freq_factor: PositiveFloat | None = None
    """`llama3`: wavelengths above original_max_position_embeddings / this are scaled fully."""
    high_freq_factor: PositiveFloat | None = None
    """`llama3`: wavelengths below original_max_position_embeddings / this are left alone."""
    original_max_position_embeddings: PositiveInt | None = None
    """`llama3`: the context length before it was stretched, in tokens."""


@schema
class Model:
    """The architecture, under the names of transformers' LlamaConfig."""

    name: str = "custom"
    """A label for plans and reports; the shape is what the other fields say."""
    path: str | None = None
    """Directory of a Hugging Face LLaMA checkpoint (config.json and safetensors) to go on from;
    the shape then comes from its config.json. `null` starts from random weights."""
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
    """Longest row that the model is made for, in tokens."""
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
    """Dropout on attention probabilities while training."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial normal distribution of linear and embedding weights."""
    resize_embeddings: bool = False
    """Whether a tokenizer larger than vocab_size grows the embeddings; `false` refuses it."""
    pad_embeddings_to_multiple_of: PositiveInt = 8
    """Embeddings that grow are rounded up to a multiple of this many rows."""


def validate_model(run: "Run") -> Iterator[Problem]:
    model = run.model
    if model.name == "pretrained" and model.path is None:
        yield Problem(path="model.path", message="a value is missing", hint="add model.path=DIR")
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield Problem(
            path="model.num_attention_heads",
            message=f"does not divide model.hidden_size={model.hidden_size}"
            f" (got {model.num_attention_heads})",
            hint=f"nearest that do: {_name_near(model.hidden_size, model.num_attention_heads)},"
            " or set model.head_dim",
        )
    elif (model.head_dim or model.hidden_size // model.num_attention_heads) % 2:
        yield Problem(
            path="model.head_dim",
            message="rotary embeddings need an even width of each head"
            f" (got {model.head_dim or model.hidden_size // model.num_attention_heads})",
            hint="choose another model.num_attention_heads or an even model.head_dim",
        )
    groups = model.num_key_value_heads
    if groups is not None and model.num_attention_heads % groups:
        yield Problem(
            path="model.num_key_value_heads",
            message=f"does not divide model.num_attention_heads={model.num_attention_heads}"
            f" (got {groups})",
            hint=f"nearest that do: {_name_near(model.num_attention_heads, groups)}",
        )
    rope = model.rope_parameters
    needed = {
        RopeType.default: [],
        RopeType.linear: ["factor"],
        RopeType.llama3: [
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ],
    }[rope.rope_type]
    for name in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        given = getattr(rope, name) is not None
        if given != (name in needed):
            what = "needs a value" if not given else f"is not used (got {getattr(rope, name)})"
            yield Problem(
                path=f"model.rope_parameters.{name}",
                message=f"{what} with rope_type={rope.rope_type.value}",
                hint="set it" if not given else "set it to null, or change rope_type",
            )
    multiple = model.pad_embeddings_to_multiple_of
    if multiple != Model().pad_embeddings_to_multiple_of and not model.resize_embeddings:
        yield Problem(
            path="model.pad_embeddings_to_multiple_of",
            message="is read where embeddings grow, and model.resize_embeddings is false"
            f" (got {multiple})",
            hint="set model.resize_embeddings=true, or leave it out",
        )
    if run.data.sequence_length > model.max_position_embeddings:
        yield Problem(
            path="data.sequence_length",
            message=f"is longer than model.max_position_embeddings={model.max_position_embeddings}"
            f" (got {run.data.sequence_length})",
            hint=f"set it to {model.max_position_embeddings} at most, or set"
            f" model.max_position_embeddings={run.data.sequence_length}",
        )
