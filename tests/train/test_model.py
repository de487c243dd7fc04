"""Initial weights: drawn, read, hashed; and rotary frequencies that stay exact."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama_pretrain.train.model import restore_rotary
from tests.train.engines import CONFIG, build_small_engine, plain_model


def hash_weights(model: Any) -> str:
    """SHA-256 of all names and fp32 values, in the order of the model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()


def test_initial_weights_depend_on_seed_and_names() -> None:
    one, same, other = plain_model(), plain_model(), plain_model(seed=2)
    assert hash_weights(one) == hash_weights(same)
    assert hash_weights(one) != hash_weights(other)
    query = one.model.layers[0].self_attn.q_proj
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert query.bias.abs().max().item() == 0.0
    assert torch.equal(one.model.norm.weight, torch.ones(32))
    assert not torch.equal(query.weight, one.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize("stage", [0, 3])
def test_initial_weights_are_hashed_in_fp32(process_group: None, stage: int) -> None:
    """At stage 3 in bf16 no parameter ever has these values."""
    digest = hashlib.sha256()
    plain_model(stage=stage, digest=digest)
    assert digest.hexdigest() == hash_weights(plain_model())


def test_pretrained_weights_are_read_by_name(tmp_path: Path) -> None:
    source = plain_model(seed=9)
    source.save_pretrained(tmp_path)
    loaded = plain_model(weights=tmp_path)
    assert hash_weights(loaded) == hash_weights(source)
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match="has no weights for"):
        plain_model(weights=tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.usefixtures("process_group")
def test_rotary_frequencies_stay_exact_in_bf16(stage: int) -> None:
    exact = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2, dtype=torch.float) / 8)
    engine = build_small_engine(stage, bf16=True)
    rotary = engine.module.model.rotary_emb
    if stage == 3:  # zero.Init has rounded them
        assert not torch.equal(rotary.inv_freq.float(), exact)
    restore_rotary(engine.module, CONFIG, torch.device("cpu"))
    assert torch.equal(rotary.inv_freq, exact)
    assert rotary.inv_freq.dtype == torch.float32
