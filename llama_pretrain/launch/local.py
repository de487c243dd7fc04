"""Launch the ranks of this machine, and wait for them and for those of other nodes."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.launch.failures import Failure, describe, find_first
from llama_pretrain.launch.forked import POLL_S, Supervisor
from llama_pretrain.launch.server import start_server
from llama_pretrain.launch.signals import Preempted, Requests, receive_signals
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.watch import LAST_WORDS_S, RankError, Watch
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EventRow, read_metrics

LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


class OtherNodes(Protocol):
    """What node 0 needs of the other nodes (launch/group.py, which imports torch)."""

    def begin(self, spec: LaunchSpec, requests: Requests) -> LaunchSpec:
        """Start an attempt on all nodes, or on enough. Returns the launch of this one."""

    def have_returned(self) -> bool:
        """Whether a node could take part again that an attempt began without."""

    def have_failed(self) -> bool:
        """Whether a rank of theirs has failed, or one of them is lost."""

    def end(self, *, hanging: bool = False) -> tuple[dict[int, Failure], set[int]]:
        """End the attempt. Returns failures, and ranks that were killed because of others."""

    def name_of_rank(self, rank: int) -> str:
        """The node of a rank, by its index, host name and ranks."""


class NodesReturnedError(Exception):
    """The ranks have saved, so that nodes which are back can take part again."""


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Import torch without its warnings in C++, as of each host whose address has no name."""
    before = os.environ.get(LOG_LEVEL)
    os.environ[LOG_LEVEL] = before or "ERROR"
    try:
        yield
    finally:
        if before is None:  # ranks are to log as they would
            del os.environ[LOG_LEVEL]


def other_nodes(
    run: ResolvedRun,
    run_dir: RunDir,
    *,
    report: Callable[[str], None],
    replan: Callable[[int], tuple[ResolvedRun, TrainingPlan]],
) -> AbstractContextManager[OtherNodes | None]:
    """The other nodes of a run while it trains; `None` if there are none.

    Args:
        replan: plans the run for fewer nodes, and writes its directory for them.
    """
    if run.launch.nodes == 1:
        return nullcontext()
    with quiet_torch():  # it takes seconds to import, which a run on one node need not pay
        from llama_pretrain.launch.group import open_group

    return open_group(run, run_dir, report=report, replan=replan)


def preload(run: ResolvedRun) -> None:
    """Start importing what the ranks of a run need, unless they are fresh interpreters.

    Call it in the main thread, as soon as it is known that the run will be launched.
    """
    start_server(libraries=run.launch.fork)


def launch(
    spec: LaunchSpec,
    *,
    report: Callable[[str], None] = print,
    poll: Callable[[], None] = lambda: None,
    others: OtherNodes | None = None,
) -> int:
    """Start the ranks of a run directory and wait for all of them.

    The first signal asks them to finish their step and save, a second one kills them. However this
    ends, no rank is left.

    Args:
        report: prints a line to the user.
        poll: called a few times a second; what it raises ends the ranks.
        others: the other nodes of the run.

    Returns:
        A signal that came when nothing was left to do but to finish; 0 for none.

    Raises:
        RankError: with the error of the rank that failed first, or of one that hangs.
        Preempted: after a signal: the ranks have saved, or had nothing to save.
        NodesReturnedError: after a save, if more nodes can take part than did.
        Stopped: after a second one.
    """
    run_dir = spec.run_dir
    run_dir.heartbeats().unlink(missing_ok=True)  # the ids of an earlier launch may be others' now
    preload(spec.run)
    with tempfile.TemporaryDirectory() as folder, receive_signals() as requests:
        if others is not None:
            spec = others.begin(spec, requests)
        supervisor = Supervisor(spec, error_dir=Path(folder))
        watch = Watch(spec, requests=requests, report=report, pids=supervisor.pids)
        supervisor.start()
        theirs, killed = dict[int, Failure](), set[int]()
        failed_at: float | None = None
        returned = False
        hang: RankError | None = None
        try:
            while supervisor.is_alive():
                supervisor.join(POLL_S)
                watch.check()
                poll()
                if others is not None and failed_at is None and others.have_failed():
                    failed_at = time.monotonic()
                if others is not None and not returned and others.have_returned():
                    returned = watch.stop_ranks()
                if failed_at is not None and time.monotonic() - failed_at > LAST_WORDS_S:
                    watch.kill()
        except RankError as error:
            hang = error
            if others is not None:  # before ranks are killed for which those of others wait
                theirs, killed = others.end(hanging=True)
        finally:
            while supervisor.is_alive():  # it ends when all ranks have
                watch.kill()
                supervisor.join(POLL_S)
            if others is not None and hang is None:
                theirs, killed = others.end()
        stopping = watch.signal > 0
        if hang is not None:
            raise _find_hanging(hang, theirs, spec, others=others, stopping=stopping)
        if supervisor.failures or failed_at is not None:
            failures = supervisor.failures | theirs
            rank = find_first(failures, killed=watch.killed | killed)
            node = "" if others is None else others.name_of_rank(rank)
            raise describe(failures[rank], rank, spec, stopping=stopping, node=node)
    if supervisor.error is not None:
        raise supervisor.error
    last = read_metrics(run_dir.metrics)[-1]  # ranks that succeed have written one
    if returned and not watch.signal and not getattr(last, "finished", False):
        raise NodesReturnedError
    if isinstance(last, EventRow) and last.preempted:
        raise Preempted(watch.signal or signal.Signals[last.preempted])
    if watch.signal and not getattr(last, "finished", False):
        raise Preempted(watch.signal)
    return watch.signal


def _find_hanging(
    ours: RankError,
    theirs: Mapping[int, Failure],
    spec: LaunchSpec,
    *,
    others: OtherNodes | None,
    stopping: bool,
) -> RankError:
    """The error of the rank for which all others wait: the most suspect one of any node."""
    found = {rank: tuple(each.suspicion) for rank, each in theirs.items() if each.suspicion}
    rank = min(found, key=lambda rank: found[rank], default=ours.rank)
    if rank == ours.rank or tuple(ours.suspicion or ()) <= found[rank]:
        return ours
    log, node = spec.run_dir.rank_log(rank), "" if others is None else others.name_of_rank(rank)
    return RankError(rank=rank, error=theirs[rank].text, log=log, stopping=stopping, node=node)
