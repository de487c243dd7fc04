"""Text while training: the engine continues the run's prompt after each evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.func import functional_call
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.initialization import no_init_weights

from llama_pretrain.config.run import Run
from llama_pretrain.config.zero import OffloadDevice
from llama_pretrain.data.dataset import document_positions
from llama_pretrain.distributed import Rank
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.train.kernels.install import without_compilation

LENGTHS = 16
"""Rows have a multiple of so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the engine continues, and how far."""

    text: str
    ids: list[int]
    num_tokens: int
    """Tokens to add, at most."""
    longest: int
    """Tokens that the model sees at once: those of a row, so that no row is longer than it
    trains on."""
    eos_id: int
    document_mask: bool
    gathered_once: bool
    """Whether the weights are gathered for a whole text, and not for each token of it."""
    tokenizer: Any

    def decode(self, added: Sequence[int]) -> str:
        """The prompt and its continuation."""
        return str(self.tokenizer.decode([*self.ids, *added], skip_special_tokens=True))


def open_prompt(run: Run, plan: Plan, run_dir: RunDir) -> Prompt | None:
    """The run's prompt; `None` where it has none. One without a token begins a document."""
    if not run.train.sample_prompt:
        return None
    assert plan.corpus is not None
    eos_id = plan.corpus.eos_id
    tokenizer = AutoTokenizer.from_pretrained(run_dir.tokenizer, local_files_only=True)
    text = run.train.sample_prompt
    ids = tokenizer(text, return_token_type_ids=False).input_ids or [eos_id]
    return Prompt(
        text=text,
        ids=ids,
        num_tokens=run.train.sample_tokens,
        longest=run.data.sequence_length,
        eos_id=eos_id,
        document_mask=run.data.document_mask,
        gathered_once=_gathers_once(run, plan),
        tokenizer=tokenizer,
    )


def _gathers_once(run: Run, plan: Plan) -> bool:
    """Whether stage 3 may hold all weights at once: then the plan counts them, and one gathering
    of all is far quicker than one of each layer for each token."""
    zero = run.zero
    here = zero.stage == 3 and zero.offload_param.device is OffloadDevice.none
    here = here and not zero.zero_quantized_weights and zero.zero_hpz_partition_size in (None, 1)
    fits = plan.parameters.total <= zero.stage3_max_live_parameters
    return here and fits and not run.precision.torch_autocast.enabled


@torch.no_grad()
def continue_with_engine(engine: Any, prompt: Prompt, rank: Rank) -> str | None:
    """The prompt and the likeliest tokens after it, to the document's end at most.

    Every rank calls it: at ZeRO stage 3 each forward pass gathers weights from all, so all run
    equally many. They take rank 0's tokens. No generator is touched, and no cache is kept.
    `None` where a rank was asked to stop.
    """
    engine.eval()
    added: list[int] = []
    number = 0
    with _weights_at_hand(engine) if prompt.gathered_once else nullcontext(engine) as model:
        while len(added) < prompt.num_tokens and not number and added[-1:] != [prompt.eos_id]:
            logits = _next_logits(model, [*prompt.ids, *added][-prompt.longest :], prompt, rank)
            number, token = _agree(rank, int(logits.argmax()))
            added.append(token)
            rank.beat()
    engine.train()
    return None if number else prompt.decode(added)


@contextmanager
def _weights_at_hand(engine: Any) -> Iterator[Callable[..., Any]]:
    """The model with all its weights gathered, without the hooks that gather and let go of them."""
    trained = engine.module
    with torch.device("meta"), no_init_weights():
        model: Any = LlamaForCausalLM(trained.config)
    model.eval()
    engine.optimizer.empty_partition_cache()  # what it has fetched ahead may still be under way
    with deepspeed.zero.GatheredParameters(list(trained.parameters())):
        tensors = dict(trained.named_parameters()) | dict(trained.named_buffers())
        yield lambda **inputs: functional_call(model, tensors, kwargs=inputs)


def _next_logits(
    model: Callable[..., Any], ids: Sequence[int], prompt: Prompt, rank: Rank
) -> torch.Tensor:
    """What may come after these tokens: (V,).

    Rows are filled up behind, which no token before sees, to few lengths: a CPU keeps kernels and
    memory for each shape that it meets (60 shapes took 140 MiB of the default run).
    """
    row = np.full(min(prompt.longest, -(-len(ids) // LENGTHS) * LENGTHS), prompt.eos_id)
    row[: len(ids)] = ids
    inputs = {"input_ids": row}
    if prompt.document_mask:
        inputs["position_ids"] = document_positions(row, eos_id=prompt.eos_id)
    on_device = {
        key: torch.from_numpy(value)[None].to(rank.device) for key, value in inputs.items()
    }
    last = torch.tensor([len(ids) - 1], device=rank.device)
    with without_compilation():
        logits: torch.Tensor = model(**on_device, use_cache=False, logits_to_keep=last).logits[0, 0]
    return logits


def _agree(rank: Rank, token: int) -> tuple[int, int]:
    """The signal by which any rank was asked to stop, and rank 0's token.

    Ranks that took tokens of their own could end at different ones, and hang.
    """
    mine = [rank.stop.number, token if rank.is_first else -1]
    told = torch.tensor(mine, dtype=torch.int64, device=rank.device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    number, agreed = told.tolist()
    return int(number), int(agreed)
