"""Memory, traffic, cost and what fits: against papers, DeepSpeed's estimators and autograd."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.cost import estimate_cost
from llama_pretrain.plan.fit import list_fits
from llama_pretrain.plan.kernels import LAYERS
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.memory import MemoryPlan, estimate_memory, list_phases, states_memory
from llama_pretrain.plan.model_size import count_parameters
from llama_pretrain.plan.plan import build_plan
from llama_pretrain.plan.resolve import resolve
from llama_pretrain.plan.traffic import count_traffic
from tests.conftest import compose_run
from tests.machines import CLUSTER

FUSED = tuple(f"kernels.{name}=fused" for name in LAYERS)
BLOCKED, WIDE = "kernels.attention=blocked", "kernels.matmul=fp32"
LLAMA2_7B = 6_738_415_616


def with_ranks(run: ResolvedRun, ranks: int) -> ResolvedRun:
    """The run on one node with this many ranks, one sequence of the batch on each."""
    batch = Batch(global_batch_size=ranks)
    launch = replace(run.launch, num_processes=ranks, nodes=1)
    return replace(run, launch=launch, batch=batch)


def phase_memory(run: ResolvedRun) -> list[MemoryPlan]:
    """The phases of a step with the cluster's micro batch, by default on one rank."""
    return list(list_phases(run, build_plan(run).batch, states_memory(run)))


def resolved(*overrides: str) -> ResolvedRun:
    return resolve(compose_run(["task=plan", *overrides]), CLUSTER)


@pytest.mark.parametrize(
    ("stage", "fixed", "sharded"), [(0, 16, 0), (1, 4, 12), (2, 2, 14), (3, 0, 16)]
)
@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_states_of_the_zero_paper(stage: int, fixed: int, sharded: int, ranks: int) -> None:
    """ZeRO (arXiv 1910.02054, figure 1): 16 bytes a parameter, of which some are sharded.

    The paper counts gradients in 16 bits and as if stage 2 never held them whole. Its example, 7.5B
    parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB.
    """
    run = resolved(f"zero=stage{stage}", "model=llama2_7b", "precision=bf16")
    states = states_memory(with_ranks(run, ranks))
    kept = states.weights + states.master_weights + states.optimizer
    gradients = 2 * LLAMA2_7B / (ranks if stage >= 2 else 1)
    per_parameter = (kept + gradients) / LLAMA2_7B
    assert per_parameter == pytest.approx(fixed + sharded / ranks, rel=1e-6)
    if ranks == 64:
        assert 7.5 * per_parameter == pytest.approx((120, 31.4, 16.6, 1.9)[stage], rel=0.02)


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 4)])
def test_deepspeeds_estimator_for_stage_3(gpus: int, nodes: int) -> None:
    """Its 18 bytes a parameter are 2 + 12, and 4 for gradients, which it counts in fp32."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    _, on_gpu, largest = estimate_zero3_model_states_mem_needs(
        total_params=LLAMA2_7B,
        largest_layer_params=131_072_000,
        num_gpus_per_node=gpus,
        num_nodes=nodes,
        cpu_offload=False,
        cpu_offload_params=False,
        zero_init=True,
    )
    run = resolved(
        "zero=stage3", "model=llama2_7b", "precision=bf16", "precision.grad_accum_dtype=fp32"
    )
    states = states_memory(with_ranks(run, gpus * nodes))
    ours = states.weights + states.master_weights + states.gradients + states.optimizer
    assert ours == pytest.approx(on_gpu - largest, rel=1e-6)


@pytest.mark.parametrize(("gpus", "nodes"), [(2, 1), (8, 1), (8, 4)])
def test_deepspeeds_estimator_for_stage_2(gpus: int, nodes: int) -> None:
    """2P + 18P/N: 16-bit weights; sharded 16-bit and fp32 gradients, weights and moments.

    We count one copy more in the optimizer's step: the 16-bit gradients are flattened first.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, on_gpu = estimate_zero2_model_states_mem_needs(
        total_params=LLAMA2_7B, num_gpus_per_node=gpus, num_nodes=nodes, cpu_offload=False
    )
    ranks = gpus * nodes
    run = resolved("zero=stage2", "model=llama2_7b", "precision=bf16", "batch.global_batch_size=32")
    step = next(p for p in phase_memory(with_ranks(run, ranks)) if p.phase == "step")
    kept = step.weights + step.master_weights + step.optimizer
    flattened = 2 * LLAMA2_7B / ranks
    ours = kept + step.gradients + step.buffers - flattened
    assert ours == pytest.approx(on_gpu, rel=1e-6)


