"""What a run that is out of memory is told: valid settings, and what they come to."""

import shlex

import pytest

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.advice import (
    advise_memory,
    is_out_of_memory,
    list_advice,
    may_be_out_of_memory,
)
from llama_pretrain.plan.plan import Plan, build_plan
from llama_pretrain.plan.resolve import resolve
from llama_pretrain.tasks.validate import resolve_valid
from tests.conftest import compose_run
from tests.machines import CLUSTER


def planned(*overrides: str) -> tuple[ResolvedRun, Plan]:
    run = resolve(compose_run(overrides), CLUSTER)
    return run, build_plan(run)


def words(*overrides: str) -> list[str]:
    return [advice.words for advice in list_advice(*planned(*overrides))]


ON_CPU = ("launch.device=cpu", "launch.num_processes=2")
ON_GPUS = ("model=llama2_7b", "launch.device=cuda", "launch.num_processes=8")
ONE_GPU = ("model=llama2_7b", "launch.device=cuda", "launch.num_processes=1")
CPU, GPUS, GPU = " ".join(ON_CPU), " ".join(ON_GPUS), " ".join(ONE_GPU)
POINTS = {
    "cpu": f"{CPU} batch.micro_batch_size=8",
    "cpu-stage0": f"{CPU} zero=stage0 batch.micro_batch_size=1",
    "cpu-muon": f"{CPU} optim=muon zero=stage1",
    "states": f"{GPUS} zero=stage1 batch.micro_batch_size=1",
    "of-stage-2": f"{GPUS} zero=stage2 zero.round_robin_gradients=true",
    "batch": f"{GPUS} zero=stage3 batch.global_batch_size=96",
    "offloaded": f"{GPUS} zero=stage3_offload",
    "one-gpu-lion": f"{GPU} zero=stage0 optim=lion",
    "no-global-batch": f"{GPUS} batch.micro_batch_size=6 batch.gradient_accumulation_steps=1"
    " data.sequence_length=2048",
}


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_advice_is_valid_and_comes_to_what_it_says(point: str) -> None:
    overrides = point.split()
    run, plan = planned(*overrides)
    found = list_advice(run, plan)
    assert found
    for advice in found:
        words = ["task=plan", *overrides, *shlex.split(advice.words)]
        changed = resolve_valid(compose_run(words), CLUSTER)
        after = build_plan(changed)
        assert after.memory == advice.memory
        assert after.memory.total < plan.memory.total
        assert after.batch.global_batch_size == plan.batch.global_batch_size


def test_rows_that_weigh_most_come_first() -> None:
    found = words(
        *ON_GPUS, "zero=stage2", "batch.global_batch_size=96", "data.sequence_length=2048"
    )
    assert found == [
        "batch.micro_batch_size=6 batch.gradient_accumulation_steps=2",
        "train.gradient_checkpointing=true",
        "zero.stage=3",
        "zero.offload_optimizer.device=cpu optim.name=cpu_adam",
    ]


def test_states_that_weigh_most_come_first() -> None:
    found = words(*ON_GPUS, "zero=stage1", "batch.global_batch_size=16")
    assert found[0] == "zero.stage=3"  # stage 2 saves nothing where nothing is accumulated
    assert found[-1] == "zero.stage=2 zero.offload_optimizer.device=cpu optim.name=cpu_adam"


def test_offload_is_for_gpus() -> None:
    assert "zero.stage=2 zero.offload_optimizer.device=cpu optim.name=cpu_adam" in words(
        *ONE_GPU, "zero=stage0"
    )
    assert not any("offload" in text for text in words(*ON_CPU, "zero=stage0"))


def test_the_text_says_what_was_expected() -> None:
    run, plan = planned(*ON_GPUS, "zero=stage3", "batch.global_batch_size=256")
    text = advise_memory(run, plan).splitlines()
    assert text[0].startswith("  memory: the plan expects ")
    assert text[0].endswith(" GiB), and its device has 80.0 GiB")
    assert text[1] == "  to reduce it, best first:"
    smaller = "batch.micro_batch_size=16 batch.gradient_accumulation_steps=2"
    assert text[2].startswith(f"    {smaller}  (")
    assert text[2].endswith(" GiB; the same steps, in smaller micro batches)")


def test_where_nothing_is_left_to_lower() -> None:
    run, plan = planned(
        *ONE_GPU,
        "zero=stage2_offload",
        "batch.global_batch_size=1",
        "train.gradient_checkpointing=true",
    )
    assert advise_memory(run, plan).splitlines()[1] == (
        "  to reduce it: a shorter data.sequence_length, a smaller model, or more ranks"
    )


ERRORS = [
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    "MemoryError",
    "OSError: [Errno 12] Cannot allocate memory",
    "RuntimeError: std::bad_alloc",
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_memory(error: str) -> None:
    assert is_out_of_memory(error)
    assert not may_be_out_of_memory(error)


def test_other_errors() -> None:
    for error in ("RuntimeError: Connection closed by peer", "RuntimeError: could not create"):
        assert not is_out_of_memory(error)
        assert not may_be_out_of_memory(error)


@pytest.mark.parametrize("error", ["could not create a primitive", "can't start new thread"])
def test_errors_that_may_be_of_memory(error: str) -> None:
    assert may_be_out_of_memory(error)
    assert not is_out_of_memory(error)
    run, plan = planned(*ON_CPU, "batch.micro_batch_size=8")
    certain = advise_memory(run, plan).splitlines()
    perhaps = advise_memory(run, plan, certain=False).splitlines()
    assert perhaps[0] == certain[0].replace(
        "memory:", "memory, if that ran out (the error does not say):"
    )
    assert perhaps[1:] == certain[1:]
