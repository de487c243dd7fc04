"""task=plan: print all that is known of a run, and start nothing."""

import json
from collections.abc import Mapping
from dataclasses import replace

from llama_pretrain import console
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.run import Run
from llama_pretrain.plan.ds_config import get_train_ds_config, trace_ds_config
from llama_pretrain.plan.feasible import check_machine
from llama_pretrain.plan.fit import list_fits
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import build_plan


def show_plan(run: Run, machine: Machine, origins: Mapping[str, str]) -> None:
    """All that is known of a run, and nothing started."""
    plan = build_plan(run, None)
    config = get_train_ds_config(run, plan.batch, run_dir=None)
    plan = replace(plan, deepspeed_sources=trace_ds_config(config, origins))
    console.show_config(run)
    console.show_plan(run, plan, None)
    if run.plan.fit is not None:
        fits = list_fits(run, plan.batch, limit=parse_size(run.plan.fit))
        console.show_fits(fits, limit=run.plan.fit)
    for problem in check_machine(run, machine):
        console.say(f"not on this machine: {problem}")
    console.show_sources(config, plan.deepspeed_sources)
    console.say(json.dumps(config, indent=2))
