"""The batch triangle, against brute force: it holds exactly, or the nearest that do are listed."""

import random
import re
import time
from collections.abc import Iterator

import pytest

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.fields import divisors_near
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.plan.batch import nearest_triples, solve_batch

Triple = tuple[int, int, int]


def random_batches(count: int, *, largest: int) -> Iterator[tuple[Batch, int, int]]:
    """Batches of all kinds with a sequence length and a number of ranks, small enough to search."""
    random_ = random.Random(20250731)
    for _ in range(count):
        length = random_.randint(2, 9)
        sizes = [random_.choice((None, random_.randint(1, largest))) for _ in range(4)]
        if sizes[1] is not None and random_.random() < 0.7:  # most are whole sequences
            sizes[1] *= length
        batch = Batch(
            global_batch_size=sizes[0],
            global_batch_tokens=sizes[1],
            micro_batch_size=sizes[2],
            gradient_accumulation_steps=sizes[3],
        )
        yield batch, length, random_.randint(1, 13)


def test_it_holds_or_says_what_would() -> None:
    solved = refused = 0
    for batch, length, ranks in random_batches(20_000, largest=60):
        try:
            plan = solve_batch(batch, sequence_length=length, world_size=ranks)
        except UserError as error:
            (problem,) = error.problems
            check_refusal(batch, length, ranks, problem)
            refused += 1
            continue
        whole, micro = plan.global_batch_size, plan.micro_batch_size
        accumulation = plan.gradient_accumulation_steps
        assert min(whole, micro, accumulation) > 0
        assert whole == micro * accumulation * ranks
        assert batch.global_batch_size in (None, whole)
        assert batch.global_batch_tokens in (None, whole * length)
        assert batch.micro_batch_size in (None, micro)
        assert batch.gradient_accumulation_steps in (None, accumulation)
        solved += 1
    assert min(solved, refused) > 2000


def check_refusal(batch: Batch, length: int, ranks: int, problem: Problem) -> None:
    """A refusal is right, and what its hint lists works."""
    sequences, tokens = batch.global_batch_size, batch.global_batch_tokens
    micro, accumulation = batch.micro_batch_size, batch.gradient_accumulation_steps
    if sequences is None and tokens is None:
        assert micro is None
        assert problem.hint == "Add batch.micro_batch_size=1"
    elif tokens is not None and tokens % length:
        listed = [int(number) for number in re.findall(r"\d+", problem.hint)]
        multiples = range(length, tokens + length + 1, length)
        below, above = (n for n in (tokens // length * length, tokens // length * length + length))
        assert listed == [n for n in (below, above) if n in multiples]
    elif tokens is not None and sequences is not None and sequences * length != tokens:
        assert "contradicts batch.global_batch_size" in problem.message
    else:
        whole = sequences if sequences is not None else (tokens or 0) // length
        assert not [t for t in all_triples(whole, ranks) if fits(t, micro, accumulation)]
        listed_triples = [
            (int(g), int(m), int(a))
            for g, m, a in re.findall(r"(\d+) = (\d+) x (\d+) x \d+", problem.hint)
        ]
        check_nearest(listed_triples, whole, micro, accumulation, ranks)


def all_triples(whole: int, ranks: int) -> list[Triple]:
    """Every triple of a global size, tried one after another."""
    return [
        (whole, m, a)
        for m in range(1, whole + 1)
        for a in range(1, whole // m + 1)
        if m * a * ranks == whole
    ]


def fits(triple: Triple, micro: int | None, accumulation: int | None) -> bool:
    return micro in (None, triple[1]) and accumulation in (None, triple[2])


def check_nearest(
    listed: list[Triple], whole: int, micro: int | None, accumulation: int | None, ranks: int
) -> None:
    """All hold; none is nearer than those that are listed; at least one of each sort is there."""
    assert len(listed) == len(set(listed)) <= 4
    assert all(g == m * a * ranks for g, m, a in listed)
    kept = {g for g, m, a in listed if fits((g, m, a), micro, accumulation)}
    unit = (micro or 1) * (accumulation or 1) * ranks
    sizes = range(unit, 2 * whole + 2 * unit, unit)
    if micro is not None and accumulation is not None:
        assert kept == {unit}
    else:
        below = [size for size in sizes if size < whole][-1:]
        above = [size for size in sizes if size > whole][:1]
        assert kept == {*below, *above}
    # With the global size as it is: the nearest micro batches, or accumulations.
    index = 2 if micro is None and accumulation is not None else 1
    wanted = (accumulation if index == 2 else micro) or 1
    possible = [triple[index] for triple in all_triples(whole, ranks)]
    down = [n for n in possible if n <= wanted]
    up = [n for n in possible if n > wanted]
    nearest = {*([max(down)] if down else []), *([min(up)] if up else [])}
    assert {triple[index] for triple in listed if triple[0] == whole} == nearest


K, P, E = 2**40, 999_999_937, 7_999_999_496
LARGE: dict[str, tuple[int, int | None, int | None, int, list[Triple]]] = {
    # 10^9 sequences over 7 ranks: 142857142 each and 6 sequences over
    "ranks": (10**9, None, None, 7, [(10**9 - 6, 142_857_142, 1), (10**9 + 1, 142_857_143, 1)]),
    # a prime number of sequences for each rank
    "prime": (
        P * 8, 4, None, 8,
        [(E - 8, 4, 249_999_984), (E + 24, 4, 249_999_985), (E, 1, P), (E, P, 1)],
    ),
    "more-ranks-than-sequences": (3, None, 2, 8, [(16, 1, 2)]),
    "power": (
        K, 3, None, 1,
        [(K - 1, 3, (K - 1) // 3), (K + 2, 3, (K + 2) // 3), (K, 2, K // 2), (K, 4, K // 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "micro", "accumulation", "ranks", "expected"), LARGE.values(), ids=LARGE
)
def test_large_numbers_take_no_time(
    whole: int, micro: int | None, accumulation: int | None, ranks: int, expected: list[Triple]
) -> None:
    started = time.perf_counter()
    assert nearest_triples(whole, micro, accumulation, world_size=ranks) == expected
    assert time.perf_counter() - started < 1


def test_divisors_near() -> None:
    for number in range(1, 200):
        divisors = [d for d in range(1, number + 1) if number % d == 0]
        for wanted in range(1, number + 2):
            below = [d for d in divisors if d <= wanted][-1:]
            assert divisors_near(number, wanted) == below + [d for d in divisors if d > wanted][:1]


def test_no_number_is_too_large_to_refuse() -> None:
    """10^30 sequences: not every divisor is looked for, and what is listed holds."""
    batch = Batch(global_batch_size=10**30, micro_batch_size=7)
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        solve_batch(batch, sequence_length=2048, world_size=8)
    assert time.perf_counter() - started < 2
    triples = re.findall(r"(\d+) = (\d+) x (\d+) x 8", error.value.problems[0].hint)
    assert len(triples) == 4
    assert all(int(g) == int(m) * int(a) * 8 for g, m, a in triples)
