"""The plan: everything that follows from a resolved run, and plan.json."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llama_pretrain.config.data import DataName, named_sources, validate_data
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.schedule import ScheduleName
from llama_pretrain.plan.batch import BatchPlan, count_ranks, count_replicas, solve_batch
from llama_pretrain.plan.cost import CostPlan, estimate_cost
from llama_pretrain.plan.feasible import check_scale
from llama_pretrain.plan.memory import MemoryPlan, estimate_memory
from llama_pretrain.plan.model_size import (
    ModelSize,
    count_parameters,
    flops_per_token,
    with_vocabulary,
)
from llama_pretrain.plan.sampling import SamplingPlan, plan_sampling, share_evenly
from llama_pretrain.plan.traffic import TrafficPlan, count_traffic


@dataclass(frozen=True, kw_only=True)
class SourceTokens:
    """The prepared tokens of one source."""

    name: str
    tokens_dir: str
    data_hash: str
    """Names the tokens: of the files, the tokenizer and the options that made them."""
    train_rows: int
    train_tokens: int
    heldout_rows: int
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
    """Whatever decides which tokens a position has, by setting: to say what has changed."""
    sources: list[SourceTokens]

    @property
    def train_rows(self) -> int:
        return sum(source.train_rows for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Lengths in optimizer steps, and what they come to."""

    total: int
    last: int
    """Where this launch ends: at the total, or before it where only the beginning is tried."""
    warmup: int
    decay: int
    """Steps of the decay at the end: all after warm-up but for `wsd` and `constant`."""
    tokens_per_step: int
    tokens: int
    epochs: dict[str, float] | None
    """Passes over each source's training rows; `None` where the data is not prepared yet."""
    eval_rows: int | None
    """Rows of one evaluation, over all sources."""
    eval_rows_of: list[int] | None
    """Rows of each source in it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do."""

    device: str
    world_size: int
    batch: BatchPlan
    steps: Steps
    sampling: SamplingPlan
    parameters: ModelSize
    flops_per_token: int
    vocab_size: int
    """Rows of the embedding matrix, after it has grown to hold the tokenizer."""
    peak_learning_rate: float
    final_learning_rate: float
    memory: MemoryPlan
    device_memory: int
    """Bytes of one rank's device, or its share of the host's memory on a CPU."""
    parameters_per_rank: int
    """Parameters that a rank keeps between steps."""
    traffic: TrafficPlan
    cost: CostPlan | None
    """`None` where no throughput is given."""
    corpus: Corpus | None
    """`None` where the data is not prepared yet (`task=plan`)."""
    deepspeed_sources: dict[str, str] = field(default_factory=dict)
    """Where each value of ds_config.json is from: a YAML, the command line, or how it follows."""

    @property
    def fits(self) -> bool:
        """Whether the estimated peak is within the device's memory."""
        return self.memory.total <= self.device_memory


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a sweep with task=plan: its plan, or why there is none."""

    words: Sequence[str]
    """Its overrides."""
    plan: Plan | None = None
    problem: str = ""


def check_plan(run: Run) -> Iterator[Problem]:
    """What keeps a run, its choices resolved, from being planned."""
    yield from check_scale(run)
    for path, size in (
        ("plan.fit", run.plan.fit),
        ("launch.device_memory", run.launch.device_memory),
    ):
        try:
            parse_size(size or "1GiB")
        except ValueError:
            message = f"should be a size with its unit (got {size})"
            yield Problem(path=path, message=message, hint="write it as 80GiB, 24GB or 500MiB")
    try:
        batch = _solve(run)
        if not any(validate_data(run)):
            plan_sampling(run.data, global_batch_size=batch.global_batch_size)
    except UserError as error:
        yield from error.problems


def check_fits(run: Run, plan: Plan) -> Iterator[Problem]:
    """A run that is to start and whose estimate is above its device's memory."""
    if run.task.trains and not plan.fits:
        need, have = (size / (1 << 30) for size in (plan.memory.total, plan.device_memory))
        yield Problem(
            path="launch.device_memory",
            message=f"a rank needs about {need:.1f} GiB, and its device has {have:.1f} GiB",
            hint=f"task=plan plan.fit={have:.1f}GiB lists what fits; to start all the same, set it"
            f" to {need + 0.1:.1f}GiB",
        )


