"""The config group `optim`: the optimizer and its hyperparameters."""

import math
from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval, Len

from llama_pretrain.config.fields import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    UsedWhen,
    schema,
)
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


HOST_OPTIMIZERS = {
    OptimName.adamw: "cpu_adam",
    OptimName.cpu_adam: "cpu_adam",
    OptimName.lion: "cpu_lion",
    OptimName.cpu_lion: "cpu_lion",
    OptimName.cpu_adagrad: "cpu_adagrad",
}
"""The optimizer that updates state in host memory, by what was asked for."""

LIONS = ("lion", "fused_lion", "cpu_lion")
MUON = UsedWhen("optim.name", ("muon",))
NOT_LION = UsedWhen("optim.name", tuple(o.value for o in OptimName if o.value not in LIONS))
NOT_ADAGRAD = UsedWhen("optim.name", tuple(o.value for o in OptimName if o.value != "cpu_adagrad"))


class BatchScaling(str, Enum):
    none = "none"
    sqrt = "sqrt"
    linear = "linear"

    def factor(self, ratio: float) -> float:
        """What a learning rate is multiplied by when the batch grows by `ratio`."""
        return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.value]


@schema
class Optim:
    """The optimizer and its hyperparameters."""

    name: OptimName = OptimName.adamw
    """`adamw` (arXiv 1711.05101) chooses cpu_adam when optimizer state is offloaded, else
    torch_adamw. `lion` (arXiv 2302.06675) chooses cpu_lion or fused_lion. `lamb` (arXiv
    1904.00962) needs CUDA and stage 0. `muon` (kellerjordan.github.io/posts/muon) updates
    the layers' matrices, AdamW the rest. All but torch_adamw and muon are DeepSpeed's kernels; the
    cpu_ ones update state in host memory."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of warm-up."""
    scale_by_batch: BatchScaling = BatchScaling.none
    """How learning rates follow the global batch size: not at all, with its square root (arXiv
    2405.14578), or linearly (arXiv 1706.02677). A snapshot holds the scaled values."""
    reference_batch_size: Annotated[
        PositiveInt | None, UsedWhen("optim.scale_by_batch", ("sqrt", "linear"))
    ] = None
    """`scale_by_batch`: the global batch size, in sequences, that the learning rates are given for.
    """
    betas: Annotated[list[float], Len(2, 2), NOT_ADAGRAD] = field(
        default_factory=lambda: [0.9, 0.95]
    )
    """Decay rates of the first and second moment (not Adagrad)."""
    eps: Annotated[PositiveFloat, NOT_LION] = 1e-8
    """Added to the denominator of the update (not Lion)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay (Adagrad: L2) of linear and embedding weights; norms and biases never
    decay."""
    muon_learning_rate: Annotated[PositiveFloat, MUON] = 0.02
    """`muon`: peak learning rate of the layers' matrices; learning_rate is AdamW's."""
    muon_momentum: Annotated[float, Interval(ge=0, lt=1), MUON] = 0.95
    """`muon`: decay rate of the momentum."""


def validate_optim(run: "Run") -> Iterator[Problem]:
    """Betas in range, and optimizers that need certain ZeRO stages."""
    optim, zero, clipping = run.optim, run.zero, run.train.gradient_clipping
    for index, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            yield Problem(
                path=f"optim.betas.{index}",
                message=f"must be at least 0 and less than 1 (got {beta})",
            )
    if optim.name is OptimName.lamb and zero.stage > 0:
        yield Problem(
            path="optim.name",
            message="lamb scales each weight by its norm, but ZeRO gives it flat shards"
            f" (got stage {zero.stage})",
            hint="Set zero.stage=0, or choose another optimizer",
        )
    if optim.name is not OptimName.muon:
        return
    if zero.stage == 0:
        yield Problem(
            path="optim.name",
            message="muon requires stage 1, 2 or 3, which gather whole gradients (got stage 0)",
            hint="Set zero.stage=1",
        )
    if clipping is not None and clipping > 0:
        yield Problem(
            path="train.gradient_clipping",
            message="is not supported with optim=muon: DeepSpeed would clip the orthogonalised"
            f" update, dividing it by about 30 (got {clipping})",
            hint="Remove it, or set it to 0",
        )
    if zero.stage == 3 and zero.reduce_scatter:
        yield Problem(
            path="zero.reduce_scatter",
            message="is not supported with optim=muon at stage 3, which needs whole gradients"
            " (got true)",
            hint="Remove it, or set it to false",
        )
    if zero.zero_quantized_gradients:
        yield Problem(
            path="zero.zero_quantized_gradients",
            message="is not supported with optim=muon, which needs whole gradients (got true)",
            hint="Set it to false",
        )