def test_offload_of_deepspeeds_estimator() -> None:
    """Stage 2 with offload: 2 bytes a parameter on the GPU, 16 on all hosts together."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    cpu, on_gpu = estimate_zero2_model_states_mem_needs(
        total_params=LLAMA2_7B,
        num_gpus_per_node=1,
        num_nodes=1,
        cpu_offload=True,
        additional_buffer_factor=1,
    )
    run = resolved("zero=stage2_offload", "model=llama2_7b", "precision=bf16")
    states = states_memory(with_ranks(run, 1))
    assert states.weights == on_gpu
    assert states.master_weights + states.optimizer + states.gradients == cpu
    memory = estimate_memory(with_ranks(run, 1), build_plan(run).batch)
    assert memory.optimizer == memory.master_weights == 0
    copied = states.buffers - 2 * 131_072_000  # but for a gradient on its way, of the embedding
    assert memory.host == cpu + copied + states.checkpoint


def test_nvme_takes_from_device_and_host() -> None:
    run = resolved(
        "zero=stage3_nvme",
        "model=llama2_7b",
        "zero.offload_param.nvme_path=/swap",
        "checkpoint.asynchronous=false",
    )
    memory = build_plan(run).memory
    assert memory.weights == memory.optimizer == memory.host == 0
    # 2 bytes of weights, 12 of master weights and moments, 4 of gradients, over 8 ranks
    assert memory.disk == pytest.approx(18 * LLAMA2_7B / 8, rel=1e-6)


def saved_bytes_per_token(
    dtype: str, *, groups: int, recompute: bool, kernels: Sequence[str]
) -> tuple[float, float]:
    """What autograd keeps of a LLaMA for the backward pass, by its own hooks, and our count."""
    import torch
    from transformers import LlamaForCausalLM

    from llama_pretrain.train.kernels.install import install_kernels
    from llama_pretrain.train.model import build_llama_config

    precision = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    run = resolved(
        "model=tiny",
        f"model.num_key_value_heads={groups}",
        "data.sequence_length=64",
        "batch.global_batch_size=16",
        "batch.micro_batch_size=2",
        f"precision={precision}",
        f"train.gradient_checkpointing={str(recompute).lower()}",
        "kernels=plain",
        *kernels,
    )
    config = build_llama_config(run.model, vocab_size=run.model.vocab_size, special_ids={})
    model: Any = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.train()
    install_kernels(model, run.kernels)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.randint(0, run.model.vocab_size, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits
    measured = sum(size for size, _ in kept.values()) / ids.numel()
    assert logits.shape == (2, 64, run.model.vocab_size)
    memory = max(phase_memory(run), key=lambda phase: (phase.phase == "forward", phase.activations))
    return measured, memory.activations / ids.numel()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [
        *product(("float32", "bfloat16"), ((), FUSED, (*FUSED, BLOCKED))),
        *product(("bfloat16",), ((WIDE,), (*FUSED, WIDE), (*FUSED, BLOCKED, WIDE))),
    ],
)
def test_activations_are_what_autograd_keeps(
    dtype: str, groups: int, recompute: bool, kernels: Sequence[str]
) -> None:
    measured, counted = saved_bytes_per_token(
        dtype, groups=groups, recompute=recompute, kernels=kernels
    )
    # Ours leaves out the softmax statistics of attention and the rotary tables.
    assert counted == pytest.approx(measured, rel=0.04)


def test_traffic_of_the_zero_paper() -> None:
    """Section 7: 2P for stages 0 to 2, 3P for stage 3, here in bf16 on 64 ranks."""
    share = 63 / 64
    for stage, volume in ((0, 2), (1, 2), (2, 2), (3, 3)):
        run = resolved(
            f"zero=stage{stage}", "model=llama2_7b", "launch.nodes=8", "batch.global_batch_size=64"
        )
        traffic = build_plan(run).traffic
        assert traffic.total == pytest.approx(volume * 2 * LLAMA2_7B * share, rel=1e-6)
        assert traffic.volume == volume
        assert traffic.between_machines == traffic.total


def test_traffic_of_zeropp() -> None:
    """ZeRO++ (arXiv 2306.10209, table 1): 3M become 0.75M between machines."""
    run = resolved("zero=zeropp", "model=llama2_7b", "launch.nodes=8", "batch.global_batch_size=64")
    traffic = build_plan(run).traffic
    between = traffic.between_machines / (2 * LLAMA2_7B * 63 / 64)
    assert between == pytest.approx(0.75, rel=1e-6)
    assert traffic.volume == pytest.approx(0.75)


def test_stage_2_reduces_with_each_micro_batch() -> None:
    run = resolved("zero=stage2", "model=llama2_7b", "batch.micro_batch_size=1")
    batch = replace(build_plan(run).batch, gradient_accumulation_steps=5)
    traffic = count_traffic(run, batch)
    assert traffic.reduce == pytest.approx(5 * traffic.gather)


def test_cost_by_hand() -> None:
    run = resolved("plan.price_per_device_hour=2.5", "plan.watts_per_device=700")
    cost = estimate_cost(run, tokens=3_600_000_000, tokens_per_s=100_000)
    # 36,000 s on 8 GPUs
    assert cost.hours == pytest.approx(10)
    assert cost.device_hours == pytest.approx(80)
    assert cost.price == pytest.approx(200)
    assert cost.kilowatt_hours == pytest.approx(56)


def test_what_fits_fits_and_one_row_more_does_not() -> None:
    run = resolved("model=llama2_7b", "data.sequence_length=2048", "batch.global_batch_size=1024")
    batch, limit = build_plan(run).batch, 80 << 30
    fits = list_fits(run, batch, limit=limit)
    assert len(fits) == 12
    assert fits[0].overrides[0] == "zero=stage1"
    assert fits[-1].micro_batch_size is None  # stage 0: 16 bytes a parameter are 108 GB
    for fit in fits:
        words = ["model=llama2_7b", "data.sequence_length=2048", "batch.global_batch_size=1024"]
        again = resolved(*words, *fit.overrides)
        memory = build_plan(again).memory
        assert memory == fit.memory, fit.overrides
        assert (memory.total <= limit) == (fit.micro_batch_size is not None)
        if fit.micro_batch_size is not None:
            more = replace(batch, micro_batch_size=fit.micro_batch_size + 1)
            alone = replace(more, gradient_accumulation_steps=1)
            assert estimate_memory(again, alone).total > limit


def test_70b_on_1024_gpus() -> None:
    run = resolved("zero=stage3", "model=llama3_70b", "launch.nodes=128", "launch.num_processes=8")
    plan = build_plan(run)
    assert plan.world_size == 1024
    assert plan.parameters_per_rank == -(-70_553_706_496 // 1024)
    assert plan.fits
    assert count_parameters(run.model).total == 70_553_706_496


def measured_peaks() -> Iterator[tuple[str, Machine, list[str], int]]:
    """Of each cell of benchmarks/throughput.py that was run: where, with which words, and bytes."""
    machines = {
        "results": replace(CLUSTER, num_gpus=0),
        "xeon": replace(CLUSTER, num_gpus=0, cpu_intel=True, cpu_fast_bf16=False),
        "avx2": replace(CLUSTER, num_gpus=0, cpu_bf16=False, cpu_fast_bf16=False),
    }
    machines["bf16"] = machines["avx2"]
    for path in sorted((PROJECT_ROOT / "benchmarks" / "results").rglob("throughput-*.json")):
        blocks = json.loads(path.read_text())["blocks"]
        ours = blocks["defaults"]["arms"]["ours"]
        name = f"{path.parent.name}/{path.stem}"
        yield name, machines[path.parent.name], ours["words"], ours["peak_bytes"]


@pytest.mark.parametrize(("name", "machine", "words", "peak_bytes"), list(measured_peaks()))
def test_the_plan_is_near_what_benchmarks_measured(
    name: str, machine: Machine, words: list[str], peak_bytes: int
) -> None:
    """With the allocator of the defaults, which keeps what was freed."""
    run = resolve(compose_run(["task=plan", *words]), machine)
    assert build_plan(run).memory.total == pytest.approx(peak_bytes, rel=0.1), name


RANDOM_PEAKS = json.loads((PROJECT_ROOT / "benchmarks/results/memory.json").read_text())["runs"]


@pytest.mark.parametrize("measured", RANDOM_PEAKS, ids=[run["name"] for run in RANDOM_PEAKS])
def test_the_plan_is_near_the_peaks_of_random_configurations(measured: dict[str, Any]) -> None:
    """Recorded runs of `benchmarks/memory.py --random`, within the limits that it checks."""
    machine = replace(CLUSTER, num_gpus=0, **measured["cpu"])
    run = resolve(compose_run(["task=plan", *measured["words"]]), machine)
    difference = build_plan(run).memory.total / measured["peak_bytes"] - 1
    assert -0.05 <= difference <= 0.20


@pytest.mark.parametrize(
    ("stage", "ranks", "allocator", "accumulated", "shares", "mib"),
    [
        (0, 2, "keep", 1, (1, 1.12, 1), 40),
        (0, 1, "plain", 1, (1, 1.12, 1), 40),
        (1, 2, "keep", 1, (1, 1, 2.4), 40),
        (2, 1, "keep", 1, (1, 1, 1.8), 40),
        (2, 2, "plain", 1, (1, 1, 2.4), 60),
        (3, 1, "keep", 1, (1.37, 1.61, 0.52), 0),
        (3, 2, "keep", 2, (1.86, 2.1, 1.01), 32),
        (3, 2, "plain", 8, (1.73, 1.97, 0.88), 32),
        ("3_offload", 2, "plain", 1, (1.37, 1.61, 0.52), 32),
    ],
)
def test_what_the_allocator_holds(
    stage: int | str,
    ranks: int,
    allocator: str,
    accumulated: int,
    shares: tuple[float, float, float],
    mib: int,
) -> None:
    """Shares of states, of activations, and of gradients with their copy in the bucket."""
    words = ["launch.device=cpu", f"launch.num_processes={ranks}", "precision=fp32"]
    words += [f"zero=stage{stage}", f"batch.gradient_accumulation_steps={accumulated}"]
    words += ["batch.global_batch_size=null", "batch.micro_batch_size=8"]
    run = resolved(*words, f"kernels.allocator={allocator}")
    memory, states = build_plan(run).memory, states_memory(run)
    activations, reduction = (
        max(p.total for p in phase_memory(run) if p.phase in names) - states.total
        for names in (("forward", "backward"), ("reduce",))
    )
    if stage in (0, 1, 2):
        assert reduction == count_parameters(run.model).total * 4 * 2
    tensors = states.total - states.framework - states.runtime
    terms = zip(shares, (tensors, activations, reduction), strict=True)
    expected = sum(share * term for share, term in terms) + (mib << 20)
    assert memory.total - memory.framework - memory.runtime == pytest.approx(expected, rel=1e-6)
    returned = resolved(*words, "launch.malloc_mmap_threshold=262144")
    assert build_plan(returned).memory.allocator == 0


def test_muon_steps_in_plain_pytorch() -> None:
    """Four temporary tensors of the AdamW of embedding and head, in fp32: the rank's share."""
    words = ("zero=stage1", "launch.device=cpu", "launch.num_processes=2", "precision=fp32")
    plain, muon = (
        next(p for p in phase_memory(resolved(*words, f"optim={name}")) if p.phase == "step")
        for name in ("adamw", "muon")
    )
    assert muon.buffers - plain.buffers == 4 * 4 * (2 * 4096 * 256) // 2


