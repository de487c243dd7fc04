"""The order of the data: the same on any number of ranks and after any resume."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from llama_pretrain.config.data import Data, DataName, Source, Stage
from llama_pretrain.config.problems import UserError
from llama_pretrain.data.loader import EvalSampler, TrainSampler
from llama_pretrain.data.order import SampleOrder, hash_samples, sequences_at
from llama_pretrain.plan.sampling import SamplingPlan, plan_sampling, share_evenly


def test_order_differs_between_seeds_and_epochs() -> None:
    positions = np.arange(4000, dtype=np.uint64)
    orders = {
        order.tobytes()
        for seed in range(4)
        for order in np.split(sequences_at(positions, num_sequences=1000, seed=seed), 4)
    }
    assert len(orders) == 16  # with DistributedSampler, seed 3 epoch 1 equals seed 4 epoch 0


def one_source(num_sequences: int, *, seed: int) -> SampleOrder:
    sampling = plan_sampling(Data(), global_batch_size=1)
    return SampleOrder(sampling, num_sequences=[num_sequences], seed=seed)


def mixture(
    weights: dict[str, float], *, block: int, batch: int, stages: list[Stage] | None = None
) -> SamplingPlan:
    sources = {name: Source(weight=weight) for name, weight in weights.items()}
    data = Data(
        name=DataName.mixture, sources=sources, mixture_block=block, sequence_length=8,
        stages=stages or [],
    )  # fmt: skip
    return plan_sampling(data, global_batch_size=batch)


def test_memory_does_not_grow_with_the_sequences() -> None:
    peaks = []
    for num_sequences in (10**3, 10**12):
        one_source(num_sequences, seed=1).ids(0, 64)  # numpy allocates on first use
        tracemalloc.start()
        order = one_source(num_sequences, seed=1)
        ids = [order.ids(first, 64) for first in range(0, 640, 64)]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(np.concatenate(ids).tolist())) == 640
    assert peaks[1] < 1.2 * peaks[0] < 1_000_000


def ranks_of(
    order: SampleOrder, *, batch: int, steps: int, first_step: int, world_size: int
) -> list[list[int]]:
    """Global batches from a step on, assembled from the samplers of all ranks."""
    sizes = {"global_batch_size": batch, "world_size": world_size}
    batches = [range(first_step, steps)]
    ranks = [
        list(TrainSampler(order=order, batches=batches, rank=rank, **sizes))
        for rank in range(world_size)
    ]
    found: list[list[int]] = np.array(ranks).T.reshape(-1, batch).tolist()
    return found


def random_order(case: int) -> tuple[SampleOrder, SamplingPlan, list[int], int, int]:
    """Random sizes, seed, sources, weights, block, stages and batch."""
    draw = np.random.default_rng(case)
    batch = 12 * int(draw.integers(1, 4))  # 1, 2, 3, 4, 6 and 12 ranks divide it
    steps = int(draw.integers(2, 7))
    count = int(draw.integers(1, 5))
    num_sequences = [int(draw.integers(1, 200)) for _ in range(count)]
    if count == 1:
        sampling = plan_sampling(Data(), global_batch_size=batch)
    else:
        weights = {f"s{i}": float(draw.integers(1, 10)) for i in range(count)}
        block = int(draw.integers(10 * count, 70))
        stages = []
        if draw.integers(2):
            later = dict(zip(weights, draw.permutation(list(weights.values())), strict=True))
            at = int(draw.integers(1, steps * batch * 8))
            stages = [Stage(from_tokens=at, weights={k: float(v) for k, v in later.items()})]
        sampling = mixture(weights, block=block, batch=batch, stages=stages)
    seed = int(draw.integers(0, 2**63))
    order = SampleOrder(sampling, num_sequences=num_sequences, seed=seed)
    return order, sampling, num_sequences, batch, steps


@pytest.mark.parametrize("hundred", range(3))
def test_random_orders(hundred: int) -> None:
    """No sequence is lost or repeated within an epoch, and quotas are exact."""
    for case in range(100 * hundred, 100 * hundred + 100):
        order, sampling, num_sequences, batch, steps = random_order(case)
        whole = ranks_of(order, batch=batch, steps=steps, first_step=0, world_size=1)
        draw = np.random.default_rng(case + 10**6)
        world_size, cut = int(draw.choice([1, 2, 3, 4, 6, 12])), int(draw.integers(0, steps))
        # Another number of ranks that resumes at a step with a new order.
        again = random_order(case)[0]
        found = ranks_of(again, batch=batch, steps=steps, first_step=cut, world_size=world_size)
        assert found == whole[cut:], case
        ids = [number for sequences in whole for number in sequences]
        firsts = np.cumsum([0, *num_sequences])
        owners = (np.searchsorted(firsts, ids, side="right") - 1).tolist()
        for source, sequences in enumerate(num_sequences):
            mine = [i for i, owner in zip(ids, owners, strict=True) if owner == source]
            for start in range(0, len(mine), sequences):  # every epoch is a permutation
                part = mine[start : start + sequences]
                assert len(set(part)) == len(part), case
            first = firsts[source]
            if len(mine) >= sequences:
                assert sorted(mine[:sequences]) == list(range(first, first + sequences)), case
        ends = [stage.first_sample for stage in sampling.stages[1:]] + [len(ids)]
        for stage, end in zip(sampling.stages, ends, strict=True):
            for start in range(stage.first_sample, end - sampling.block + 1, sampling.block):
                counts = Counter(owners[start : start + sampling.block])
                assert [counts[i] for i in range(len(num_sequences))] == stage.quotas, case


def test_a_source_keeps_its_order_when_another_is_added() -> None:
    sequences = {}
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0}):
        sampling = mixture(weights, block=100, batch=10)
        order = SampleOrder(sampling, num_sequences=[50] * len(weights), seed=3)
        ids = order.ids(0, 400)
        sequences[len(weights)] = [i for i in ids.tolist() if i < 50]
    assert sequences[2][:100] == sequences[3][:100]


def test_quotas_by_hand() -> None:
    assert mixture({"a": 0.7, "b": 0.2, "c": 0.1}, block=1000, batch=1).stages[0].quotas == [
        700, 200, 100,
    ]  # fmt: skip
    assert mixture({"a": 1, "b": 1, "c": 1}, block=100, batch=1).stages[0].quotas == [34, 33, 33]


def test_stages_begin_with_a_step() -> None:
    later = Stage(from_tokens=1000, weights={"a": 0, "b": 1})
    stages = [Stage(from_tokens=0, sequence_length=4), later]
    sampling = mixture({"a": 1, "b": 1}, block=10, batch=16, stages=stages)
    first, second = sampling.stages  # the default stage is replaced
    assert (first.first_sample, first.sequence_length, first.quotas) == (0, 4, [5, 5])
    # 1000 tokens are 7.8 steps of 16 sequences of 8 tokens, so it begins with the ninth step.
    assert (second.first_sample, second.sequence_length, second.quotas) == (128, 8, [0, 10])
    assert sampling.stage_at(127) is first
    assert sampling.stage_at(128) is second
    assert sampling.consumed(160) == [64.0, 96.0]


def test_a_weight_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        mixture({"a": 1000, "b": 1}, block=100, batch=1)
    text = "data.mixture_block: gives b less than one sequence of a block (got 100). Set it to 1002"
    assert text in str(caught.value)


def test_evaluation_is_shared_evenly() -> None:
    assert share_evenly([100, 100], 64) == [32, 32]
    assert share_evenly([10, 100, 100], 64) == [10, 27, 27]
    assert share_evenly([3, 4], 64) == [3, 4]
    assert share_evenly([5, 9], None) == [5, 9]
    assert share_evenly([5, 5, 5], 2) == [1, 1, 0]


def test_sample_hash_adds_up_over_ranks() -> None:
    sequences = np.arange(10, dtype=np.int64)
    assert hash_samples(sequences) == hash_samples(sequences[::2]) + hash_samples(sequences[1::2])
    assert hash_samples(sequences) != hash_samples(sequences + 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_sequences", [1, 7, 8])
def test_evaluation_sees_each_sequence_once(num_sequences: int, world_size: int) -> None:
    sizes = {"num_sequences": num_sequences, "micro_batch_size": 2, "world_size": world_size}
    ranks = [list(EvalSampler(**sizes, rank=rank)) for rank in range(world_size)]
    assert len({len(sequences) for sequences in ranks}) == 1  # no rank stops before the others
    assert len(ranks[0]) % 2 == 0
    seen = [sequence for sequences in ranks for sequence in sequences if sequence >= 0]
    assert sorted(seen) == list(range(num_sequences))
