"""Launch ranks on this machine, and wait for them."""

import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.launch.failures import describe, find_first
from llama_pretrain.launch.forked import ForkSupervisor
from llama_pretrain.launch.server import start_server
from llama_pretrain.launch.signals import Preempted, receive_signals
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.supervisor import POLL_S, Supervisor
from llama_pretrain.launch.watch import Watch
from llama_pretrain.runs.metrics import EventRow, read_metrics


def preload(run: ResolvedRun) -> None:
    """Start importing what the ranks of a run need, unless they are fresh interpreters.

    Call it in the main thread, as soon as it is known that the run will be launched.
    """
    if run.launch.fork:
        start_server()


def launch(
    spec: LaunchSpec,
    *,
    report: Callable[[str], None] = print,
    poll: Callable[[], None] = lambda: None,
) -> int:
    """Start the ranks of a run directory and wait for all of them.

    The first signal asks them to finish their step and save, a second one kills them. However this
    ends, no rank is left.

    Args:
        report: prints a line to the user.
        poll: called a few times a second; what it raises ends the ranks.

    Returns:
        A signal that came when nothing was left to do but to finish; 0 for none.

    Raises:
        RankError: with the error of the rank that failed first, or of one that hangs.
        Preempted: after a signal: the ranks have saved, or had nothing to save.
        Stopped: after a second one.
    """
    run_dir = spec.run_dir
    run_dir.heartbeats.unlink(missing_ok=True)  # the ids of an earlier launch may be others' now
    preload(spec.run)
    with tempfile.TemporaryDirectory() as folder, receive_signals() as requests:
        supervisor: Supervisor
        if spec.run.launch.fork:
            supervisor = ForkSupervisor(spec, error_dir=Path(folder))
        else:
            # torch takes seconds to import, which forked ranks and plans need not pay
            from llama_pretrain.launch.elastic import ElasticSupervisor

            supervisor = ElasticSupervisor(spec, log_dir=Path(folder))
        watch = Watch(spec, requests=requests, report=report, pids=supervisor.pids)
        supervisor.start()
        try:
            while supervisor.is_alive():
                supervisor.join(POLL_S)
                watch.check()
                poll()
        finally:
            while supervisor.is_alive():  # it ends when all ranks have
                watch.kill()
                supervisor.join(POLL_S)
        if supervisor.failures:
            cause = find_first(supervisor.failures, killed=watch.killed)
            failure, stopping = supervisor.failures[cause], watch.signal > 0
            raise describe(failure, cause, spec, stopping=stopping, early_logs=Path(folder))
    if supervisor.error is not None:
        raise supervisor.error
    last = read_metrics(run_dir.metrics)[-1]  # ranks that succeed have written one
    if isinstance(last, EventRow) and last.preempted:
        raise Preempted(watch.signal or signal.Signals[last.preempted])
    if watch.signal and not getattr(last, "finished", False):
        raise Preempted(watch.signal)
    return watch.signal
