"""Arithmetic of the plan, against figures from papers and from transformers."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.model import Model
from llama_pretrain.plan.batch import BatchPlan, solve_batch
from llama_pretrain.plan.model_size import count_parameters, flops_per_token, with_vocabulary
from llama_pretrain.plan.plan import (
    Corpus,
    SourceTokens,
    build_plan,
    build_training_plan,
    load_plan,
    render_plan,
)
from llama_pretrain.plan.resolve import resolve
from tests.conftest import compose_run
from tests.machines import CLUSTER

CORPUS = Corpus(
    tokenizer_dir="/tokenizer",
    tokenizer_hash="t",
    tokenizer_size=4096,
    eos_id=2,
    content_hash="c",
    fingerprint={},
    sources=[
        SourceTokens(
            name="stdlib",
            tokens_dir="/tokens",
            data_hash="d",
            train_sequences=1000,
            train_tokens=256_001,
            heldout_sequences=70,
            heldout_bytes_per_token=3.5,
        )
    ],
)
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
}
"""Parameters of the published checkpoints, as their safetensors sum to."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str) -> None:
    model = compose_run([f"model={name}"]).model
    size = count_parameters(model)
    assert size.total == PUBLISHED[name]
    assert size.embedding + size.head + size.layers + model.hidden_size == size.total


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_the_real_model(biased: bool, tied: bool) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from llama_pretrain.train.model import build_llama_config
    from llama_pretrain.train.optimizer import get_optimizer_grouped_parameters

    model = Model(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=tied,
        attention_bias=biased,
        mlp_bias=biased,
    )
    with torch.device("meta"):
        real = LlamaForCausalLM(build_llama_config(model, vocab_size=100, special_ids={}))
    size = count_parameters(model)
    assert size.total == sum(p.numel() for p in real.parameters())
    groups = get_optimizer_grouped_parameters(real, 0.1)
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    assert counts == [size.decayed, size.not_decayed]


def test_flops_by_hand() -> None:
    # 2 layers of width 4 with one head, T = 8, V = 10: matrices 2 * (4*16 + 3*4*6) = 272, norms
    # 2*2*4 + 4 = 20, head 40; attention 12 * 2 * 4 * 8 = 768.
    model = Model(vocab_size=10, hidden_size=4, intermediate_size=6)
    model = replace(model, num_hidden_layers=2, num_attention_heads=1)
    assert flops_per_token(model, sequence_length=8) == 6 * (272 + 20 + 40) + 768
    tied = replace(model, tie_word_embeddings=True)
    assert flops_per_token(tied, sequence_length=8) == 6 * (272 + 20 + 40) + 768


def test_embeddings_grow_to_a_multiple() -> None:
    model = Model(vocab_size=512)
    assert with_vocabulary(model, tokenizer_size=512).vocab_size == 512
    assert with_vocabulary(model, tokenizer_size=513).vocab_size == 520
    wide = Model(vocab_size=512, pad_embeddings_to_multiple_of=64)
    assert with_vocabulary(wide, tokenizer_size=513).vocab_size == 576


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ((32, 4, None), 2, (32, 4, 4)),
        ((32, None, 4), 2, (32, 4, 4)),
        ((32, None, None), 2, (32, 16, 1)),
        ((None, 4, 4), 2, (32, 4, 4)),
        ((None, 4, None), 3, (12, 4, 1)),
        ((24, 4, 2), 3, (24, 4, 2)),
    ],
)
def test_batch_triangle(
    given: tuple[int | None, ...], world_size: int, expected: tuple[int, int, int]
) -> None:
    names = ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")
    batch = Batch(**dict(zip(names, given, strict=True)))
    plan = solve_batch(batch, sequence_length=64, world_size=world_size)
    assert plan == BatchPlan(**dict(zip(names, expected, strict=True)))


STEPS = {  # steps, warm-up and decay of 16 sequences of 256 tokens: 4096 tokens a step
    "train.max_steps=100 schedule.warmup_steps=10": (100, 10, 90),
    "train.max_steps=null train.max_tokens=4097": (2, 20, 0),
    "train.max_steps=3 train.max_tokens=40960": (3, 20, 0),
    "schedule=wsd train.max_steps=105": (105, 20, 11),
    "schedule=wsd train.max_steps=105 schedule.decay_tokens=8193": (105, 20, 3),
    "schedule=constant train.max_steps=100": (100, 20, 0),
    "schedule.warmup_steps=null schedule.warmup_tokens=8192 train.max_steps=9": (9, 2, 7),
}


@pytest.mark.parametrize(("words", "expected"), STEPS.items())
def test_steps(words: str, expected: tuple[int, int, int]) -> None:
    steps = build_plan(resolve(compose_run(words.split()), CLUSTER)).steps
    assert (steps.total, steps.warmup, steps.decay) == expected


def test_plan_is_read_back_as_written(tmp_path: Path) -> None:
    plan = build_training_plan(resolve(compose_run([]), CLUSTER), CORPUS)
    path = tmp_path / "plan.json"
    path.write_text(render_plan(plan))
    assert load_plan(path) == plan
