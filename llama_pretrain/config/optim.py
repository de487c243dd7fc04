"""The config group `optim`: the optimizer and its hyperparameters."""

import math
from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval, Len

from llama_pretrain.config.fields import NonNegativeFloat, PositiveFloat, PositiveInt, schema
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class OptimName(str, Enum):
    adamw = "adamw"
    fused_adam = "fused_adam"
    cpu_adam = "cpu_adam"
    torch_adamw = "torch_adamw"
    lion = "lion"
    fused_lion = "fused_lion"
    cpu_lion = "cpu_lion"
    cpu_adagrad = "cpu_adagrad"
    lamb = "lamb"
    muon = "muon"


class BatchScaling(str, Enum):
    none = "none"
    sqrt = "sqrt"
    linear = "linear"

    def factor(self, ratio: float) -> float:
        """What a learning rate is multiplied by where the batch is so many times as large."""
        return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.value]


@schema
class Optim:
    """The optimizer and its numbers."""

    name: OptimName = OptimName.adamw
    """`adamw` (arXiv 1711.05101) chooses: cpu_adam where optimizer state is offloaded, else
    torch_adamw. `lion` (arXiv 2302.06675) chooses cpu_lion or fused_lion. `lamb` (arXiv
    1904.00962) needs CUDA and stage 0. `muon` (kellerjordan.github.io/posts/muon) updates
    the layers' matrices, AdamW the rest. All but torch_adamw and muon are DeepSpeed's kernels; the
    cpu_ ones update state in host memory."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of warm-up."""
    scale_by_batch: BatchScaling = BatchScaling.none
    """How the learning rates follow the global batch: not, with the square root of its size (arXiv
    2405.14578), or in proportion to it (arXiv 1706.02677). A snapshot has the scaled ones."""
    scale_from_rows: PositiveInt | None = None
    """`scale_by_batch`: rows of the global batch that the learning rates are given for."""
    betas: Annotated[list[float], Len(2, 2)] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and second moment (not Adagrad)."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the update (not Lion)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay (Adagrad: L2) of linear and embedding weights; norms and biases never
    decay."""
    muon_learning_rate: PositiveFloat = 0.02
    """`muon`: peak learning rate of the layers' matrices; learning_rate is AdamW's."""
    muon_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """`muon`: decay rate of the momentum."""


HOST_OPTIMIZERS = {
    OptimName.adamw: "cpu_adam",
    OptimName.cpu_adam: "cpu_adam",
    OptimName.lion: "cpu_lion",
    OptimName.cpu_lion: "cpu_lion",
    OptimName.cpu_adagrad: "cpu_adagrad",
}
"""Optimizers that update state in host memory, by what was asked for."""


LEFT_BY_RECIPES: dict[str, tuple[Any, ...]] = {
    "eps": (1e-5, 1e-6, 1e-10),
    "betas": ([0.9, 0.999], [0.95, 0.98]),
}
"""What experiments and other optimizers' YAMLs set: no mistake where this optimizer ignores it."""


def validate_optim(run: "Run") -> Iterator[Problem]:
    optim, stage, name = run.optim, run.zero.stage, run.optim.name.value
    for index, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            yield Problem(
                path=f"optim.betas.{index}",
                message=f"should be at least 0 and less than 1 (got {beta})",
            )
    default = type(optim)()
    unread = {"muon_learning_rate", "muon_momentum"} if "muon" not in name else set()
    unread |= {"eps"} if "lion" in name else {"betas"} if "adagrad" in name else set()
    for key in sorted(unread):
        if getattr(optim, key) not in (getattr(default, key), *LEFT_BY_RECIPES.get(key, ())):
            yield Problem(
                path=f"optim.{key}",
                message=f"is not used with optim={name} (got {getattr(optim, key)})",
                hint="add optim=muon" if key.startswith("muon") else "leave it out",
            )
    if optim.name is OptimName.lamb and stage > 0:
        yield Problem(
            path="optim.name",
            message="lamb scales each weight by its norm, and ZeRO gives it flat shards"
            f" (got stage {stage})",
            hint="set zero.stage=0, or choose another optimizer",
        )
    if optim.name is OptimName.muon:
        yield from _check_muon(run)


def _check_muon(run: "Run") -> Iterator[Problem]:
    zero, clipping = run.zero, run.train.gradient_clipping
    if zero.stage == 0:
        yield Problem(
            path="optim.name",
            message="muon needs a stage that gathers whole gradients for it: 1, 2 or 3"
            " (got stage 0)",
            hint="set zero.stage=1",
        )
    if clipping is not None and clipping > 0:
        yield Problem(
            path="train.gradient_clipping",
            message="with optim=muon DeepSpeed clips the orthogonalised update, which divides it"
            f" by thirty or so (got {clipping})",
            hint="leave it out, or set it to 0",
        )
    if zero.stage == 3 and zero.reduce_scatter:
        yield Problem(
            path="zero.reduce_scatter",
            message="muon at stage 3 needs whole gradients (got true)",
            hint="leave it out, or set it to false",
        )
    if zero.zero_quantized_gradients:
        yield Problem(
            path="zero.zero_quantized_gradients",
            message="muon needs whole gradients (got true)",
            hint="set it to false",
        )
