"""The state of a training engine as fragments: what this rank owns, at any ZeRO stage.

The one file that reads private attributes of DeepSpeed's optimizer wrappers. DeepSpeed keeps fp32
weights and optimizer state as parameters, as flat partitions of parameter groups, or as flat
partitions of sub-groups. Here each is a list of ranges of named parameters, the contents of a
checkpoint (tensors.py). Restoring is exact: the 16-bit weights are the rounded fp32 ones at every
stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_pretrain.checkpoint.tensors import WEIGHT, StoredState, fragment_key
from llama_pretrain.distributed import Rank

MOMENTUM = "momentum_buffer"
COUNTERS = ("global_steps", "skipped_steps", "global_samples")
"""The engine's counters to restore. Not micro_steps: it depends on gradient accumulation."""
CPU_RNG, CUDA_RNG = "rng:cpu:0", "rng:cuda:0"


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened parameter, and where DeepSpeed keeps it on this rank."""

    name: str
    start: int
    owner: Tensor
    """The tensor that the optimizer updates and keys its state by; it contains the fragment."""
    offset: int
    numel: int

    def view(self, tensor: Tensor) -> Tensor:
        """The fragment's range of the owner, or of a state of the owner's size."""
        return tensor.detach().reshape(-1).narrow(0, self.offset, self.numel)


def list_fragments(engine: Any) -> Iterator[Fragment]:
    """What this rank holds of every parameter; all of it at stage 0."""
    wrapper, names = engine.optimizer, _parameter_names(engine)
    if engine.zero_optimization_stage() == 3:
        for group in wrapper.fp16_groups:
            for parameter in group:
                number, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
                start = size * wrapper._get_param_partition_rank(parameter)
                numel = min(size, parameter.ds_numel - start)  # the last ones are padded
                owner = wrapper.fp32_partitioned_groups_flat[number]
                if numel > 0 and not wrapper._swappable_optimizer_subgroup(number):
                    yield Fragment(names[parameter], start, owner, offset, numel)
    elif hasattr(wrapper, "update_lp_params"):  # stages 1 and 2, and BF16_Optimizer
        flats = getattr(wrapper, "single_partition_of_fp32_groups", None)
        flats = wrapper.fp32_groups_flat_partition if flats is None else flats
        for parameter, name in names.items():
            link = getattr(parameter, "_hp_mapping", None)
            if link is not None:
                place = link.hp_fragment_address
                start = link.lp_fragment_address.start
                owner = flats[link.param_group_index]
                yield Fragment(name, start, owner, place.start, place.numel)
    else:
        for parameter, owner, offset in replicated_weights(engine):
            yield Fragment(names[parameter], 0, owner, offset, parameter.numel())


def _parameter_names(engine: Any) -> dict[Any, str]:
    return {parameter: name for name, parameter in engine.module.named_parameters()}


def replicated_weights(engine: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Stage 0: each parameter, the tensor with its fp32 weights, and the offset in it.

    In fp32 the tensor is the parameter itself.
    """
    wrapper = engine.optimizer
    groups = getattr(wrapper, "fp16_groups", [])
    if hasattr(wrapper, "fp32_groups_flat"):  # FP16_Optimizer, for FusedAdam
        for group, flat in zip(groups, wrapper.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                yield parameter, flat, offset
                offset += parameter.numel()
    elif hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer
        for group, masters in zip(groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield parameter, master, 0
    else:
        for parameter in engine.module.parameters():
            yield parameter, parameter, 0


def collect_tensors(engine: Any, rank: Rank) -> dict[str, Tensor]:
    """Views of the tensors that this rank writes, by their names in its file."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    replicated = engine.zero_optimization_stage() == 0
    tensors = {CPU_RNG: torch.get_rng_state()}
    if rank.device.type == "cuda":
        tensors[CUDA_RNG] = torch.cuda.get_rng_state(rank.device)
    for fragment in list_fragments(engine):
        first, last, owner = 0, fragment.numel, fragment.owner
        if replicated:  # each rank writes its share of what all ranks have
            first, last = (last * r // rank.world_size for r in (rank.index, rank.index + 1))
        if first == last:
            continue
        kinds = {WEIGHT: owner}
        for kind, value in inner.state.get(owner, {}).items():
            if torch.is_tensor(value) and value.numel() == owner.numel():
                kinds[kind] = value
            elif torch.is_tensor(value) and value.numel() != 1 and kind != MOMENTUM:
                raise RuntimeError(
                    f"optimizer state {kind}: must have {owner.numel()} elements or one"
                    f" (got {value.numel()})"
                )
        for kind, value in kinds.items():
            key = fragment_key(fragment.name, kind, fragment.start + first)
            tensors[key] = fragment.view(value)[first:last]
    tensors |= _swapped_weights(engine)
    for fragment in _muon_momenta(engine):
        if MOMENTUM in inner.state[fragment.owner]:
            buffer = inner.state[fragment.owner][MOMENTUM]
            tensors[fragment_key(fragment.name, MOMENTUM, 0)] = fragment.view(buffer)
    return tensors


def _swapped_weights(engine: Any) -> dict[str, Tensor]:
    """Weights on NVMe, without their moments: such a run can be exported but not resumed."""
    wrapper, found = engine.optimizer, {}
    names = _parameter_names(engine)
    if getattr(wrapper, "swap_optimizer", False):
        for number, group in enumerate(wrapper.fp16_groups):
            for parameter in group if wrapper._swappable_optimizer_subgroup(number) else []:
                weight = wrapper.get_local_fp32_param(parameter).flatten().cpu().clone()
                start = weight.numel() * wrapper._get_param_partition_rank(parameter)
                key = fragment_key(names[parameter], WEIGHT, start)
                found[key] = weight[: max(0, parameter.ds_numel - start)]
    return {key: weight for key, weight in found.items() if weight.numel()}


def _muon_momenta(engine: Any) -> Iterator[Fragment]:
    """Muon at stages 1 and 2: the whole momentum of each matrix that this rank has a part of."""
    wrapper, names = engine.optimizer, _parameter_names(engine)
    for number, parameters in enumerate(getattr(wrapper, "params_in_partition", [])):
        offset, owner = 0, wrapper.single_partition_of_fp32_groups[number]
        for parameter in parameters:
            if getattr(parameter, "use_muon", False):
                yield Fragment(names[parameter], 0, owner, offset, parameter.numel())
                offset += parameter.numel()


def collect_values(engine: Any) -> dict[str, Any]:
    """What is not a tensor and is the same on all ranks, for state.json."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    scalars: dict[str, Any] = {}
    for fragment in list_fragments(engine):
        for kind, value in inner.state.get(fragment.owner, {}).items():
            if torch.is_tensor(value) and value.numel() == 1 != fragment.owner.numel():
                scalars.setdefault(kind, [str(value.dtype).removeprefix("torch."), value.item()])
            elif isinstance(value, int | float):
                scalars.setdefault(kind, [None, value])
    grad_scaler = _grad_scaler(engine)
    return {
        "parameters": {
            name: list(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in engine.module.named_parameters()
        },
        "optimizer_scalars": scalars,
        "group_steps": [group.get("step") for group in inner.param_groups],
        "schedule_step": engine.lr_scheduler.last_epoch,
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "loss_scale": {
            key: value
            for key, value in vars(_loss_scaler(engine) or object).items()
            if type(value) in (int, float)
        },
        "grad_scaler": None if grad_scaler is None else grad_scaler.state_dict(),
    }


def _loss_scaler(engine: Any) -> Any:
    """The scaler of fp16's loss: one of two kinds of object, with numbers as attributes."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return getattr(engine.optimizer, "loss_scale_config", None) if scaler is None else scaler


def _grad_scaler(engine: Any) -> Any:
    """torch's scaler, for autocast to float16."""
    own = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return engine.torch_autocast_z0_gradscaler if own is None else own


def load_checkpoint(engine: Any, folder: Path, rank: Rank) -> dict[str, Any]:
    """Restore a checkpoint whose files the parent has verified. Returns the run's progress.

    Every rank calls it.
    """
    with StoredState(folder, rank=rank.index) as stored:
        restore(engine, stored, rank)
        progress: dict[str, Any] = stored.values["progress"]
    dist.barrier()  # no rank trains, and saves, while another still reads
    return progress


@torch.no_grad()
def restore(engine: Any, stored: StoredState, rank: Rank) -> None:
    """Give an engine the state of a checkpoint; every rank calls it.

    Hyperparameters of the optimizer stay those of the run: the schedule sets its learning rate.
    """
    wrapper = engine.optimizer
    stage3 = engine.zero_optimization_stage() == 3
    if stage3:
        wrapper.checkpoint_event_prologue()
    _restore_optimizer(engine, stored)
    if stage3:
        for number in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        wrapper.checkpoint_event_epilogue()
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    else:
        for parameter, owner, offset in replicated_weights(engine):
            if owner is not parameter:
                weight = owner.reshape(-1).narrow(0, offset, parameter.numel())
                parameter.copy_(weight.view_as(parameter))
    _restore_values(engine, stored.values)
    # A rank that did not exist when the checkpoint was saved keeps its seed.
    if (state := stored.tensor(rank.index, CPU_RNG)) is not None:
        torch.set_rng_state(state)
    if rank.device.type == "cuda" and (state := stored.tensor(rank.index, CUDA_RNG)) is not None:
        torch.cuda.set_rng_state(state, rank.device)


def _restore_optimizer(engine: Any, stored: StoredState) -> None:
    """The fp32 weights and the optimizer's state."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    momenta = list(_muon_momenta(engine))
    for fragment in list_fragments(engine):
        owner = fragment.owner
        for kind in stored.kinds(fragment.name):
            if kind == MOMENTUM and momenta:
                continue
            values = stored.read(fragment.name, kind, fragment.start, fragment.numel)
            if kind == WEIGHT:
                target = owner
            else:
                state = inner.state[owner]
                if kind not in state:
                    state[kind] = torch.zeros_like(owner, dtype=values.dtype)
                target = state[kind]
            fragment.view(target).copy_(values)
        for kind, (dtype, value) in stored.values["optimizer_scalars"].items():
            if dtype is not None:
                value = torch.tensor(value, dtype=getattr(torch, dtype), device=owner.device)
            inner.state[owner][kind] = value
    for fragment in momenta:
        values = stored.read(fragment.name, MOMENTUM, 0, fragment.numel)
        state = inner.state[fragment.owner]
        if MOMENTUM not in state:
            size = max(m.offset + m.numel for m in momenta if m.owner is fragment.owner)
            state[MOMENTUM] = values.new_zeros(size).to(fragment.owner.device)
        fragment.view(state[MOMENTUM]).copy_(values)
    for group, step in zip(inner.param_groups, stored.values["group_steps"], strict=True):
        if step is not None:
            group["step"] = step


def _restore_values(engine: Any, values: dict[str, Any]) -> None:
    for name, value in values["counters"].items():
        setattr(engine, name, value)
    scaler = _loss_scaler(engine)
    for name, value in values["loss_scale"].items():
        if name in vars(scaler or object):
            setattr(scaler, name, value)
    if values["grad_scaler"] and (grad_scaler := _grad_scaler(engine)) is not None:
        grad_scaler.load_state_dict(values["grad_scaler"])
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = values["schedule_step"]
    groups = zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    )
    for group, peak, factor in groups:  # the rates change when a run is extended
        group["lr"] = peak * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
