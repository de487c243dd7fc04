"""The state of a training engine as pieces: what this rank owns, at any ZeRO stage.

DeepSpeed keeps fp32 weights and optimizer state as parameters, as flat partitions of groups, or as
flat partitions of sub-groups. Here each is a list of ranges of named parameters, and that is what a
checkpoint holds (pieces.py). What is restored is exact: the 16-bit weights of training are the
rounded fp32 ones at every stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llama_pretrain.checkpoint.tensors import WEIGHT, StoredState, piece_key
from llama_pretrain.distributed import Rank

MOMENTUM = "momentum_buffer"


COUNTERS = ("global_steps", "skipped_steps", "global_samples")
"""Of the engine. Not micro_steps: with another accumulation its boundaries lie elsewhere."""


@dataclass(frozen=True)
class Piece:
    """A range of a flattened parameter, and where DeepSpeed keeps it on this rank."""

    name: str
    start: int
    owner: torch.Tensor
    """The tensor that the optimizer updates and keys its state by; the piece is a range of it."""
    offset: int
    numel: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece's range of the owner, or of a state of the owner's size."""
        return tensor.detach().reshape(-1).narrow(0, self.offset, self.numel)


def list_pieces(engine: Any) -> list[Piece]:
    """What this rank holds of every parameter; all of it at stage 0."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return list(_pieces(engine, names))


def _pieces(engine: Any, names: dict[Any, str]) -> Iterator[Piece]:
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for group in wrapper.fp16_groups:
            for parameter in group:
                number, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
                start = size * wrapper._get_param_partition_rank(parameter)
                numel = min(size, parameter.ds_numel - start)  # the last ones are padded
                owner = wrapper.fp32_partitioned_groups_flat[number]
                if numel > 0 and not wrapper._swappable_optimizer_subgroup(number):
                    yield Piece(names[parameter], start, owner, offset, numel)
    elif hasattr(wrapper, "update_lp_params"):  # stages 1 and 2, and BF16_Optimizer
        flats = getattr(wrapper, "single_partition_of_fp32_groups", None)
        flats = wrapper.fp32_groups_flat_partition if flats is None else flats
        for parameter, name in names.items():
            link = getattr(parameter, "_hp_mapping", None)
            if link is not None:
                place = link.hp_fragment_address
                start = link.lp_fragment_address.start
                yield Piece(name, start, flats[link.param_group_index], place.start, place.numel)
    elif hasattr(wrapper, "fp32_groups_flat"):  # FP16_Optimizer, for FusedAdam
        for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                yield Piece(names[parameter], 0, flat, offset, parameter.numel())
                offset += parameter.numel()
    elif hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield Piece(names[parameter], 0, master, 0, parameter.numel())
    else:
        for parameter, name in names.items():
            yield Piece(name, 0, parameter, 0, parameter.numel())


def collect_tensors(engine: Any, rank: Rank) -> dict[str, torch.Tensor]:
    """Views of the tensors that this rank writes, by their names in its file."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    replicated = engine.zero_optimization_stage() == 0
    tensors = {"rng:cpu:0": torch.get_rng_state()}
    if rank.device.type == "cuda":
        tensors["rng:cuda:0"] = torch.cuda.get_rng_state(rank.device)
    for piece in list_pieces(engine):
        first, last = 0, piece.numel
        if replicated:  # each rank writes its share of what all have
            first, last = (piece.numel * r // rank.world_size for r in (rank.index, rank.index + 1))
        if first == last:
            continue
        kinds = {WEIGHT: piece.owner}
        for kind, value in inner.state.get(piece.owner, {}).items():
            if torch.is_tensor(value) and value.numel() == piece.owner.numel():
                kinds[kind] = value
            elif torch.is_tensor(value) and value.numel() != 1 and kind != MOMENTUM:
                raise RuntimeError(
                    f"optimizer state {kind} of {value.numel()} elements has no home"
                )
        for kind, value in kinds.items():
            key = piece_key(piece.name, kind, piece.start + first)
            tensors[key] = piece.view(value)[first:last]
    tensors |= _swapped_weights(engine)
    for piece in _whole_momenta(engine):
        if MOMENTUM in inner.state[piece.owner]:
            buffer = inner.state[piece.owner][MOMENTUM]
            tensors[piece_key(piece.name, MOMENTUM, 0)] = piece.view(buffer)
    return tensors


def _swapped_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Weights that lie on nvme, without their moments: a run can't go on from there (resume.py)."""
    wrapper, found = engine.optimizer, {}
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if getattr(wrapper, "swap_optimizer", False):
        for number, group in enumerate(wrapper.fp16_groups):
            for parameter in group if wrapper._swappable_optimizer_subgroup(number) else []:
                weight = wrapper.get_local_fp32_param(parameter).flatten().cpu().clone()
                start = weight.numel() * wrapper._get_param_partition_rank(parameter)
                key = piece_key(names[parameter], WEIGHT, start)
                found[key] = weight[: max(0, parameter.ds_numel - start)]
    return {key: weight for key, weight in found.items() if weight.numel()}


def _whole_momenta(engine: Any) -> Iterator[Piece]:
    """Muon at stages 1 and 2: the momentum of each matrix that this rank has any part of, whole."""
    wrapper = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for number, parameters in enumerate(getattr(wrapper, "params_in_partition", [])):
        offset, owner = 0, wrapper.single_partition_of_fp32_groups[number]
        for parameter in parameters:
            if getattr(parameter, "use_muon", False):
                yield Piece(names[parameter], 0, owner, offset, parameter.numel())
                offset += parameter.numel()


def collect_values(engine: Any) -> dict[str, Any]:
    """Everything that is no tensor and the same on all ranks, for state.json."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    scalars: dict[str, Any] = {}
    for piece in list_pieces(engine):
        for kind, value in inner.state.get(piece.owner, {}).items():
            if torch.is_tensor(value) and value.numel() == 1 != piece.owner.numel():
                scalars.setdefault(kind, [str(value.dtype).removeprefix("torch."), value.item()])
            elif isinstance(value, int | float):
                scalars.setdefault(kind, [None, value])
    return {
        "parameters": {
            name: list(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in engine.module.named_parameters()
        },
        "optimizer_scalars": scalars,
        "group_steps": [group.get("step") for group in inner.param_groups],
        "schedule_step": engine.lr_scheduler.last_epoch,
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "loss_scale": _numbers_of(_loss_scaler(engine)),
        "grad_scaler": None if (scaler := _grad_scaler(engine)) is None else scaler.state_dict(),
    }


def _loss_scaler(engine: Any) -> Any:
    """What scales fp16's loss: two kinds of object in DeepSpeed, with numbers as attributes."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return getattr(engine.optimizer, "loss_scale_config", None) if scaler is None else scaler


def _grad_scaler(engine: Any) -> Any:
    """torch's, for autocast to float16."""
    own = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return engine.torch_autocast_z0_gradscaler if own is None else own


def _numbers_of(thing: Any) -> dict[str, float]:
    return {
        key: value for key, value in vars(thing or object).items() if type(value) in (int, float)
    }


@torch.no_grad()
def restore(engine: Any, stored: StoredState, rank: Rank) -> None:
    """Give an engine the state of a checkpoint; every rank calls it.

    The optimizer's hyperparameters stay those of the run: its learning rate is the schedule's.
    """
    wrapper, values = engine.optimizer, stored.values
    inner = getattr(wrapper, "optimizer", wrapper)
    stage3 = engine.zero_optimization_stage() == 3
    if stage3:
        wrapper.checkpoint_event_prologue()
    momenta = list(_whole_momenta(engine))
    for piece in list_pieces(engine):
        for kind in stored.kinds(piece.name):
            if kind == MOMENTUM and momenta:
                continue
            content = stored.read(piece.name, kind, piece.start, piece.numel)
            if kind == WEIGHT:
                target = piece.owner
            else:
                state = inner.state[piece.owner]
                if kind not in state:
                    state[kind] = torch.zeros_like(piece.owner, dtype=content.dtype)
                target = state[kind]
            piece.view(target).copy_(content)
        for kind, (dtype, value) in values["optimizer_scalars"].items():
            if dtype is not None:
                kept = getattr(torch, dtype)
                value = torch.tensor(value, dtype=kept, device=piece.owner.device)
            inner.state[piece.owner][kind] = value
    for piece in momenta:
        content, state = stored.read(piece.name, MOMENTUM, 0, piece.numel), inner.state[piece.owner]
        if MOMENTUM not in state:
            size = max(p.offset + p.numel for p in momenta if p.owner is piece.owner)
            state[MOMENTUM] = content.new_zeros(size).to(piece.owner.device)
        piece.view(state[MOMENTUM]).copy_(content)
    for group, step in zip(inner.param_groups, values["group_steps"], strict=True):
        if step is not None:
            group["step"] = step
    if stage3:
        for number in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        wrapper.checkpoint_event_epilogue()
    else:
        _round_weights(wrapper)
    _restore_values(engine, values)
    _restore_rng(stored, rank)


def _round_weights(wrapper: Any) -> None:
    """Copy the fp32 weights of stages 0 to 2 into those that training computes with."""
    if hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups_flat"):
        for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
            sizes = [parameter.numel() for parameter in group]
            for parameter, master in zip(group, flat.split(sizes), strict=True):
                parameter.copy_(master.view_as(parameter))
    elif hasattr(wrapper, "fp32_groups"):
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                parameter.copy_(master)


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
    for group, peak, factor in groups:  # a run that was made longer has other rates
        group["lr"] = peak * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _restore_rng(stored: StoredState, rank: Rank) -> None:
    """This rank's generators; ranks that weren't there go on with the seed they have."""
    state = stored.tensor(rank.index, "rng:cpu:0")
    if state is not None:
        torch.set_rng_state(state)
    state = stored.tensor(rank.index, "rng:cuda:0")
    if state is not None and rank.device.type == "cuda":
        torch.cuda.set_rng_state(state, rank.device)
