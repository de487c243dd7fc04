"""The entry point of a rank: `python -m llama_pretrain.train.worker RUN_DIR [CHECKPOINT]`.

Everything it trains with, it reads from the run directory.
"""

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama_pretrain.process import Heartbeat, StopRequest, die_with_parent
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.phases import Phases, read_phases


def begin(words: Sequence[str]) -> NoReturn:
    """Be a rank: of a fresh interpreter, or of one that was forked.

    Args:
        words: the run directory, and the checkpoint to go on from, if there is one.
    """
    # Before anything is imported that takes a while: a signal must find its handler.
    die_with_parent()
    request = StopRequest()
    request.install()
    run_dir, number = RunDir(Path(words[0])), int(os.environ["RANK"])
    phases = read_phases(run_dir)
    phases.end("spawn")
    checkpoint = Path(words[1]) if len(words) > 1 else None
    redirect_output(run_dir.rank_log(number))
    main(run_dir, checkpoint, request, Heartbeat(run_dir.heartbeats, number), phases)


def main(
    run_dir: RunDir,
    checkpoint: Path | None,
    stop: StopRequest,
    heartbeat: Heartbeat,
    phases: Phases,
) -> NoReturn:
    """Work, and leave the error where the launcher looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import record  # imports torch

    code = 1
    try:
        record(work)(run_dir, checkpoint, stop, heartbeat, phases)
        code = 0
        heartbeat.finish()
    except BaseException:
        traceback.print_exc()
    finally:
        # Gloo's threads abort some processes at the interpreter's exit, and NCCL's wait for others:
        # leave without it, after everything is written and all ranks have said so.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect_output(log: Path) -> None:
    """Send all output, that of C++ libraries too, to this rank's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def work(
    run_dir: RunDir,
    checkpoint: Path | None,
    stop: StopRequest,
    heartbeat: Heartbeat,
    phases: Phases,
) -> None:
    """Do what the run directory says: train, from the start or from a checkpoint, or evaluate."""
    import torch.distributed as dist

    from llama_pretrain.config.snapshot import load_snapshot
    from llama_pretrain.config.tasks import Task
    from llama_pretrain.distributed import init_distributed, keep_to_cores
    from llama_pretrain.plan.plan import load_plan

    run, plan = load_snapshot(run_dir.snapshot), load_plan(run_dir.plan)
    assert run.launch.threads_per_process is not None
    assert run.launch.num_processes is not None
    if run.launch.bind_cores:
        keep_to_cores(int(os.environ["LOCAL_RANK"]), num_ranks=run.launch.num_processes)
    phases.end("imports")
    rank = init_distributed(
        device=plan.device,
        # The parent watches too, and sees more: it comes first.
        timeout_s=run.launch.timeout_s + 60,
        threads=run.launch.threads_per_process,
        stop=stop,
        heartbeat=heartbeat,
        phases=phases,
    )
    dist.barrier()  # a rank that can't be reached shows here, not in the middle of building
    phases.end("process_group")
    rank.beat()
    if run.task is Task.evaluate:
        assert checkpoint is not None
        evaluate_rank(run, plan, run_dir, rank, checkpoint)
    else:
        train_rank(run, plan, run_dir, rank, checkpoint)


def train_rank(run: Any, plan: Any, run_dir: RunDir, rank: Any, checkpoint: Path | None) -> None:
    """Train to the end, or to a signal."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from llama_pretrain.checkpoint.load import load_checkpoint
    from llama_pretrain.distributed import print_rank_0
    from llama_pretrain.train.engine import build_engine
    from llama_pretrain.train.loop import prepare_training, train
    from llama_pretrain.train.mask import prove_document_mask
    from llama_pretrain.train.metrics import MetricsWriter, resident_memory_bytes
    from llama_pretrain.train.progress import Progress

    ds_config = json.loads(run_dir.ds_config.read_text(encoding="utf-8"))
    imports_bytes = resident_memory_bytes(rank.device)
    rank.phases.end("imports")
    digest = hashlib.sha256() if rank.is_first and checkpoint is None else None
    engine = build_engine(
        run, plan, ds_config, rank, tokenizer_dir=run_dir.tokenizer, digest=digest
    )
    rank.phases.end("engine")
    rank.beat()
    progress = Progress()
    if checkpoint is not None:
        progress = Progress(**load_checkpoint(engine, checkpoint, rank))
        rank.phases.end("checkpoint")
    if run.data.document_mask:
        print_rank_0(prove_document_mask(engine, eos_id=plan.corpus.eos_id, rank=rank), rank)
    if checkpoint is None:
        torch.manual_seed(run.seed + rank.index)  # dropout: from here on, each rank its own
    print_rank_0(f"training from step {progress.step} to {plan.steps.last}", rank)
    writer = MetricsWriter(run_dir, run.monitor, active=rank.is_first)
    if digest is not None:
        writer.write({"step": 0, "tokens": 0, "initial_weights": digest.hexdigest()})
    training = prepare_training(run, plan, run_dir, rank, engine, imports_bytes=imports_bytes)
    rank.phases.end("data")
    finished = train(training, writer, progress)
    if finished and run.deepspeed.comms_logger.enabled:
        deepspeed.comm.log_summary()  # every rank calls it; rank 0 prints
    writer.close()
    dist.barrier()  # no rank leaves while another still needs it


def evaluate_rank(run: Any, plan: Any, run_dir: RunDir, rank: Any, checkpoint: Path) -> None:
    """Evaluate a checkpoint on all ranks; rank 0 writes what came out."""
    import deepspeed
    import torch.distributed as dist
    from transformers import LlamaConfig

    from llama_pretrain.checkpoint.manifest import read_manifest
    from llama_pretrain.data.dataset import create_pretrain_dataset
    from llama_pretrain.files import write_text
    from llama_pretrain.train.evaluate import sum_losses
    from llama_pretrain.train.kernels.install import install_kernels
    from llama_pretrain.train.model import build_model, restore_rotary

    ds_config = json.loads(run_dir.ds_config.read_text(encoding="utf-8"))
    config = LlamaConfig.from_pretrained(checkpoint, attn_implementation="sdpa")
    model = build_model(config, seed=run.seed, weights=checkpoint, ds_config=ds_config)
    install_kernels(model, run.kernels)
    rank.beat()
    engine, *_ = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)
    if run.precision.buffer_dtype is None:
        restore_rotary(engine.module, config, rank.device)
    rows = create_pretrain_dataset(
        plan.corpus,
        "heldout",
        sequence_length=run.data.sequence_length,
        limits=plan.steps.eval_rows_of,
        document_mask=run.data.document_mask,
    )
    size, sources = plan.batch.micro_batch_size, plan.corpus.sources
    found = sum_losses(engine, rows, rank, micro_batch_size=size, sources=sources)
    if found is not None and rank.is_first:
        row = {"checkpoint": checkpoint.name, "step": read_manifest(checkpoint).step}
        row |= {**found.describe(), "eval_tokens": int(sum(found.tokens)), "finished": True}
        write_text(run_dir.metrics, json.dumps(row) + "\n")
    dist.barrier()  # no rank leaves while another still needs its shards


if __name__ == "__main__":
    begin(sys.argv[1:])
