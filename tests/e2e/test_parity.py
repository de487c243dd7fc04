"""The same losses at every ZeRO stage and number of ranks, and those of plain PyTorch."""

import math
from pathlib import Path
from shlex import split
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_pretrain.data.order import sequences_at
from llama_pretrain.plan.plan import load_plan
from llama_pretrain.runs.layout import RunDir
from tests.conftest import SMALL, Command, Runner

STEPS, GLOBAL_BATCH, LENGTH, SEED = 20, 4, 64, 1234
SHARD_ALL = (
    *("zero.stage3_param_persistence_threshold=0", "zero.stage3_max_live_parameters=0"),
    *("zero.stage3_max_reuse_distance=0", "zero.stage3_prefetch_bucket_size=0"),
)
"""A tiny model is below stage 3's thresholds: without these it would never be sharded."""
LONG = (f"train.max_steps={STEPS}", "schedule.warmup_steps=5", "optim.learning_rate=3e-3")


def at_stage(stage: int) -> tuple[str, ...]:
    """Overrides of a stage at which everything is sharded that can be."""
    return (f"zero=stage{stage}", *(SHARD_ALL if stage == 3 else ()))


SHARDED = " ".join(at_stage(3))


def train_shape(runner: Runner, *words: str) -> Command:
    """A run without debug=smoke, which would set the model's shape."""
    folder = runner.folder / f"shape{len(list(runner.folder.iterdir()))}"
    paths = (f"data.paths=['{runner.corpus}/*.py']", f"data.cache_dir={runner.cache_dir}")
    place = f"hydra.run.dir={folder}"
    return runner.bare(*SMALL[1:], *paths, *words, place, run_dir=RunDir(folder))


def train(runner: Runner, *, stage: int, ranks: int, micro: int, precision: str) -> Command:
    words = f"launch.num_processes={ranks} batch.micro_batch_size={micro} precision={precision}"
    return runner(*LONG, *at_stage(stage), *split(words))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA that transformers initialised, so that the start is none of our code."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(7)
    sizes: Any = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, max_position_embeddings=128, attention_bias=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reference_losses(pretrained: Path, tokens: np.ndarray, rows: int) -> list[float]:
    """Plain PyTorch: one process, the whole batch at once, torch's AdamW."""
    model = LlamaForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    plain = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]
    decayed = [p for n, p in model.named_parameters() if not ("norm" in n or n.endswith("bias"))]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses = []
    for step in range(STEPS):
        if step < 5:
            rate = 3e-3 * (step + 1) / 5
        else:
            rate = 3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 15)))
        positions = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH, dtype=np.uint64)
        chosen = sequences_at(positions, num_sequences=rows, seed=SEED)
        batch = np.stack([tokens[int(r) * LENGTH : int(r) * LENGTH + LENGTH + 1] for r in chosen])
        data = torch.from_numpy(batch.astype(np.int64))
        logits = model(input_ids=data[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 512), data[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_equal_plain_pytorch(shared_runner: Runner, pretrained: Path, stage: int) -> None:
    words = (
        f"model=pretrained model.path={pretrained} tokenizer.vocab_size=512 precision=fp32"
        f" launch.num_processes=2 batch.micro_batch_size=1 train.eval_sequences=4"
    )
    done = train_shape(shared_runner, *split(words), *LONG, *at_stage(stage))
    corpus = load_plan(done.run_dir.plan).corpus
    assert corpus is not None
    tokens = np.fromfile(Path(corpus.sources[0].tokens_dir) / "train-00000.bin", dtype=np.uint16)
    expected = reference_losses(pretrained, tokens, corpus.train_sequences)
    np.testing.assert_allclose(done.losses, expected, atol=2e-6, rtol=0)


@pytest.fixture(scope="module")
def baselines(shared_runner: Runner) -> dict[str, Command]:
    """The run on one rank that the others are compared with, by precision."""
    return {
        "fp32": train(shared_runner, stage=0, ranks=1, micro=4, precision="fp32"),
        "bf16": train(shared_runner, stage=1, ranks=1, micro=4, precision="bf16"),
    }


# Every pair of values occurs in one of the points.
POINTS = (
    *((0, 1, 2, "bf16"), (0, 2, 1, "fp32"), (1, 1, 2, "fp32"), (1, 2, 1, "bf16")),
    *((2, 1, 1, "bf16"), (2, 2, 2, "fp32"), (3, 1, 1, "fp32"), (3, 2, 2, "bf16")),
)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_losses_depend_on_neither_stage_nor_ranks_nor_micro_batch(
    shared_runner: Runner, baselines: dict[str, Command], point: tuple[int, int, int, str]
) -> None:
    stage, ranks, micro, precision = point
    done = train(shared_runner, stage=stage, ranks=ranks, micro=micro, precision=precision)
    rows, expected = done.rows("loss"), baselines[precision].rows("loss")
    assert len(rows) == STEPS
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    assert done.losses == pytest.approx(baselines[precision].losses, abs=tolerance)
    assert [row["sample_hash"] for row in rows] == [row["sample_hash"] for row in expected]
    if precision == "fp32":
        norms, others = ([row["grad_norm"] for row in some] for some in (rows, expected))
        np.testing.assert_allclose(norms, others, rtol=1e-5)
