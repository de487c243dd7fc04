"""Ranks on this machine, through torch's elastic agent: fresh interpreters, own rendezvous."""

import contextlib
import logging
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_pretrain.config.schema import Run
from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.rundir import RunDir

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class RankError(Exception):
    """A rank ended with an error; the others were stopped."""

    def __init__(self, *, rank: int, error: str, log: Path):
        self.rank, self.error, self.log = rank, error, log
        self.may_pass = not error.startswith(("NonFiniteError", "CheckpointError"))
        """Whether the same may go well another time."""
        super().__init__(f"rank {rank} failed: {error}\n  its log: {log}")


class Stopped(BaseException):
    """A signal asked the launcher to end; the ranks were stopped."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


class Preempted(BaseException):
    """A signal asked the run to end; it has finished its step and written a checkpoint."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"preempted by {signal.Signals(number).name}")


def launch(run: Run, plan: Plan, run_dir: RunDir, *, checkpoint: Path | None) -> None:
    """Start the ranks of a written run directory and wait for all of them.

    Raises:
        RankError: with the error of the rank that failed first.
        Stopped: if a signal came; all ranks have ended by then.
    """
    # torch takes 2 s to import, which planning and --help need not pay
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # What it would say on a terminal, we say: which rank failed, why, and where its log is. Each
    # of its loggers has a level of its own.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    variables = [f"{key}={value}" for key, value in worker_environment(run).items()]
    module = [sys.executable, "-u", "-m", "llama_pretrain.train.worker", str(run_dir.path)]
    words = [*variables, *module, *([] if checkpoint is None else [str(checkpoint)])]
    with tempfile.TemporaryDirectory() as early_logs, _own_signal_handlers():
        config = _launch_config(run, run_dir, early_logs=early_logs)
        try:
            # `env` sets the ranks' environment without touching ours, and becomes the worker
            elastic_launch(config, "env")(*words)
        except ChildFailedError as error:
            raise _first_failure(error, run_dir, early_logs=Path(early_logs)) from error
        except SignalException as error:
            # An Exception to Hydra, which would go on with the next job of a sweep.
            raise Stopped(error.sigval) from error


def _launch_config(run: Run, run_dir: RunDir, *, early_logs: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=run.launch.num_processes,
        run_id=run_dir.path.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the host's own name may not resolve
        max_restarts=0,
        monitor_interval=0.1,
        # What a rank says before it has opened its own log, which is next to nothing.
        logs_specs=DefaultLogsSpecs(log_dir=early_logs, redirects=Std.ALL),
    )


def _first_failure(error: Any, run_dir: RunDir, *, early_logs: Path) -> RankError:
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", message)
    text = str(message)
    if failure.exitcode < 0:
        text = f"ended by {signal.Signals(-failure.exitcode).name}"
        if failure.exitcode == -signal.SIGKILL:
            text += " (by hand, or by the system for want of memory)"
    elif not run_dir.rank_log(rank).exists():
        early = [path.read_text(errors="replace") for path in early_logs.rglob("stderr.log")]
        text = "\n".join(content[-2000:] for content in early)
    return RankError(rank=rank, error=text, log=run_dir.rank_log(rank))


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """The agent leaves its signal handlers installed: put ours back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
