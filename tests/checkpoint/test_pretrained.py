"""Which directories `model.path` accepts."""

import random
from pathlib import Path

import pytest

from llama_pretrain.checkpoint.pretrained import validate_pretrained
from llama_pretrain.config.problems import UserError, refuse
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
