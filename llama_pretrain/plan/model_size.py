"""Parameters and FLOPs of a LLaMA, from its shape.

Symbols: D model width, F feed-forward width, V vocabulary, L layers, T tokens of a sequence.
"""

from dataclasses import dataclass, replace

from llama_pretrain.config.model import Model


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameter counts of the whole model."""

    embedding: int
    """Input embedding matrix (the output head too if they are tied)."""
    head: int
    """Separate output head; 0 if tied."""
    layers: int
    """All decoder layers, norms included."""
    decayed: int
    """Parameters with weight decay: weights of linear and embedding layers."""
    not_decayed: int
    """Parameters without: norms and biases."""

    @property
    def total(self) -> int:
        return self.decayed + self.not_decayed


def head_width(model: Model) -> int:
    """Width of one attention head."""
    if model.head_dim is not None:
        return model.head_dim
    return model.hidden_size // model.num_attention_heads


def count_parameters(model: Model) -> ModelSize:
    """Count every parameter, as transformers' LlamaForCausalLM has them."""
    width, hidden = model.hidden_size, model.intermediate_size
    heads = model.num_attention_heads
    groups = heads if model.num_key_value_heads is None else model.num_key_value_heads
    queries, keys = heads * head_width(model), groups * head_width(model)
    matrices = width * (queries + 2 * keys) + queries * width + 3 * width * hidden
    biases = (queries + 2 * keys + width) * model.attention_bias
    biases += (2 * hidden + width) * model.mlp_bias
    norms = 2 * width
    embedding = model.vocab_size * width
    head = 0 if model.tie_word_embeddings else embedding
    num_layers = model.num_hidden_layers
    return ModelSize(
        embedding=embedding,
        head=head,
        layers=num_layers * (matrices + biases + norms),
        decayed=embedding + head + num_layers * matrices,
        not_decayed=num_layers * (biases + norms) + width,
    )


def flops_per_token(model: Model, *, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token.

    6N + 12 * L * heads * head_dim * T (PaLM, arXiv 2204.02311, appendix B), where N leaves out the
    input embedding, which is a lookup, and keeps the output head, which is a product. Recomputed
    activations and the causal mask are not counted, as there.
    """
    size = count_parameters(model)
    products = size.total - size.embedding
    if model.tie_word_embeddings:
        products += size.embedding
    attention = model.num_hidden_layers * model.num_attention_heads * head_width(model)
    return 6 * products + 12 * attention * sequence_length


def with_vocabulary(model: Model, *, tokenizer_size: int) -> Model:
    """The model after its embeddings have grown to hold a tokenizer, where they must."""
    if tokenizer_size <= model.vocab_size:
        return model
    multiple = model.pad_embeddings_to_multiple_of
    return replace(model, vocab_size=-(-tokenizer_size // multiple) * multiple)
