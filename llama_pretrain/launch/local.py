"""Ranks on this machine: of fresh interpreters through torch's elastic agent, or forked."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_pretrain.config.run import Run
from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.launch.failures import Failure, describe_failure
from llama_pretrain.launch.forks import ForkAgent, ForkServers, ServerError, can_fork
from llama_pretrain.launch.signals import Preempted, receive_signals
from llama_pretrain.launch.watch import RankError, Watch
from llama_pretrain.plan.plan import Plan
from llama_pretrain.process import PARENT, PROC, list_processes
from llama_pretrain.runs.layout import RunDir

WORKER = "llama_pretrain.train.worker"
LOOK_EVERY_S = 0.1


def launch(
    run: Run,
    plan: Plan,
    run_dir: RunDir,
    *,
    checkpoint: Path | None,
    report: Callable[[str], None] = print,
    forks: ForkServers | None = None,
    look: Callable[[], None] = lambda: None,
) -> int:
    """Start the ranks of a written run directory and wait for all of them.

    The first signal asks them to finish their step and save, a second one ends them at once.
    However this ends, no rank is left.

    Args:
        report: for a line to the user.
        forks: ranks are forked from these where they are to be; `None` = fresh interpreters.
        look: called a few times a second; what it raises ends the ranks.

    Returns:
        A signal that came when there was nothing left to do before the end; 0 for none.

    Raises:
        RankError: with the error of the rank that failed first, or of one that hangs.
        Preempted: after a signal: the ranks have saved, or had nothing to save.
        Stopped: after a second one.
    """
    seen = run_dir.metrics.stat().st_size if run_dir.metrics.is_file() else 0
    run_dir.heartbeats.unlink(missing_ok=True)  # of an earlier launch: its ids may be others' now
    with tempfile.TemporaryDirectory() as early_logs, receive_signals() as requests:
        words = [str(run_dir.path), *([] if checkpoint is None else [str(checkpoint)])]
        agent: Agent | ForkAgent
        if forks is None or not can_fork(run):
            agent = Agent(run, run_dir, words=words, early_logs=early_logs)
        else:
            server = forks.of_environment(worker_environment(run))
            size = plan.world_size
            agent = ForkAgent(server, words=words, world_size=size, early_logs=Path(early_logs))
        watch = Watch(
            run_dir,
            world_size=plan.world_size,
            timeout_s=run.launch.timeout_s,
            requests=requests,
            report=report,
            workers=agent.workers,
        )
        agent.start()
        try:
            while agent.is_alive():
                agent.join(LOOK_EVERY_S)
                watch.look()
                look()
        finally:
            while agent.is_alive():  # it ends when all ranks have
                watch.kill()
                agent.join(LOOK_EVERY_S)
        if agent.failures:
            raise describe_failure(
                agent.failures,
                run,
                plan,
                run_dir,
                killed=watch.killed,
                stopping=watch.signal > 0,
                early_logs=Path(early_logs),
            )
        if isinstance(agent.error, ServerError):  # its ranks have ended with it
            log = run_dir.rank_log(0)
            stopping = watch.signal > 0
            raise RankError(rank=0, error=str(agent.error), log=log, stopping=stopping)
        if agent.error is not None:
            raise agent.error
        ending = _last_row(run_dir.metrics, since=seen)
        if "preempted" in ending:
            raise Preempted(watch.signal or signal.Signals[ending["preempted"]])
        if watch.signal and "finished" not in ending:
            raise Preempted(watch.signal)
        return watch.signal


class Agent(threading.Thread):
    """torch's elastic agent in a thread, where it takes no signal: what they mean, we decide.

    A rank dies with the thread that started it (PR_SET_PDEATHSIG), so the thread outlives them.
    """

    def __init__(self, run: Run, run_dir: RunDir, *, words: Sequence[str], early_logs: str):
        super().__init__(name="agent", daemon=True)
        self.failures: dict[int, Failure] = {}
        """Of ranks, by number."""
        self.error: BaseException | None = None
        """Of the agent itself."""
        self._config = _launch_config(run, run_dir, early_logs=early_logs)
        variables = [f"{key}={value}" for key, value in worker_environment(run).items()]
        variables.append(f"{PARENT}={os.getpid()}")
        self._words = [*variables, sys.executable, "-u", "-m", WORKER, *words]

    def run(self) -> None:
        """Start the ranks, and wait for them."""
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch

        # What it would say on a terminal, we say: which rank failed, why, and where its log is.
        # Each of its loggers has a level of its own.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            # `env` sets the ranks' environment without touching ours, and becomes the worker
            elastic_launch(self._config, "env")(*self._words)
        except ChildFailedError as error:
            for rank, found in error.failures.items():
                self.failures[rank] = Failure.of(found.exitcode, Path(found.error_file))
        except BaseException as error:
            self.error = error

    def workers(self) -> list[int]:
        """The ids of the ranks, those that have not registered yet too."""
        found = []
        for process in list_processes():
            if process.parent == os.getpid():
                with contextlib.suppress(OSError):
                    if WORKER.encode() in (PROC / str(process.pid) / "cmdline").read_bytes():
                        found.append(process.pid)
        return found


def _launch_config(run: Run, run_dir: RunDir, *, early_logs: str) -> Any:
    # torch takes 2 s to import, which planning and --help need not pay
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
        monitor_interval=LOOK_EVERY_S,
        # What a rank says before it has opened its own log, which is next to nothing.
        logs_specs=DefaultLogsSpecs(log_dir=early_logs, redirects=Std.ALL),
    )


def _last_row(metrics: Path, *, since: int) -> dict[str, Any]:
    """The last line that this launch has written; empty if none."""
    if not metrics.is_file():
        return {}
    with metrics.open("rb") as file:
        file.seek(since)
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return dict(json.loads(whole[-1])) if whole else {}
