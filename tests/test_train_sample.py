"""Text while training: against transformers' own greedy search, and without a trace elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_pretrain.config.monitor import Monitor
from llama_pretrain.distributed import Rank
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.train import loop
from llama_pretrain.train.metrics import CSV_COLUMNS, MetricsWriter
from llama_pretrain.train.progress import Progress
from llama_pretrain.train.sample import Prompt, continue_with_engine

EOS = 2
PROMPT = [5, 6, 7]

pytestmark = pytest.mark.usefixtures("process_group")


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(number) for number in ids)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_dropout=0.5,
        initializer_range=0.5,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture
def rank() -> Rank:
    return Rank(index=0, local_index=0, world_size=1, device=torch.device("cpu"))


def prompt_of(**changes: Any) -> Prompt:
    prompt = Prompt(
        text="5 6 7",
        ids=PROMPT,
        num_tokens=12,
        longest=64,
        eos_id=EOS,
        document_mask=False,
        gathered_once=False,
        tokenizer=Numbers(),
    )
    return replace(prompt, **changes)


def greedy(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    """What transformers adds, with its cache."""
    inputs = torch.tensor([ids])
    found = model.eval().generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    model.train()
    added: list[int] = found[0, len(ids) :].tolist()
    return added


@pytest.mark.parametrize("document_mask", [False, True])
def test_it_writes_what_transformers_writes(model: Any, rank: Rank, document_mask: bool) -> None:
    expected = greedy(model, PROMPT, 12)
    assert len(set(expected)) > 3
    text = continue_with_engine(model, prompt_of(document_mask=document_mask), rank)
    assert text == " ".join(str(number) for number in [*PROMPT, *expected])


def test_no_generator_and_no_mode_is_touched(model: Any, rank: Rank) -> None:
    before = torch.get_rng_state()
    continue_with_engine(model, prompt_of(), rank)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_ends_with_the_document(model: Any, rank: Rank) -> None:
    first, second, third, *_ = greedy(model, PROMPT, 12)
    assert third not in (first, second)
    text = continue_with_engine(model, prompt_of(eos_id=third), rank)
    assert text == " ".join(str(number) for number in [*PROMPT, first, second, third])


def test_no_row_is_longer_than_those_it_trains_on(model: Any, rank: Rank) -> None:
    """With rows of 4 tokens, each token follows from the 4 before it alone."""
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    text = continue_with_engine(model, prompt_of(longest=4, num_tokens=4), rank)
    assert seen == [4, 4, 4, 4]
    ids = list(PROMPT)
    for _ in range(4):
        ids += greedy(model, ids[-4:], 1)
    assert text == " ".join(str(number) for number in ids)


def test_a_signal_ends_it_at_once(model: Any, rank: Rank) -> None:
    passes: list[int] = []

    def stop(*_: Any) -> None:
        passes.append(1)
        rank.stop.number = 15 if len(passes) == 2 else 0

    model.register_forward_pre_hook(stop)
    assert continue_with_engine(model, prompt_of(), rank) is None
    assert len(passes) == 2
    assert model.training


def test_a_rollback_takes_samples_back(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    writer = MetricsWriter(run_dir, Monitor(tensorboard=False), active=True)
    other = MetricsWriter(run_dir, Monitor(tensorboard=False), active=False)
    for step, text in ((0, "a"), (2, "b"), (4, "taken back\u2028"), (None, ""), (4, "c\u2028d")):
        if step is None:
            writer.write({"step": 2, "tokens": 20, "rolled_back_from": 5})
        else:
            row = {"step": step, "tokens": step * 10, "prompt": "", "text": text}
            writer.write_sample(row)
            other.write_sample(row)
    writer.close()
    rows = [row for row in read_metrics(run_dir.samples) if "text" in row]
    assert [(row["step"], row["text"]) for row in rows] == [(0, "a"), (2, "b"), (4, "c\u2028d")]


@pytest.mark.parametrize(("num_tokens", "wanted"), [(60, [8, 60, 60]), (3, [3, 3, 3])])
def test_untrained_weights_write_little(
    rank: Rank, num_tokens: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step a few tokens show that there will be samples."""
    asked: list[int] = []

    def write(engine: Any, prompt: Prompt, rank: Rank) -> str:
        asked.append(prompt.num_tokens)
        return ""

    monkeypatch.setattr(loop, "continue_with_engine", write)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: {"eval_loss": 1.0})
    training: Any = MagicMock(rank=rank, prompt=prompt_of(num_tokens=num_tokens))
    for step in (0, 1, 2):
        assert not loop._evaluate(training, MagicMock(), Progress(step=step))
    assert asked == wanted


def test_curves_begin_with_the_first_step(tmp_path: Path) -> None:
    """TensorBoard is imported after it, and has what was before."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = RunDir(tmp_path)
    run_dir.snapshot.write_text("seed: 1\n")
    writer = MetricsWriter(run_dir, Monitor(csv=True), active=True)
    writer.write({"step": 0, "tokens": 0, "eval_loss": 8.0})
    writer.write_sample({"step": 0, "tokens": 0, "prompt": "", "text": "a"})
    assert not run_dir.tensorboard.exists()
    row = dict.fromkeys(CSV_COLUMNS, 1.0)
    writer.write({"step": 1, "tokens": 10, **row})
    writer.write({"step": 1, "tokens": 10, "eval_loss": 7.0})
    writer.close()
    events = EventAccumulator(str(run_dir.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("by_step/eval_loss")] == [0, 1]
    assert [event.step for event in events.Scalars("by_tokens/loss")] == [10]
    assert [event.step for event in events.Tensors("sample/text_summary")] == [0]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_a_run_without_a_step_has_curves(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.snapshot.write_text("seed: 1\n")
    writer = MetricsWriter(run_dir, Monitor(), active=True)
    writer.write({"step": 0, "tokens": 0, "eval_loss": 8.0})
    writer.close()
    assert list(run_dir.tensorboard.iterdir())
