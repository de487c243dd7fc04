"""Text during training: the engine continues the run's prompt after each evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.func import functional_call
from transformers import LlamaForCausalLM
from transformers.initialization import no_init_weights

from llama_pretrain.checkpoint.huggingface import load_tokenizer
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.zero import OffloadDevice
from llama_pretrain.data.dataset import document_positions
from llama_pretrain.distributed import Rank
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.train.kernels.install import without_compilation

LENGTH_MULTIPLE = 16
"""Inputs are padded to a multiple of this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the engine continues, and how."""

    text: str
    ids: list[int]
    num_tokens: int
    """Maximum number of tokens to add."""
    max_length: int
    """Maximum length of an input: the sequence length of training."""
    eos_id: int
    document_mask: bool
    gather_once: bool
    """Whether stage 3 gathers all weights once per generation instead of once per token."""
    tokenizer: Any

    def decode(self, added: Sequence[int]) -> str:
        """The prompt and its continuation."""
        return str(self.tokenizer.decode([*self.ids, *added], skip_special_tokens=True))


def open_prompt(run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir) -> Prompt | None:
    """The run's prompt; `None` if it has none. A prompt without tokens begins a document."""
    text = run.train.sample_prompt
    if not text:
        return None
    eos_id = plan.corpus.eos_id
    tokenizer = load_tokenizer(run_dir.tokenizer)
    return Prompt(
        text=text,
        ids=tokenizer(text, return_token_type_ids=False).input_ids or [eos_id],
        num_tokens=run.train.sample_tokens,
        max_length=run.data.sequence_length,
        eos_id=eos_id,
        document_mask=run.data.document_mask,
        gather_once=_gathers_once(run, plan),
        tokenizer=tokenizer,
    )


def _gathers_once(run: ResolvedRun, plan: TrainingPlan) -> bool:
    """Whether stage 3 may hold all weights at once.

    Then the plan counts them, and gathering all once is far faster than each layer per token.
    """
    zero = run.zero
    return (
        zero.stage == 3
        and zero.offload_param.device is OffloadDevice.none
        and not zero.zero_quantized_weights
        and zero.zero_hpz_partition_size == 1
        and plan.parameters.total <= zero.stage3_max_live_parameters
        and not run.precision.torch_autocast.enabled
    )


@torch.no_grad()
def generate_with_engine(engine: Any, prompt: Prompt, rank: Rank) -> str | None:
    """The prompt and its greedy continuation, up to the document's end.

    Every rank calls it: at ZeRO stage 3 each forward pass gathers weights from all ranks, so all
    take the same number of passes, with rank 0's tokens. It uses neither random generators nor a
    KV cache. `None` if a signal has interrupted it.
    """
    engine.eval()
    added: list[int] = []
    number = 0
    with _gathered(engine) if prompt.gather_once else nullcontext(engine) as model:
        while len(added) < prompt.num_tokens and not number and added[-1:] != [prompt.eos_id]:
            logits = _next_logits(model, [*prompt.ids, *added][-prompt.max_length :], prompt, rank)
            number, token = _agree(rank, int(logits.argmax()))
            added.append(token)
            rank.beat()
    engine.train()
    return None if number else prompt.decode(added)


@contextmanager
def _gathered(engine: Any) -> Iterator[Callable[..., Any]]:
    """The model with all its weights gathered, without the hooks that gather and release them."""
    trained = engine.module
    with torch.device("meta"), no_init_weights():
        model: Any = LlamaForCausalLM(trained.config)
    model.eval()
    engine.optimizer.empty_partition_cache()  # prefetched weights may still be in flight
    with deepspeed.zero.GatheredParameters(list(trained.parameters())):
        tensors = dict(trained.named_parameters()) | dict(trained.named_buffers())
        yield lambda **inputs: functional_call(model, tensors, kwargs=inputs)


def _next_logits(
    model: Callable[..., Any], ids: Sequence[int], prompt: Prompt, rank: Rank
) -> torch.Tensor:
    """Logits of the next token: (V,).

    Inputs are padded at the end, which earlier tokens do not attend to, to few distinct lengths: a
    CPU caches kernels and memory for each shape (60 shapes took 140 MiB in the default run).
    """
    padded = min(prompt.max_length, -(-len(ids) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    tokens = np.full(padded, prompt.eos_id)
    tokens[: len(ids)] = ids
    inputs = {"input_ids": tokens}
    if prompt.document_mask:
        inputs["position_ids"] = document_positions(tokens, eos_id=prompt.eos_id)
    on_device = {
        key: torch.from_numpy(value)[None].to(rank.device) for key, value in inputs.items()
    }
    last = torch.tensor([len(ids) - 1], device=rank.device)
    with without_compilation():
        logits: torch.Tensor = model(**on_device, use_cache=False, logits_to_keep=last).logits[0, 0]
    return logits


def _agree(rank: Rank, token: int) -> tuple[int, int]:
    """The stop signal of any rank, and rank 0's token.

    Ranks that used their own tokens could stop at different ones, and hang.
    """
    own = [rank.stop.number, token if rank.is_first else -1]
    shared = torch.tensor(own, dtype=torch.int64, device=rank.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    number, agreed = shared.tolist()
    return int(number), int(agreed)
