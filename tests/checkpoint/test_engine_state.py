"""An engine's state is saved and restored exactly, at any ZeRO stage."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_pretrain.checkpoint.engine_state import collect_tensors, collect_values, restore
from llama_pretrain.checkpoint.manifest import INDEX, STATE, rank_file
from llama_pretrain.checkpoint.tensors import (
    WEIGHT,
    StoredState,
    build_index,
    fragment_key,
    write_and_hash,
    write_tensors,
)
from tests.train.engines import RANK, build_small_engine, random_batches, take_step


def save(engine: Any, folder: Path) -> None:
    folder.mkdir()
    write_tensors(folder / rank_file(0), collect_tensors(engine, RANK))
    (folder / STATE).write_text(json.dumps(collect_values(engine)))


@pytest.fixture(scope="module")
def saved_at_stage_1(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Any:
    """A checkpoint after three steps at stage 1, and the three losses after it."""
    engine, batches = build_small_engine(1), random_batches(6)
    for batch in batches[:3]:
        take_step(engine, batch)
    folder = tmp_path_factory.mktemp("state") / "stage1"
    save(engine, folder)
    return folder, [take_step(engine, batch) for batch in batches[3:]]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_state_is_restored_at_any_stage(saved_at_stage_1: Any, tmp_path: Path, stage: int) -> None:
    folder, expected = saved_at_stage_1
    engine, batches = build_small_engine(stage), random_batches(6)
    with StoredState(folder) as stored:
        restore(engine, stored, RANK)
    assert engine.lr_scheduler.last_epoch == 3
    assert engine.get_lr() == [0.01 / 4] * 2
    save(engine, tmp_path / "again")  # the same elements, whichever stage holds them
    with StoredState(folder) as stored, StoredState(tmp_path / "again") as again:
        for name, shape in stored.shapes.items():
            assert sorted(stored.kinds(name)) == sorted(again.kinds(name))
            for kind in stored.kinds(name):
                size = torch.Size(shape).numel()
                assert torch.equal(
                    stored.read(name, kind, 0, size), again.read(name, kind, 0, size)
                )
    found = [take_step(engine, batch) for batch in batches[3:]]
    assert found == [pytest.approx(pair, abs=1e-6) for pair in expected]


def test_any_range_is_read_from_the_files_that_hold_it(tmp_path: Path) -> None:
    values = torch.arange(10.0)
    write_tensors(tmp_path / rank_file(0), {fragment_key("w", WEIGHT, 0): values[:4]})
    write_tensors(
        tmp_path / rank_file(1),
        {fragment_key("w", WEIGHT, 4): values[4:7], fragment_key("w", WEIGHT, 7): values[7:]},
    )
    write_and_hash(tmp_path / STATE, [b'{"parameters": {"w": [2, 5]}}'])
    with StoredState(tmp_path) as stored:
        assert torch.equal(stored.weight("w"), values.view(2, 5))
        assert torch.equal(stored.read("w", WEIGHT, 3, 5), values[3:8])
        with pytest.raises(ValueError, match="lacks 2 elements of w"):
            stored.read("w", WEIGHT, 8, 4)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_rank_opens_the_files_that_it_needs(tmp_path: Path, indexed: bool) -> None:
    sizes = []
    for rank in range(8):
        values = torch.arange(4.0) + 4 * rank
        tensors = {fragment_key("w", kind, 4 * rank): values for kind in (WEIGHT, "exp_avg")}
        write_tensors(tmp_path / rank_file(rank), tensors)
        sizes.append(dict.fromkeys(tensors, 4))
    if indexed:
        (tmp_path / INDEX).write_text(json.dumps(build_index(sizes)))
    (tmp_path / STATE).write_text(json.dumps({"parameters": {"w": [32]}}))
    with StoredState(tmp_path, rank=5) as stored:
        assert stored.read("w", WEIGHT, 20, 4).tolist() == [20, 21, 22, 23]
        assert sorted(stored.kinds("w")) == ["exp_avg", WEIGHT]
        assert list(stored.files) == [5]
        assert stored.read("w", "exp_avg", 10, 8).tolist() == list(range(10, 18))
        if indexed:
            assert sorted(stored.files) == [2, 3, 4, 5]
    with StoredState(tmp_path) as stored:
        assert stored.weight("w").tolist() == list(range(32))
        with pytest.raises(ValueError, match="lacks 4 elements"):
            stored.read("w", WEIGHT, 24, 12)


@pytest.mark.parametrize("text", ['{"tensors": {"w:weight": 3}, "layouts": []}', '{"tensors": 1}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    (tmp_path / STATE).write_text(json.dumps({"parameters": {"w": [4]}}))
    with StoredState(tmp_path) as stored, pytest.raises(ValueError, match="is damaged"):
        stored.weight("w")


def test_safetensors_reads_our_files(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.zeros(0),
    }
    size, digest = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
