"""Small models and engines that tests of training and of checkpoints share."""

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from llama_pretrain.config.model import Model
from llama_pretrain.config.optim import Optim, OptimName
from llama_pretrain.distributed import Rank
from llama_pretrain.launch.operators import build_operators
from llama_pretrain.train.engine import apply_update, undo_initial_step
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.model import build_llama_config, build_model
from llama_pretrain.train.optimizer import build_optimizer, get_optimizer_grouped_parameters
from tests.machines import resolve_for

SHAPE = Model(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    attention_bias=True, max_position_embeddings=128,
)  # fmt: skip
CONFIG = build_llama_config(SHAPE, vocab_size=64, special_ids={})
RANK = Rank(index=0, local_index=0, world_size=1, device=torch.device("cpu"))
BATCH_SIZE = 2
SHARD_ALL = {
    f"stage3_{name}": 0
    for name in (
        *("param_persistence_threshold", "max_live_parameters"),
        *("max_reuse_distance", "prefetch_bucket_size"),
    )
}
"""Without these, stage 3 would keep so small a model whole on each rank."""


@pytest.fixture(autouse=True)
def restore_linear() -> Iterator[None]:
    """zero.Init replaces torch's linear permanently: restore it after each test."""
    linear = nn.functional.linear
    yield
    nn.functional.linear = linear


def random_batches(number: int = 6) -> list[dict[str, Tensor]]:
    """Batches of all 64 tokens, so that each embedding has a gradient at every step."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randperm(64, generator=generator).view(BATCH_SIZE, 32) for _ in range(number)]
    return [{"input_ids": ids, "shift_labels": ids.flip(1)} for ids in tokens]


def plain_model(
    *, seed: int = 1, weights: Path | None = None, stage: int = 0, digest: Any = None
) -> Any:
    """The model without an engine; at stage 3 sharded, in bf16."""
    ds_config: dict[str, Any] = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage, **(SHARD_ALL if stage == 3 else {})},
        "bf16": {"enabled": True},
    }
    return build_model(CONFIG, seed=seed, weights=weights, ds_config=ds_config, digest=digest)


def small_llama(seed: int, **changes: Any) -> Any:
    """transformers' model, as it initializes it."""
    torch.manual_seed(seed)
    sizes: Any = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **changes))


def compile_operator(name: str) -> None:
    """Compile an optimizer as a run does, under the lock that other tests' runs take too."""
    run = resolve_for(f"optim={name}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "build.log"
        build_operators(run, log=log, taking_time=lambda what: nullcontext())


def build_small_engine(
    stage: int,
    *,
    bf16: bool | dict[str, Any] = False,
    name: str = "torch_adamw",
    learning_rate: float = 0.01,
) -> Any:
    """A training engine of the small model, fully sharded."""
    compile_operator(name)
    zero = {"stage": stage, "reduce_scatter": name != "muon", **(SHARD_ALL if stage == 3 else {})}
    ds_config: dict[str, Any] = {
        "train_batch_size": BATCH_SIZE,
        "train_micro_batch_size_per_gpu": BATCH_SIZE,
        "gradient_clipping": 0.0 if name == "muon" else 1.0,
        "zero_optimization": zero,
        "bf16": bf16 if isinstance(bf16, dict) else {"enabled": bf16},
    }
    model = build_model(CONFIG, seed=1, weights=None, ds_config=ds_config)
    optim = Optim(name=OptimName(name), learning_rate=learning_rate)
    optimizer = build_optimizer(model, get_optimizer_grouped_parameters(model, 0.1), optim)
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config,
        dist_init_required=False,
    )  # fmt: skip
    undo_initial_step(engine)
    engine.train()
    return engine


def take_step(engine: Any, batch: dict[str, Tensor]) -> tuple[float, float | None]:
    """One step. Returns its loss and the norm of its gradient."""
    loss = token_losses(engine, batch).mean()
    engine.backward(loss)
    return loss.item(), apply_update(engine, skip=False)