def check_corpus(run: Run, plan: Plan) -> Iterator[Problem]:
    """What a run may not do with the data that was found."""
    assert plan.corpus is not None
    assert plan.steps.epochs is not None
    rows, batch = plan.corpus.train_rows, plan.batch.global_batch_size
    wanted, found = run.data.hash, plan.corpus.content_hash
    if wanted is not None and wanted != found and run.resume.run_dir is None:
        yield Problem(
            path="data.hash",
            message=f"the data and its tokenizer are {found[:16]} now (got {wanted[:16]})",
            hint="to train on them all the same, set data.hash=null",
        )
    if rows < batch and run.data.limit_train_rows is None:
        yield Problem(
            path="data",
            message=f"there are {rows} rows of {run.data.sequence_length} training tokens, fewer"
            f" than one global batch (got {batch})",
            hint="give more text, shorten data.sequence_length or lower batch.global_batch_size;"
            f" to train on them all the same, set data.limit_train_rows={rows}",
        )
    mixed = run.data.name is DataName.mixture
    for name, source in named_sources(run.data).items():
        epochs = plan.steps.epochs[name]
        if source.max_epochs is not None and epochs > source.max_epochs:
            hint = "lower its weight, or shorten the run" if mixed else "shorten the run"
            yield Problem(
                path=f"data.sources.{name}.max_epochs" if mixed else "data.max_epochs",
                message=f"the run would read {name} {epochs:.2f} times (got {source.max_epochs:g})",
                hint=hint,
            )


def build_plan(run: Run, corpus: Corpus | None) -> Plan:
    """Plan a run whose choices are resolved.

    Raises:
        UserError: if the batch doesn't divide, or DeepSpeed would ignore a key.
    """
    world_size = count_ranks(run)
    refuse(check_plan(run))
    batch = _solve(run)
    if corpus is not None:
        run = replace(run, model=with_vocabulary(run.model, tokenizer_size=corpus.tokenizer_size))
    assert run.launch.device_memory is not None
    sampling = plan_sampling(run.data, global_batch_size=batch.global_batch_size)
    size, steps = count_parameters(run.model), _count_steps(run, batch, sampling, corpus)
    speed = run.plan.tokens_per_s
    cost = None if speed is None else estimate_cost(run, tokens=steps.tokens, tokens_per_s=speed)
    constant = run.schedule.name is ScheduleName.constant
    peak = run.optim.learning_rate
    return Plan(
        device=run.launch.device.value,
        world_size=world_size,
        batch=batch,
        steps=steps,
        sampling=sampling,
        parameters=size,
        flops_per_token=flops_per_token(run.model, sequence_length=run.data.sequence_length),
        vocab_size=run.model.vocab_size,
        peak_learning_rate=peak,
        final_learning_rate=peak if constant else peak * run.schedule.min_learning_rate_ratio,
        memory=estimate_memory(run, batch, world_size=world_size),
        device_memory=parse_size(run.launch.device_memory),
        parameters_per_rank=-(-size.total // world_size) if run.zero.stage == 3 else size.total,
        traffic=count_traffic(run, batch, world_size=world_size),
        cost=cost,
        corpus=corpus,
    )


def _solve(run: Run) -> BatchPlan:
    length, replicas = run.data.sequence_length, count_replicas(run)
    return solve_batch(run.batch, sequence_length=length, replicas=replicas)


def _count_steps(
    run: Run, batch: BatchPlan, sampling: SamplingPlan, corpus: Corpus | None
) -> Steps:
    tokens_per_step = batch.global_batch_size * run.data.sequence_length

    def in_steps(steps: int | None, tokens: int | None) -> int | None:
        return steps if tokens is None else -(-tokens // tokens_per_step)

    limits = (run.train.max_steps, in_steps(None, run.train.max_tokens))
    total = min(limit for limit in limits if limit is not None)
    schedule = run.schedule
    # A run shorter than its warm-up ends while it warms up, like the beginning of a longer one.
    warmup = in_steps(schedule.warmup_steps, schedule.warmup_tokens) or 0
    rest = max(0, total - warmup)
    decay = rest
    if schedule.name is ScheduleName.constant:
        decay = 0
    if schedule.name is ScheduleName.wsd:
        wanted = in_steps(schedule.decay_steps, schedule.decay_tokens)
        decay = min(rest, -(-total // 10) if wanted is None else wanted)
    epochs, eval_rows, shares = None, run.train.eval_rows, None
    if corpus is not None:
        used = sampling.consumed(total * batch.global_batch_size)
        limit = run.data.limit_train_rows
        epochs = {
            source.name: rows / min(source.train_rows, limit or source.train_rows)
            for source, rows in zip(corpus.sources, used, strict=True)
        }
        shares = share_evenly([source.heldout_rows for source in corpus.sources], eval_rows)
        eval_rows = sum(shares)
    return Steps(
        total=total,
        last=total,
        warmup=warmup,
        decay=decay,
        tokens_per_step=tokens_per_step,
        tokens=total * tokens_per_step,
        epochs=epochs,
        eval_rows=eval_rows,
        eval_rows_of=shares,
    )


def render_plan(plan: Plan) -> str:
    """The text of plan.json."""
    return json.dumps(asdict(plan), indent=2) + "\n"


def load_plan(path: Path) -> Plan:
    """Read plan.json, as workers do."""
    from pydantic import TypeAdapter  # 0.1 s that --help need not pay

    return TypeAdapter(Plan).validate_json(path.read_bytes())
