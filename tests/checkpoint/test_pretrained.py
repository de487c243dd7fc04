"""Which directories `model.path` accepts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama_pretrain.checkpoint.huggingface import load_model, load_tokenizer
from llama_pretrain.checkpoint.pretrained import validate_pretrained
from llama_pretrain.config.problems import UserError, refuse
from llama_pretrain.plan.pretrained import read_shape
from tests.checkpoint.damage import damage, write_checkpoint
from tests.conftest import compose_run


def problem_of(folder: Path) -> str:
    run = compose_run(["model=pretrained", f"model.path={folder}"])
    with pytest.raises(UserError) as caught:
        refuse(validate_pretrained(run))
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            "config.json pytorch_model.bin",
            "has pickled weights, which are not opened (got pytorch_model.bin). Save it again with",
        ),
        (
            "latest global_step9/mp_rank_00_model_states.pt",
            "whose pickles are not opened (got mp_rank_00_model_states.pt). Write its weights with",
        ),
        ("config.json rank00000.safetensors", "is incomplete: it has no manifest.json"),
        ("config.json", "must be a directory with model.safetensors (got "),
        ("model.safetensors", "must be a directory with config.json (got "),
    ],
)
def test_unreadable_weights_are_refused(tmp_path: Path, names: str, text: str) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert text in problem_of(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    message = damage(folder, "truncated", random.Random(1))
    assert message in problem_of(folder)


def llama(folder: Path, **changes: Any) -> Path:
    """A model of two layers as transformers writes it."""
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 32,
    }
    config = LlamaConfig(num_attention_heads=2, max_position_embeddings=16, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    run = compose_run(["model=pretrained", f"model.path={folder}"])
    assert list(validate_pretrained(run)) == []
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert f"has no weight {'lm_head.weight, and tie' if 'head' in name else name}" in (
            problem_of(folder)
        )
        llama(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors cannot be read: " in problem_of(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code to run (auto_map)"),
        ({"hidden_size": "wide"}, "hidden_size is not valid: Input should be a valid integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is not valid: "),
        ({"rope_parameters": [1]}, "cannot be read: "),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta is not valid: "),
    ],
)
def test_a_config_may_hold_anything(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    model = compose_run(["model=pretrained", f"model.path={llama(tmp_path, **changes)}"]).model
    with pytest.raises(UserError) as caught:
        read_shape(model)
    (problem,) = caught.value.problems
    assert problem.path == "model.path"
    assert text in problem.message


def test_a_config_that_is_nested_too_deeply(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    (folder / "config.json").write_text('{"x": ' + "[" * 100_000)
    model = compose_run(["model=pretrained", f"model.path={folder}"]).model
    with pytest.raises(UserError, match="is nested too deeply"):
        read_shape(model)


def test_code_is_refused_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the terminal would answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = llama(tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
        for load in (load_model, load_tokenizer):
            with pytest.raises(UserError, match=r"names code to run \(auto_map\)"):
                load(folder)
        (folder / name).unlink()
    (folder / "custom_generate").mkdir()
    with pytest.raises(UserError, match="holds code to run"):
        load_model(folder)
