"""task=probe: train a few steps and estimate the whole run's time."""

from dataclasses import replace
from statistics import median

from llama_pretrain import console
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.cost import estimate_cost
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.metrics import read_metrics, steps
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.pretrain import pretrain

WARMUP_STEPS = 2
"""Steps that are not counted."""


def probe(run: ResolvedRun, plan: TrainingPlan, context: TaskContext) -> float | None:
    """Train a few steps as the run would, and print what the whole run would take."""
    num_steps = run.plan.probe_steps
    short = replace(
        run,
        train=replace(run.train, max_steps=num_steps, eval_every_steps=None, eval_sequences=1),
        checkpoint=replace(run.checkpoint, every_steps=None, at_end=False, export=False),
    )
    short_plan = replace(plan, steps=replace(plan.steps, last=num_steps, eval_sequences=1))
    result = pretrain(short, short_plan, context)
    rows = steps(read_metrics(context.run_dir.metrics))
    per_step = plan.steps.tokens_per_step
    counted = [per_step / row.tokens_per_s for row in rows[WARMUP_STEPS:]]
    console.show_cost(
        estimate_cost(run, tokens=plan.steps.tokens, tokens_per_s=per_step / median(counted)),
        steps=plan.steps,
        measured_over=len(counted),
    )
    return result
