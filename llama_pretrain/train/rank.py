"""What a rank does with a run directory: train, or evaluate a checkpoint."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from llama_pretrain.checkpoint.engine_state import load_checkpoint
from llama_pretrain.checkpoint.manifest import read_manifest
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.config.tasks import Task
from llama_pretrain.data.node_cache import copy_corpus
from llama_pretrain.distributed import Rank, init_distributed, keep_to_cores, print_rank_0
from llama_pretrain.files import write_text
from llama_pretrain.plan.plan import TrainingPlan, load_plan
from llama_pretrain.process import Heartbeat, StopRequest
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EventRow
from llama_pretrain.runs.phases import Phases
from llama_pretrain.train.device import resident_memory_bytes
from llama_pretrain.train.engine import build_engine
from llama_pretrain.train.evaluate import open_split, sum_losses, verify_document_mask
from llama_pretrain.train.generation import open_prompt
from llama_pretrain.train.kernels.install import install_kernels
from llama_pretrain.train.loop import train
from llama_pretrain.train.metrics import MetricsWriter
from llama_pretrain.train.model import build_model, restore_rotary
from llama_pretrain.train.progress import Progress
from llama_pretrain.train.step import Training


def run_rank(
    run_dir: RunDir,
    checkpoint: Path | None,
    stop: StopRequest,
    heartbeat: Heartbeat,
    phases: Phases,
) -> None:
    """Join the process group and run the task of the run directory."""
    run, plan = load_snapshot(run_dir.snapshot), load_plan(run_dir.plan)
    if run.launch.bind_cores:
        keep_to_cores(int(os.environ["LOCAL_RANK"]), num_ranks=run.launch.num_processes)
    phases.end("imports")
    rank = init_distributed(
        launch=run.launch,
        device=plan.device,
        stop=stop,
        heartbeat=heartbeat,
        phases=phases,
    )
    dist.barrier()  # an unreachable rank fails here, not while the model is built
    phases.end("process_group")
    rank.beat()
    if run.data.node_cache_dir is not None:
        cache = Path(run.data.node_cache_dir).expanduser()
        plan = replace(plan, corpus=copy_corpus(plan.corpus, cache, beat=rank.beat))
    if run.task is not Task.evaluate:
        train_rank(run, plan, run_dir, rank, checkpoint)
    elif checkpoint is not None:
        evaluate_rank(run, plan, run_dir, rank, checkpoint)
    else:
        raise ValueError("task=evaluate: a rank requires a checkpoint (got none)")
    dist.barrier()  # no rank exits while another still needs it


def train_rank(
    run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir, rank: Rank, checkpoint: Path | None
) -> None:
    """Train to the last step, or until a signal."""
    ds_config = json.loads(run_dir.ds_config.read_text(encoding="utf-8"))
    imports_bytes = resident_memory_bytes(rank.device)
    digest = hashlib.sha256() if rank.is_first and checkpoint is None else None
    engine, sequence = build_engine(
        run, plan, ds_config, rank, tokenizer_dir=run_dir.tokenizer, digest=digest
    )
    rank.phases.end("engine")
    rank.beat()
    progress = Progress()
    if checkpoint is not None:
        progress = Progress(**load_checkpoint(engine, checkpoint, rank))
        rank.phases.end("checkpoint")
    if run.data.document_mask:
        print_rank_0(verify_document_mask(engine, eos_id=plan.corpus.eos_id, rank=rank), rank)
    if checkpoint is None:
        torch.manual_seed(run.seed + rank.index)  # dropout differs between ranks
    print_rank_0(f"training from step {progress.step} to {plan.steps.last}", rank)
    writer = MetricsWriter(run_dir, run.monitor, active=rank.is_first)
    if digest is not None:
        writer.write(EventRow(step=0, tokens=0, initial_weights=digest.hexdigest()))
    training = Training(
        run=run,
        plan=plan,
        run_dir=run_dir,
        rank=rank,
        engine=engine,
        sequence=sequence,
        train_set=open_split(run, plan, "train"),
        heldout_set=open_split(run, plan, "heldout"),
        imports_bytes=imports_bytes,
        prompt=open_prompt(run, plan, run_dir),
    )
    rank.phases.end("data")
    finished = train(training, writer, progress)
    if finished and run.deepspeed.comms_logger.enabled:
        deepspeed.comm.log_summary()  # every rank calls it; rank 0 prints
    writer.close()


def evaluate_rank(
    run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir, rank: Rank, checkpoint: Path
) -> None:
    """Evaluate a checkpoint on all ranks; rank 0 writes the result."""
    ds_config = json.loads(run_dir.ds_config.read_text(encoding="utf-8"))
    config = LlamaConfig.from_pretrained(checkpoint, attn_implementation="sdpa")
    model = build_model(config, seed=run.seed, weights=checkpoint, ds_config=ds_config)
    install_kernels(model, run.kernels)
    rank.beat()
    engine, *_ = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)
    if run.precision.buffer_dtype is None:
        restore_rotary(engine.module, config, rank.device)
    result = sum_losses(engine, open_split(run, plan, "heldout"), plan, rank)
    if result is not None and rank.is_first:
        manifest = read_manifest(checkpoint)
        tokens = manifest.consumed_samples * run.data.sequence_length
        row = result.to_row(step=manifest.step, tokens=tokens, checkpoint=checkpoint.name)
        write_text(run_dir.metrics, row.to_line())
