"""task=probe: train a few steps and estimate the whole run's time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from llama_pretrain import console
from llama_pretrain.config.run import Run
from llama_pretrain.plan.cost import estimate_cost
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.tasks.pretrain import pretrain


def probe(
    run: Run,
    plan: Plan,
    *,
    run_dir: RunDir,
    argv: Sequence[str],
    machine: Machine,
    launch: Callable[..., int],
) -> float | None:
    """Train a few steps of the real thing, and say what the whole run would take."""
    steps = run.plan.probe_steps
    short = replace(
        run,
        train=replace(run.train, max_steps=steps, eval_every_steps=None, eval_rows=1),
        checkpoint=replace(run.checkpoint, every_steps=None, at_end=False, export=False),
    )
    result = pretrain(
        short,
        replace(plan, steps=replace(plan.steps, last=steps, eval_rows=1)),
        run_dir=run_dir,
        argv=argv,
        machine=machine,
        launch=launch,
    )
    rows = read_metrics(run_dir.metrics)
    seconds = [plan.steps.tokens_per_step / row["tokens_per_s"] for row in rows if "loss" in row]
    counted = sorted(seconds[2:])  # the first two warm up
    speed = plan.steps.tokens_per_step / counted[len(counted) // 2]
    console.show_cost(
        estimate_cost(run, tokens=plan.steps.tokens, tokens_per_s=speed),
        steps=plan.steps,
        measured_over=len(counted),
    )
    return result
