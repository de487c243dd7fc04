"""The parent's watch over the ranks of one launch: signals passed on, the dead and the hanging."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llama_pretrain.launch.signals import Preempted, Requests, Stopped
from llama_pretrain.launch.stacks import RankState, describe_stack, find_hanging, read_stacks
from llama_pretrain.process import DUMP, STARTED, Beat, is_alive, kill_session, read_beats
from llama_pretrain.runs.layout import RunDir

LAST_WORDS_S = 1.0
"""What the others have when a rank has ended with an error, to write down their own."""
DUMP_S = 2.0
"""What ranks have to write their stacks."""


class RankError(Exception):
    """A rank ended with an error, or hung; the others were ended."""

    def __init__(
        self, *, rank: int, error: str, log: Path, advice: str = "", stopping: bool = False
    ):
        self.rank, self.error, self.log = rank, error, log
        lasting = ("NonFiniteError", "CheckpointError")
        self.may_pass = not stopping and not error.startswith(lasting)
        """Whether the run should be tried again: not where the same would happen, nor where a
        signal had asked it to end."""
        text = f"rank {rank} failed: {error}\n  its log: {log}"
        super().__init__(f"{text}\n{advice}" if advice else text)


class Watch:
    """Looks after the ranks of one launch."""

    def __init__(
        self,
        run_dir: RunDir,
        *,
        world_size: int,
        timeout_s: int,
        requests: Requests,
        report: Callable[[str], None],
        workers: Callable[[], Iterable[int]] = tuple,
    ):
        self._run_dir, self._world_size, self._timeout_s = run_dir, world_size, timeout_s
        self._requests, self._report, self._workers = requests, report, workers
        self._began = time.monotonic()
        self._asked: set[int] = set()
        self._first_death: float | None = None
        self.killed: set[int] = set()
        """Ranks that this process has ended, or that it found alive when it ended the others."""

    @property
    def signal(self) -> int:
        """The signal that asked the run to end; 0 for none."""
        return self._requests.numbers[0] if self._requests.numbers else 0

    def look(self) -> None:
        """Do what is due. Whoever calls it ends the ranks when it raises.

        Raises:
            Stopped: after a second signal.
            Preempted: after a first one, where nothing has been trained yet.
            RankError: if a rank hangs.
        """
        beats = read_beats(self._run_dir.heartbeats, world_size=self._world_size)
        if self.signal:
            self._ask_to_stop(beats)
        dead = [
            rank
            for rank, beat in enumerate(beats)
            if beat.pid and not beat.finished and not is_alive(beat.pid)
        ]
        if dead:
            now = time.monotonic()
            self._first_death = self._first_death or now
            # The agent would wait half a minute for ranks that wait for the dead one.
            if now - self._first_death > LAST_WORDS_S:
                self.kill()
        else:
            self._look_for_hang(beats)

    def _ask_to_stop(self, beats: Sequence[Beat]) -> None:
        name = signal.Signals(self.signal).name
        if len(self._requests.numbers) > 1:
            raise Stopped(self._requests.numbers[-1])
        if not self._asked:
            if max(beat.count for beat in beats) <= STARTED:
                self._report(f"{name}: leaving; no step has been begun")
                raise Preempted(self.signal)
            self._report(
                f"{name}: finishing the step and writing a checkpoint; once more to leave at once"
            )
        for beat in beats:  # a rank registers when its handlers are there
            if beat.pid and beat.pid not in self._asked:
                self._asked.add(beat.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, self.signal)

    def _look_for_hang(self, beats: Sequence[Beat]) -> None:
        now = time.monotonic()
        silence = [now - (beat.at if beat.pid else self._began) for beat in beats]
        if max(silence) <= self._timeout_s:
            return
        absent = [rank for rank, beat in enumerate(beats) if not beat.pid]
        if absent:
            error = f"it did not begin within {self._timeout_s} s (launch.timeout_s)"
            log = self._run_dir.rank_log(absent[0])
            raise RankError(rank=absent[0], error=error, log=log, stopping=self.signal > 0)
        states = self._ask_for_stacks(beats)
        hanging = find_hanging(states)
        where = "it wrote no stack: it is stopped, or stuck in the system"
        if hanging.stacks:
            where = f"it is in {describe_stack(hanging.stacks[-1])}"
        raise RankError(
            rank=hanging.rank,
            error=f"nothing was heard of it for {silence[hanging.rank]:.0f} s"
            f" (launch.timeout_s={self._timeout_s}); {where}\n  stacks of all ranks are at the end"
            f" of {self._run_dir.ranks}/rank*.log",
            log=self._run_dir.rank_log(hanging.rank),
            stopping=self.signal > 0,
        )

    def _ask_for_stacks(self, beats: Sequence[Beat]) -> list[RankState]:
        logs = [self._run_dir.rank_log(rank) for rank in range(len(beats))]
        sizes = [log.stat().st_size for log in logs]
        for beat in beats:
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, DUMP)
        time.sleep(DUMP_S)
        states = []
        for rank, (beat, log, size) in enumerate(zip(beats, logs, sizes, strict=True)):
            with log.open("rb") as file:
                file.seek(size)
                text = file.read().decode(errors="replace")
            if not beat.finished:
                states.append(RankState(rank=rank, count=beat.count, stacks=read_stacks(text)))
        return states

    def kill(self) -> None:
        """End all ranks at once, and what they have started."""
        beats = read_beats(self._run_dir.heartbeats, world_size=self._world_size)
        self.killed |= {rank for rank, beat in enumerate(beats) if beat.pid and is_alive(beat.pid)}
        for pid in {beat.pid for beat in beats if beat.pid} | set(self._workers()):
            kill_session(pid)  # each rank leads a session of its own
