"""One rank of a training loop in plain PyTorch, as an expert would write it.

    torchrun ... benchmarks/arms/bare.py RUN_DIR MODEL_DIR STEPS_FILE [--compile]

Weights are bf16 with fp32 masters in one fused AdamW; DistributedDataParallel overlaps its
all-reduce of bf16 buckets with the backward pass. (fp32 weights under autocast, the other way, have
not been measured.) Where our run is in fp32, so is this: the weights are their own masters.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

from benchmarks.arms.inputs import Inputs


class ModelWithLoss(nn.Module):
    """The model with its loss, so that a compiler sees both."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, T) int64, twice -> the mean cross entropy in fp32."""
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class MasterWeights:
    """AdamW over fp32 weights, or over fp32 copies of bf16 ones, which have gradients too."""

    def __init__(self, model: nn.Module, optim: Any):
        self._weights: list[torch.Tensor] = list(model.parameters())
        self._copies = any(weight.dtype != torch.float32 for weight in self._weights)
        self._masters = self._weights
        if self._copies:
            # DeepSpeed's masters begin as rounded weights too. From unrounded ones the first small
            # updates already change weights, and the second step's loss differs by 0.01.
            self._masters = [nn.Parameter(weight.detach().float()) for weight in self._weights]
            for master in self._masters:
                master.grad = torch.zeros_like(master)
        groups: list[dict[str, Any]] = [
            {"params": [master for master in self._masters if master.dim() > 1]},
            {"params": [master for master in self._masters if master.dim() <= 1]},
        ]
        groups[1]["weight_decay"] = 0.0
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradient, update the masters, round them into the weights."""
        if self._copies:
            torch._foreach_copy_(_gradients(self._masters), _gradients(self._weights))
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self.optimizer.step()
        if self._copies:
            torch._foreach_copy_(self._weights, self._masters)
        for weight in self._weights:
            weight.grad = None


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def main() -> None:
    """Train until the process is killed."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    inputs = Inputs()
    on_gpu = inputs.plan.device == "cuda"
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    model: Any = LlamaForCausalLM.from_pretrained(
        inputs.model_dir, dtype=torch.float32, attn_implementation="sdpa"
    )
    if inputs.in_bf16:
        for parameter in model.parameters():  # not .bfloat16(): rotary frequencies stay fp32
            parameter.data = parameter.data.bfloat16()
    model = model.to(device)
    state = MasterWeights(model, inputs.run.optim)
    schedule = LambdaLR(state.optimizer, inputs.learning_rate_factor())
    module = ModelWithLoss(model.train())
    if inputs.compile:
        module.compile(dynamic=False)
    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for batch in inputs.micro_batches(rank=rank, world_size=world_size):
        input_ids, labels = (batch[name].to(device) for name in ("input_ids", "shift_labels"))
        loss = parallel(input_ids, labels)
        loss.backward()
        state.step()
        schedule.step()
        inputs.write_step(loss)


if __name__ == "__main__":
    main()
