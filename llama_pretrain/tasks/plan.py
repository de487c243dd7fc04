"""task=plan: print everything that is known of a run, and start nothing."""

import json
from dataclasses import replace

from llama_pretrain import console
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.ds_config import get_train_ds_config, trace_ds_config
from llama_pretrain.plan.feasible import validate_machine
from llama_pretrain.plan.fit import list_fits
from llama_pretrain.plan.plan import build_plan
from llama_pretrain.tasks.context import TaskContext


def show_plan(run: ResolvedRun, context: TaskContext) -> None:
    """Print the plan of a run and its DeepSpeed JSON."""
    plan = build_plan(run)
    config = get_train_ds_config(run, plan.batch, run_dir=None)
    plan = replace(plan, deepspeed_sources=trace_ds_config(config, context.origins))
    console.show_config(run, context.origins)
    console.show_plan(run, plan, None)
    if run.plan.fit is not None:
        fits = list_fits(run, plan.batch, limit=parse_size(run.plan.fit))
        console.show_fits(fits, limit=run.plan.fit)
    for problem in validate_machine(run, context.machine):
        console.say(f"not on this machine: {problem}")
    console.show_sources(config, plan.deepspeed_sources)
    console.say(json.dumps(config, indent=2))