def test_what_glibc_keeps_by_default() -> None:
    """At stage 1 at most 96 MiB above all terms, whatever the size of the model."""
    words = ("launch.device=cpu", "launch.num_processes=2", "zero=stage1", "model=350m")
    small, large = (
        build_plan(resolved(*words, "precision=fp32", f"kernels.allocator={name}")).memory.total
        for name in ("plain", "keep")
    )
    moved = count_parameters(resolved(*words).model).total * 4 * 2 * 1.4
    more = 76 + 324 - 50 - 397  # a fresh rank has more libraries in memory
    expected = moved + (more - 96) * (1 << 20)
    assert large - small == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("24GB", 24 * 10**9), ("1.5 gib", 3 << 29), ("500MiB", 500 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80", "80G", "GiB", "-1GiB", "0GiB", "80 GiB each"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_size(text)


def test_saves_go_on_beside_training_where_there_is_room() -> None:
    """Chosen: with saves before the last step, and if the plan with the copy fits."""
    words = ("zero=stage2", "launch.device=cpu", "launch.num_processes=2", "train.max_steps=40")
    every = "checkpoint.every_steps=10"
    fitting = build_plan(resolved(*words, every)).memory
    assert fitting.checkpoint > 0
    least = f"launch.device_memory={-(-fitting.total // 1024)}KiB"
    short = f"launch.device_memory={fitting.total // 1024 - 1}KiB"
    chosen = {
        (): True,
        (least,): True,
        (short,): False,
        (short, "checkpoint.asynchronous=true"): True,
        ("checkpoint.every_steps=null",): False,
        ("train.max_steps=10",): False,
        ("train.max_steps=11",): True,
        (f"train.max_tokens={10 * 16 * 256}",): False,
        ("checkpoint.every_steps=null", "checkpoint.every_minutes=5"): True,
    }
    for more, expected in chosen.items():
        given = () if "checkpoint.every_steps=null" in more else (every,)
        assert resolved(*words, *given, *more).checkpoint.asynchronous is expected, more


def test_an_asynchronous_checkpoint_takes_a_copy() -> None:
    """fp32 weights and two moments of a rank's share: in its memory, or on a GPU's host."""
    for device in ("cpu", "cuda"):
        words = ["zero=stage2", "precision=bf16", f"launch.device={device}"]
        words += ["launch.num_processes=2", "task=plan"]
        plain, copied = (
            build_plan(resolved(*words, f"checkpoint.asynchronous={on}")).memory
            for on in ("false", "true")
        )
        share = count_parameters(resolved(*words).model).total * 12 // 2
        assert plain.checkpoint == 0
        if device == "cpu":
            assert copied.checkpoint == pytest.approx(share, abs=16)
        else:
            assert (copied.checkpoint, copied.total) == (0, plain.total)
            assert copied.host >= share
