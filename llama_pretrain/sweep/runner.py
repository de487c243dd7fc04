"""Running the points of a sweep: each in its own directory, whatever becomes of the others."""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from llama_pretrain.config.compose import register
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.rewrite import AUTO
from llama_pretrain.config.sweep import SweepSettings
from llama_pretrain.config.tasks import Resume
from llama_pretrain.launch.forks import ForkServers
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.machine import Machine
from llama_pretrain.runs.agreement import DivergedError
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.status import FINISHED, Status, write_status
from llama_pretrain.sweep.directory import PointRecord, SweepDir, read_row, read_state
from llama_pretrain.sweep.placing import claim_slot
from llama_pretrain.sweep.points import SweepPoint
from llama_pretrain.tasks.pretrain import BusyError, PrunedError, pretrain
from llama_pretrain.tasks.run import look_back

LOG = "console.log"
"""What a point would print if it were run alone; in its run directory."""


@dataclass(frozen=True)
class Job:
    """What runs points, in this process or in one that a launcher of Hydra's starts."""

    folder: SweepDir
    settings: SweepSettings
    machine: Machine
    """The share of the machine that a point has."""
    slots: int
    """Points at a time on this machine; 0 where others see to that."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process Hydra composes before it calls us, and needs our resolvers."""
        self.__dict__.update(state)
        register()

    def run(self, point: SweepPoint, record: PointRecord) -> float | None:
        """Run a point, unless it has finished before.

        Returns the objective; `None` where the point has failed: its status says why. A signal
        goes through.
        """
        run_dir = self.folder.point(record)
        if not has_finished(run_dir, point.snapshot):
            with (
                claim_slot(self.folder.path, self.slots, self.machine),
                told_in(run_dir.path / LOG),
            ):
                self._train(point, run_dir)
        row = read_row(self.folder, record, objective=self.settings.objective)
        objective: float | None = row["objective"]
        return objective

    def _train(self, point: SweepPoint, run_dir: RunDir) -> None:
        assert point.run is not None
        assert point.plan is not None
        start = partial(
            launch,
            forks=fork_servers(),
            look=self._watch_others(run_dir) if self.settings.prune else lambda: None,
        )
        run, plan = replace(point.run, resume=Resume(run_dir=AUTO)), point.plan
        try:
            before = look_back(
                run,
                plan,
                run_dir,
                argv=point.words,
                machine=self.machine,
                origins=point.origins,
            )
            pretrain(
                run,
                plan,
                run_dir=run_dir,
                argv=point.words,
                machine=self.machine,
                launch=start,
                reproduction=before,
            )
        except (RankError, PrunedError, BusyError, DivergedError) as error:  # its status says so
            print(error)
        except UserError as error:
            note_failure(run_dir, "; ".join(str(problem) for problem in error.problems))
        except Exception as error:  # a fault of ours in one point must not take the others
            traceback.print_exc()
            note_failure(run_dir, f"{type(error).__name__}: {error}")

    def _watch_others(self, run_dir: RunDir) -> Callable[[], None]:
        """What ends a point that has fallen behind; called while its ranks run."""
        others = [
            curve
            for other in sorted(self.folder.path.glob("*/"))
            if other != run_dir.path and read_state(RunDir(other))[0] == Status.completed
            for curve in [read_evaluations(RunDir(other))]
        ]
        seen = -1

        def look() -> None:
            nonlocal seen
            size = run_dir.metrics.stat().st_size if run_dir.metrics.is_file() else 0
            if size == seen:
                return
            seen = size
            reason = falls_behind(
                read_evaluations(run_dir), others, at_least=self.settings.prune_after
            )
            if reason:
                raise PrunedError(reason)

        return look


@contextlib.contextmanager
def told_in(path: Path) -> Iterator[None]:
    """What is printed goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


@cache
def fork_servers() -> ForkServers:
    """Of this process: they end with it."""
    return ForkServers()


def has_finished(run_dir: RunDir, snapshot: str) -> bool:
    """Whether a point has been run to its end with this very snapshot."""
    if not run_dir.snapshot.is_file() or read_state(run_dir)[0] not in FINISHED:
        return False
    return run_dir.snapshot.read_text(encoding="utf-8") == snapshot


def note_failure(run_dir: RunDir, reason: str) -> None:
    """Have a point's status say why there is no run."""
    write_status(run_dir, Status.failed, error=reason)


Curve = Sequence[tuple[int, float]]
"""(tokens, loss) of each evaluation after the first step."""


def read_evaluations(run_dir: RunDir) -> list[tuple[int, float]]:
    """A run's evaluations so far."""
    rows = read_metrics(run_dir.metrics)
    evaluated = [row for row in rows if "eval_loss" in row and row["step"]]
    return [(row["tokens"], row["eval_loss"]) for row in evaluated]


def falls_behind(curve: Curve, others: Sequence[Curve], *, at_least: int) -> str:
    """Why a point should end: the median rule, as in Vizier (doi 10.1145/3097983.3098043).

    Its best loss so far is compared with the others' best at as many tokens; those that have not
    come as far, or had not been evaluated by then, don't count.
    """
    if not curve:
        return ""
    tokens, best = curve[-1][0], min(loss for _, loss in curve)
    at_tokens = [
        min(losses)
        for other in others
        if other
        and other[-1][0] >= tokens
        and (losses := [loss for at, loss in other if at <= tokens])
    ]
    if len(at_tokens) < at_least or best <= (middle := median(at_tokens)):
        return ""
    return f"evaluation loss {best:.4f} at {tokens:,} tokens; the others' median is {middle:.4f}"
