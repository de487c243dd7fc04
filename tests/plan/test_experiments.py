"""Recipes: the published numbers, and each fits in the memory that it names."""

import pytest

from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.validate import validate_run
from llama_pretrain.plan.plan import build_plan
from llama_pretrain.plan.resolve import resolve
from tests.conftest import compose_run
from tests.machines import CLUSTER

RECIPES = sorted(path.stem for path in (PROJECT_ROOT / "conf" / "experiment").glob("*.yaml"))

PUBLISHED = {
    # learning rate, betas, weight decay, warm-up steps, tokens a step, tokens
    "llama1_7b": (3e-4, [0.9, 0.95], 0.1, 2000, 4 << 20, 1_000_000_000_000),  # 2302.13971, table 2
    "llama2_7b": (3e-4, [0.9, 0.95], 0.1, 2000, 4 << 20, 2_000_000_000_000),  # 2307.09288, 2.2
    "llama2_7b_8x80gb": (3e-4, [0.9, 0.95], 0.1, 2000, 4 << 20, 2_000_000_000_000),
    "llama2_70b": (1.5e-4, [0.9, 0.95], 0.1, 2000, 4 << 20, 2_000_000_000_000),
    "llama3_8b": (3e-4, [0.9, 0.95], 0.1, 2000, 4 << 20, 15_000_000_000_000),  # 2407.21783
    "tinyllama_1b": (4e-4, [0.9, 0.95], 0.1, 2000, 2 << 20, 3_000_000_000_000),  # 2401.02385
    "chinchilla_160m": (6e-4, [0.9, 0.95], 0.1, 620, 1 << 19, 3_250_000_000),  # 2304.01373
    "chinchilla_60m": (1e-3, [0.9, 0.999], 0.0, 885, 1 << 17, 1_160_000_000),  # 2403.03507
}
"""As the papers have them, which each YAML names."""

DEVICES = {
    "llama1_7b": (64, 80),
    "llama2_7b": (64, 80),
    "llama2_7b_8x80gb": (8, 80),
    "llama2_70b": (64, 80),
    "llama3_8b": (64, 80),
    "tinyllama_1b": (16, 40),
    "chinchilla_160m": (1, 24),
    "chinchilla_60m": (1, 24),
}
"""GPUs and the GiB of each."""


def planned(name: str) -> ResolvedRun:
    run = compose_run(["task=plan", f"experiment={name}"])
    assert list(validate_run(run)) == []
    return resolve(run, CLUSTER)


def test_every_recipe_is_here() -> None:
    assert set(PUBLISHED) == set(DEVICES) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_published_numbers(name: str) -> None:
    run = planned(name)
    plan = build_plan(run)
    rate, betas, decay, warmup, tokens_per_step, tokens = PUBLISHED[name]
    assert run.optim.learning_rate == rate
    assert run.optim.betas == betas
    assert run.optim.weight_decay == decay
    assert plan.steps.warmup == warmup
    assert plan.steps.tokens_per_step == tokens_per_step
    assert run.train.max_tokens == tokens
    assert run.train.gradient_clipping == 1.0


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_in_the_memory_that_it_names(name: str) -> None:
    plan = build_plan(planned(name))
    ranks, gibibytes = DEVICES[name]
    assert plan.world_size == ranks
    assert plan.device_memory == gibibytes << 30
    assert plan.fits
    # Room for what the estimate may miss.
    assert plan.memory.total < 0.9 * plan.device_memory
