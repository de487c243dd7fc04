"""The plan, its costs, what fits, and where each DeepSpeed value comes from."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.schedule import ScheduleName
from llama_pretrain.config.validate import flatten
from llama_pretrain.console.output import out, styled, two_columns
from llama_pretrain.plan.cost import CostPlan
from llama_pretrain.plan.fit import Fit
from llama_pretrain.plan.plan import Plan, Steps, TrainingPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.units import format_size


def show_plan(run: ResolvedRun, plan: Plan, run_dir: RunDir | None) -> None:
    """What will happen, in a table of two columns."""
    table = two_columns("plan")
    steps, size, memory = plan.steps, plan.parameters, plan.memory
    precision, optim = run.precision.name.value, run.optim.name.value
    table.add_row("device", f"{plan.device}, {precision}, {optim}, ZeRO stage {run.zero.stage}")
    threads = f" x {run.launch.threads_per_process} threads" if plan.device == "cpu" else ""
    nodes = f" on {run.launch.nodes} nodes" if run.launch.nodes > 1 else ""
    table.add_row("ranks", f"{plan.world_size}{nodes}{threads}")
    table.add_row("global batch", _triangle(plan))
    decay = f"{size.decayed:,} with weight decay, {size.not_decayed:,} without"
    table.add_row("parameters", f"{size.total:,}: {decay}")
    per_step = f"{steps.total:,} of {steps.tokens_per_step:,} tokens = {steps.tokens:,} tokens"
    epochs = ""
    if isinstance(plan, TrainingPlan) and len(plan.steps.epochs) == 1:
        epochs = f", {next(iter(plan.steps.epochs.values())):.2f} epochs"
    table.add_row("steps", per_step + epochs)
    rates = f"{plan.peak_learning_rate:g} after {steps.warmup:,} steps of warm-up"
    if steps.warmup > steps.total:
        rates = f"{plan.peak_learning_rate:g} at the end, within {steps.warmup:,} steps of warm-up"
        rates += f" to {run.optim.learning_rate:g}"
    wanted = run.schedule.decay_steps
    if wanted is not None and wanted > steps.decay and run.schedule.name is ScheduleName.wsd:
        rates += f", decay of {steps.decay:,} steps instead of {wanted:,}"
    table.add_row(
        "learning rate", f"{rates}, {run.schedule.name.value} to {plan.final_learning_rate:g}"
    )
    compute = f"{plan.flops_per_token * steps.tokens:.2e} FLOP ({plan.flops_per_token:.3g} a token)"
    table.add_row("compute", compute)
    parts = ", ".join(
        f"{name} {format_size(value)}" for name, value in memory.parts.items() if value
    )
    verdict = styled("fits", "") if plan.fits else styled("does not fit", "bold red")
    table.add_row(
        "memory a rank",
        Text.assemble(
            f"{format_size(memory.total)} peak ({memory.phase}), ",
            verdict,
            f" in {format_size(plan.device_memory)}: {parts}",
        ),
    )
    for name, size_beside in (("host", memory.host), ("disk", memory.disk)):
        if size_beside:
            table.add_row(f"on the {name}", f"{format_size(size_beside)} a rank")
    table.add_row("a rank stores", f"{plan.parameters_per_rank:,} parameters")
    if plan.world_size > 1:
        traffic = plan.traffic
        between = traffic.between_machines
        away = f", {format_size(between)} of it between nodes" if between else ""
        heads = f", {format_size(traffic.heads)} of heads" if traffic.heads else ""
        table.add_row(
            "traffic",
            f"a rank sends {format_size(traffic.total)} a step{away}:"
            f" {format_size(traffic.gather)} of parameters,"
            f" {format_size(traffic.reduce)} of gradients ({traffic.volume:.3g}P){heads}",
        )
    if plan.cost is not None:
        table.add_row("cost", _cost_text(plan.cost))
    if isinstance(plan, TrainingPlan):
        sequences = (
            f"{plan.corpus.train_sequences:,} sequences of {run.data.sequence_length} tokens"
        )
        text = f"{run.data.name.value}: {sequences}, {steps.eval_sequences} for evaluation"
        table.add_row("data", text)
        if plan.vocab_size != run.model.vocab_size:
            tokens = f"{plan.corpus.tokenizer_size:,} tokens"
            grown = f"embeddings grow from {run.model.vocab_size:,} to {plan.vocab_size:,} rows"
            added = " with [PAD]" if run.tokenizer.add_pad_token else ""
            table.add_row("tokenizer", f"{tokens}{added}: {grown}")
        _add_sources(table, plan)
    _add_stages(table, run, plan)
    if run_dir is not None:
        table.add_row("run directory", str(run_dir.path))
        table.add_row("to reproduce", shlex.join(["python", "run.py", f"reproduce={run_dir.path}"]))
    out.print(table)


def _triangle(plan: Plan) -> str:
    """How the global batch is made up."""
    batch, groups = plan.batch, f"{plan.world_size} ranks"
    if (shared := plan.sequence_parallel_size) > 1:
        groups = f"{plan.data_parallel_size} x {shared} ranks that share sequences"
    return (
        f"{batch.global_batch_size} sequences = {batch.micro_batch_size} micro"
        f" x {batch.gradient_accumulation_steps} accumulated x {groups}"
    )


def _add_sources(table: Table, plan: TrainingPlan) -> None:
    """A line for each source of a mixture."""
    if len(plan.corpus.sources) == 1:
        return
    first = plan.sampling.stages[0]
    for source, quota in zip(plan.corpus.sources, first.quotas, strict=True):
        text = (
            f"{plan.steps.epochs[source.name]:.2f} epochs of {source.train_sequences:,} sequences"
        )
        table.add_row(f"  {source.name}", f"{text}, {quota / plan.sampling.block:.1%} at first")


def _add_stages(table: Table, run: ResolvedRun, plan: Plan) -> None:
    """A line for each stage of the data, if there are several or sequences are cut."""
    sampling, length = plan.sampling, run.data.sequence_length
    if len(sampling.stages) == 1 and sampling.stages[0].sequence_length == length:
        return
    for stage in sampling.stages:
        step = stage.first_sample // plan.batch.global_batch_size + 1
        text = f"sequences of {stage.sequence_length} tokens"
        if len(sampling.names) > 1:
            shares = zip(sampling.names, stage.quotas, strict=True)
            text += ", " + ", ".join(f"{name} {q / sampling.block:.1%}" for name, q in shares)
        table.add_row(f"from step {step:,}", text)


def _cost_text(cost: CostPlan) -> str:
    text = f"{cost.hours:,.3g} hours at {cost.tokens_per_s:,.0f} tokens/s,"
    text += f" {cost.device_hours:,.3g} device-hours"
    if cost.kilowatt_hours is not None:
        text += f", {cost.kilowatt_hours:,.3g} kWh"
    return text if cost.price is None else f"{text}, {cost.price:,.2f} in money"


def show_cost(cost: CostPlan, *, steps: Steps, measured_over: int) -> None:
    """What a probe has measured."""
    table = two_columns("probe")
    length = f"{steps.total:,} steps of {steps.tokens_per_step:,} tokens"
    table.add_row("the whole run", f"{length}: {_cost_text(cost)}")
    table.add_row("measured over", f"{measured_over} steps, without evaluation and checkpoints")
    table.add_row("to plan with it", f"task=plan plan.tokens_per_s={cost.tokens_per_s:.0f}")
    out.print(table)


def show_fits(fits: Sequence[Fit], *, limit: str) -> None:
    """What fits a memory size, best first, and what does not."""
    table = Table(
        title=f"what fits in {limit}, with the largest micro batch of each",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("micro batch", "memory", "sends a step", "on the host"):
        table.add_column(name, justify="right")
    table.add_column("add", style="cyan", overflow="fold")
    for fit in fits:
        size = "none" if fit.micro_batch_size is None else str(fit.micro_batch_size)
        host = format_size(fit.memory.host) if fit.memory.host else "-"
        table.add_row(
            size,
            format_size(fit.memory.total),
            format_size(fit.traffic),
            host,
            " ".join(fit.overrides),
            style="dim" if fit.micro_batch_size is None else None,
        )
    out.print(table)


class PlannedJob(Protocol):
    """A job of a sweep, as its table of plans needs it."""

    @property
    def label(self) -> str: ...
    @property
    def plan(self) -> Plan | None: ...
    @property
    def problem(self) -> str: ...


def show_jobs(jobs: Sequence[PlannedJob]) -> int:
    """The plans of a sweep in one table. Returns the exit code: 1 if a job was refused."""
    table = Table(title="plans", title_justify="left", box=None, pad_edge=False)
    table.add_column("job", style="cyan", overflow="fold")
    for name in ("micro x accumulated x ranks", "weights", "gradients", "optimizer"):
        table.add_column(name, justify="right")
    for name in ("activations", "rest", "a rank", "sends a step", "fits"):
        table.add_column(name, justify="right")
    for job in jobs:
        label = job.label.replace(",", " ")
        if job.plan is None:
            table.add_row(label, styled(job.problem, "red"))
            continue
        plan, memory = job.plan, job.plan.memory
        batch = plan.batch
        shown = (
            memory.weights,
            memory.gradients,
            memory.master_weights + memory.optimizer,
            memory.activations + memory.logits,
        )
        table.add_row(
            label,
            f"{batch.micro_batch_size} x {batch.gradient_accumulation_steps}"
            f" x {plan.data_parallel_size}",
            *(format_size(size) for size in (*shown, memory.total - sum(shown), memory.total)),
            format_size(plan.traffic.total),
            styled("yes", "") if plan.fits else styled("no", "bold red"),
        )
    out.print(table)
    return 1 if any(job.plan is None for job in jobs) else 0


def show_sources(config: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Where the values of the DeepSpeed JSON come from that are not defaults."""
    table = Table(title="DeepSpeed values", title_justify="left", box=None, pad_edge=False)
    for name in ("key", "value", "from"):
        table.add_column(name, overflow="fold")
    for path, value in flatten(config):
        if sources[path] != "default":
            table.add_row(path, json.dumps(value), sources[path])
    out.print(table)
