"""The plan: everything that follows from a resolved run, and plan.json."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llama_pretrain.config.data import DataName, named_sources, validate_data
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.schedule import ScheduleName
from llama_pretrain.files import read_regular
from llama_pretrain.plan.batch import BatchPlan, solve_batch
from llama_pretrain.plan.cost import CostPlan, estimate_cost
from llama_pretrain.plan.feasible import validate_world_size
from llama_pretrain.plan.memory import MemoryPlan, estimate_memory
from llama_pretrain.plan.model_size import (
    ModelSize,
    count_parameters,
    flops_per_token,
    with_vocabulary,
)
from llama_pretrain.plan.sampling import SamplingPlan, plan_sampling, share_evenly
from llama_pretrain.plan.schedule import learning_rate_factor
from llama_pretrain.plan.traffic import TrafficPlan, count_traffic


@dataclass(frozen=True, kw_only=True)
class SourceTokens:
    """The prepared tokens of one source."""

    name: str
    tokens_dir: str
    data_hash: str
    """Identifies the tokens by the files, the tokenizer and the options that made them."""
    train_sequences: int
    train_tokens: int
    heldout_sequences: int
    heldout_bytes_per_token: float
    """Bytes of text a token of the held-out split, for bits per byte."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The prepared data that a run reads."""

    tokenizer_dir: str
    tokenizer_hash: str
    tokenizer_size: int
    eos_id: int
    """The id that ends a document."""
    content_hash: str
    """Of the tokenizer and of every source's tokens."""
    fingerprint: dict[str, str]
    """Everything that decides which tokens a position has, by setting: to report what changed."""
    sources: list[SourceTokens]

    @property
    def train_sequences(self) -> int:
        return sum(source.train_sequences for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Lengths in optimizer steps, and the tokens that they add up to."""

    total: int
    last: int
    """Where this launch ends: at the total, or earlier when only the beginning is trained."""
    warmup: int
    decay: int
    """Steps of the decay at the end: all after warm-up, except for `wsd` and `constant`."""
    tokens_per_step: int
    tokens: int
    eval_sequences: int | None
    """Sequences of one evaluation over all sources; `None` = all."""


@dataclass(frozen=True, kw_only=True)
class TrainingSteps(Steps):
    """Lengths when the data is known."""

    epochs: dict[str, float]
    """Passes over each source's training sequences."""
    eval_sequences: int
    eval_sequences_by_source: list[int]
    """Sequences of each source in one evaluation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do, as far as it is known without data."""

    device: str
    world_size: int
    sequence_parallel_size: int = 1
    """Ranks that share each sequence."""
    batch: BatchPlan
    steps: Steps
    sampling: SamplingPlan
    parameters: ModelSize
    flops_per_token: int
    vocab_size: int
    """Rows of the embedding matrix, after it has grown to fit the tokenizer."""
    peak_learning_rate: float
    final_learning_rate: float
    memory: MemoryPlan
    device_memory: int
    """Bytes of one rank's device, or its share of the host's memory on a CPU."""
    parameters_per_rank: int
    """Parameters that a rank stores between steps."""
    traffic: TrafficPlan
    cost: CostPlan | None
    """`None` without a throughput."""
    deepspeed_sources: dict[str, str] = field(default_factory=dict)
    """Where each value of ds_config.json comes from: a YAML file, the command line, or a rule."""

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that read different sequences."""
        return self.world_size // self.sequence_parallel_size

    @property
    def fits(self) -> bool:
        """Whether the estimated peak is within the device's memory."""
        return self.memory.total <= self.device_memory


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Plan):
    """What a run will do on its data: plan.json."""

    steps: TrainingSteps
    corpus: Corpus


def validate_plan(run: ResolvedRun) -> Iterator[Problem]:
    """What keeps a run from being planned."""
    yield from validate_world_size(run)
    for path, size in (
        ("plan.fit", run.plan.fit),
        ("launch.device_memory", run.launch.device_memory),
    ):
        try:
            parse_size(size or "1GiB")
        except ValueError:
            message = f"must be a size with its unit (got {size})"
            yield Problem(path=path, message=message, hint="Write it as 80GiB, 24GB or 500MiB")
    try:
        batch = solve(run)
        if not any(validate_data(run)):
            plan_sampling(run.data, global_batch_size=batch.global_batch_size)
    except UserError as error:
        yield from error.problems


def validate_memory(run: ResolvedRun, plan: Plan) -> Iterator[Problem]:
    """A run that is to start and whose estimate exceeds its device's memory."""
    if run.task.trains and not plan.fits:
        need, have = (size / (1 << 30) for size in (plan.memory.total, plan.device_memory))
        yield Problem(
            path="launch.device_memory",
            message=f"a rank needs about {need:.1f} GiB, and its device has {have:.1f} GiB",
            hint=f"task=plan plan.fit={have:.1f}GiB lists what fits; to start anyway, set it"
            f" to {need + 0.1:.1f}GiB",
        )


def validate_corpus(run: ResolvedRun, plan: TrainingPlan) -> Iterator[Problem]:
    """What a run may not do with the data that was found."""
    available, batch = plan.corpus.train_sequences, plan.batch.global_batch_size
    wanted, found = run.data.hash, plan.corpus.content_hash
    if wanted is not None and wanted != found and run.resume.run_dir is None:
        yield Problem(
            path="data.hash",
            message=f"the data and its tokenizer are now {found[:16]} (got {wanted[:16]})",
            hint="To train on them anyway, set data.hash=null",
        )
    if available < batch and run.data.limit_train_sequences is None:
        yield Problem(
            path="data",
            message=f"has {available} sequences of {run.data.sequence_length} training tokens,"
            f" fewer than one global batch (got {batch})",
            hint="Add more text, shorten data.sequence_length or lower batch.global_batch_size;"
            f" to train on them anyway, set data.limit_train_sequences={available}",
        )
    mixed = run.data.name is DataName.mixture
    for name, source in named_sources(run.data).items():
        epochs = plan.steps.epochs[name]
        if source.max_epochs is not None and epochs > source.max_epochs:
            yield Problem(
                path=f"data.sources.{name}.max_epochs" if mixed else "data.max_epochs",
                message=f"the run would read {name} {epochs:.2f} times (got {source.max_epochs:g})",
                hint="Lower its weight, or shorten the run" if mixed else "Shorten the run",
            )


def build_plan(run: ResolvedRun) -> Plan:
    """Plan a run whose data is not known yet.

    Raises:
        UserError: if the batch does not divide, or a size is not valid.
    """
    batch, sampling = _solve_all(run)
    steps = Steps(**_count_steps(run, batch), eval_sequences=run.train.eval_sequences)
    return Plan(steps=steps, **_plan_values(run, batch, sampling, steps))


def build_training_plan(run: ResolvedRun, corpus: Corpus) -> TrainingPlan:
    """Plan a run on its data.

    Raises:
        UserError: if the batch does not divide, or a size is not valid.
    """
    batch, sampling = _solve_all(run)
    model = with_vocabulary(run.model, tokenizer_size=corpus.tokenizer_size)
    counts = _count_steps(run, batch)
    used = sampling.consumed(counts["total"] * batch.global_batch_size)
    limit = run.data.limit_train_sequences
    shares = share_evenly(
        [source.heldout_sequences for source in corpus.sources], run.train.eval_sequences
    )
    steps = TrainingSteps(
        **counts,
        epochs={
            source.name: count / min(source.train_sequences, limit or source.train_sequences)
            for source, count in zip(corpus.sources, used, strict=True)
        },
        eval_sequences=sum(shares),
        eval_sequences_by_source=shares,
    )
    values = _plan_values(replace(run, model=model), batch, sampling, steps)
    return TrainingPlan(steps=steps, corpus=corpus, **values)


def _solve_all(run: ResolvedRun) -> tuple[BatchPlan, SamplingPlan]:
    refuse(validate_plan(run))
    batch = solve(run)
    return batch, plan_sampling(run.data, global_batch_size=batch.global_batch_size)


def solve(run: ResolvedRun) -> BatchPlan:
    """The batch sizes of a run.

    Raises:
        UserError: if they do not divide.
    """
    length = run.data.sequence_length
    return solve_batch(run.batch, sequence_length=length, world_size=run.data_parallel_size)


def _plan_values(
    run: ResolvedRun, batch: BatchPlan, sampling: SamplingPlan, steps: Steps
) -> dict[str, Any]:
    """What both kinds of plans have in common."""
    size, speed = count_parameters(run.model), run.plan.tokens_per_s
    factor, rate = learning_rate_factor(run.schedule, steps), run.optim.learning_rate
    peak_step = min(max(steps.warmup, 1), steps.total) - 1
    return {
        "device": run.launch.device.value,
        "world_size": run.num_ranks,
        "sequence_parallel_size": run.launch.sequence_parallel_size,
        "batch": batch,
        "sampling": sampling,
        "parameters": size,
        "flops_per_token": flops_per_token(run.model, sequence_length=run.data.sequence_length),
        "vocab_size": run.model.vocab_size,
        "peak_learning_rate": rate * factor(peak_step),
        "final_learning_rate": rate * factor(steps.total - 1),
        "memory": estimate_memory(run, batch),
        "device_memory": parse_size(run.launch.device_memory),
        "parameters_per_rank": -(-size.total // run.num_ranks)
        if run.zero.stage == 3
        else size.total,
        "traffic": count_traffic(run, batch),
        "cost": None
        if speed is None
        else estimate_cost(run, tokens=steps.tokens, tokens_per_s=speed),
    }


def _count_steps(run: ResolvedRun, batch: BatchPlan) -> dict[str, int]:
    """The lengths of a run in steps, by field of `Steps`."""
    tokens_per_step = batch.global_batch_size * run.data.sequence_length

    def in_steps(steps: int | None, tokens: int | None) -> int | None:
        return steps if tokens is None else -(-tokens // tokens_per_step)

    limits = (run.train.max_steps, in_steps(None, run.train.max_tokens))
    total = min(limit for limit in limits if limit is not None)
    schedule = run.schedule
    # A run shorter than its warm-up ends during warm-up, like the beginning of a longer one.
    warmup = in_steps(schedule.warmup_steps, schedule.warmup_tokens) or 0
    rest = max(0, total - warmup)
    decay = rest
    if schedule.name is ScheduleName.constant:
        decay = 0
    if schedule.name is ScheduleName.wsd:
        wanted = in_steps(schedule.decay_steps, schedule.decay_tokens)
        decay = min(rest, -(-total // 10) if wanted is None else wanted)
    return {
        "total": total,
        "last": total,
        "warmup": warmup,
        "decay": decay,
        "tokens_per_step": tokens_per_step,
        "tokens": total * tokens_per_step,
    }


def render_plan(plan: TrainingPlan) -> str:
    """The text of plan.json."""
    return json.dumps(asdict(plan), indent=2) + "\n"


def load_plan(path: Path) -> TrainingPlan:
    """Read plan.json, as workers do."""
    return TypeAdapter(TrainingPlan).validate_json(read_regular(path))
