"""The parent's watch over the ranks of a launch: forwards signals, finds dead and hanging ranks."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llama_pretrain.launch.signals import Preempted, Requests, Stopped
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.stacks import (
    Stacks,
    Suspicion,
    describe_stack,
    find_hanging,
    read_stacks,
    suspect,
)
from llama_pretrain.process import DUMP, STARTED, Beat, is_alive, kill_session, read_beats

LAST_WORDS_S = 1.0
"""What the other ranks have after a rank has died to write down their errors."""
DUMP_S = 2.0
"""What ranks have to write their stacks."""
PERMANENT = ("NonFiniteError", "CheckpointError")
"""Errors that a restart would only repeat."""


class NodeError(Exception):
    """The nodes of a run cannot train together."""


class RankError(Exception):
    """A rank failed or hung, and the others were killed."""

    def __init__(
        self,
        *,
        rank: int,
        error: str,
        log: Path,
        advice: str = "",
        stopping: bool = False,
        node: str = "",
    ):
        self.suspicion: Suspicion | None = None
        """Of a rank that hangs: as `suspect` has it."""
        self.rank, self.error, self.log = rank, error, log
        self.may_pass = not stopping and not error.startswith(PERMANENT)
        """Whether a restart may help; not when a signal had asked the run to stop."""
        where = f" on {node}" if node else ""
        text = f"rank {rank}{where} failed: {error}\n  its log: {log}"
        super().__init__(f"{text}\n{advice}" if advice else text)


class Watch:
    """Watches the ranks of one launch."""

    def __init__(
        self,
        spec: LaunchSpec,
        *,
        requests: Requests,
        report: Callable[[str], None],
        pids: Callable[[], Iterable[int]] = tuple,
    ):
        self._run_dir, self._ranks, self._node = spec.run_dir, spec.ranks, spec.place.node
        self._timeout_s = spec.run.launch.timeout_s
        self._requests, self._report, self._pids = requests, report, pids
        self._began = time.monotonic()
        self._asked: set[int] = set()
        self._first_death: float | None = None
        self.killed: set[int] = set()
        """Ranks that this process has killed, or found alive when it killed the others."""

    @property
    def signal(self) -> int:
        """The signal that asked the run to stop; 0 for none."""
        return self._requests.numbers[0] if self._requests.numbers else 0

    def check(self) -> None:
        """Act on what has happened. The caller kills the ranks when this raises.

        Raises:
            Stopped: after a second signal.
            Preempted: after the first one, when nothing has been trained yet.
            RankError: if a rank hangs.
        """
        beats = self._read_beats()
        if self.signal:
            self._ask_to_stop(beats)
        if self._requests.save:
            self._requests.save = False
            try:
                self._run_dir.request.touch()
                self._report("SIGUSR2: writing a checkpoint after this step")
            except OSError as error:  # no reason to end a run
                self._report(f"SIGUSR2: no checkpoint: {error}")
        if not any(beat.pid and not beat.finished and not is_alive(beat.pid) for beat in beats):
            self._look_for_hang(beats)
            return
        self._first_death = self._first_death or time.monotonic()
        # torch's agent would wait half a minute for ranks that wait for the dead one.
        if time.monotonic() - self._first_death > LAST_WORDS_S:
            self.kill()

    def stop_ranks(self) -> bool:
        """Have all ranks save and end, as after a signal. Returns whether they train yet."""
        beats = self._read_beats()
        if min(beat.count for beat in beats) <= STARTED:
            return False
        for beat in beats:
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGUSR1)
        return True

    def kill(self) -> None:
        """Kill all ranks, and what they have started."""
        beats = self._read_beats()
        living = zip(self._ranks, beats, strict=True)
        self.killed |= {rank for rank, beat in living if beat.pid and is_alive(beat.pid)}
        for pid in {beat.pid for beat in beats if beat.pid} | set(self._pids()):
            kill_session(pid)  # each rank leads its own session

    def _read_beats(self) -> list[Beat]:
        return read_beats(self._run_dir.heartbeats(self._node), ranks=len(self._ranks))

    def _ask_to_stop(self, beats: Sequence[Beat]) -> None:
        name = signal.Signals(self.signal).name
        if len(self._requests.numbers) > 1:
            raise Stopped(self._requests.numbers[-1])
        first = not self._asked
        if first and max(beat.count for beat in beats) <= STARTED:
            self._report(f"{name}: exiting; no step has begun")
            raise Preempted(self.signal)
        for beat in beats:  # a rank's first heartbeat comes after its handlers
            if beat.pid and beat.pid not in self._asked:
                self._asked.add(beat.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, self.signal)
        if first:
            self._report(
                f"{name}: finishing the step and writing a checkpoint; repeat it to exit at once"
            )

    def _look_for_hang(self, beats: Sequence[Beat]) -> None:
        now = time.monotonic()
        silence = [now - (beat.at if beat.pid else self._began) for beat in beats]
        if max(silence) > self._timeout_s:
            raise self.blame()

    def blame(self) -> RankError:
        """The error of the rank that most likely hangs; all write their stacks."""
        beats, now = self._read_beats(), time.monotonic()
        silence = [now - (beat.at if beat.pid else self._began) for beat in beats]
        suspicion: Suspicion = (False, 0, False)
        slot = next((slot for slot, beat in enumerate(beats) if not beat.pid), None)
        error = f"it did not start within {self._timeout_s} s (launch.timeout_s)"
        if slot is None:
            stacks = self._request_stacks(beats)
            slot = find_hanging(stacks, [beat.count for beat in beats])
            suspicion = suspect(stacks[slot], beats[slot].count)
            where = "it wrote no stack: it is stopped, or in a system call"
            if stacks[slot]:
                where = f"it is in {describe_stack(stacks[slot][-1])}"
            error = (
                f"no heartbeat for {silence[slot]:.0f} s (launch.timeout_s={self._timeout_s});"
                f" {where}\n  stacks of all ranks are at the end of {self._run_dir.ranks}/rank*.log"
            )
        rank = self._ranks[slot]
        log = self._run_dir.rank_log(rank)
        found = RankError(rank=rank, error=error, log=log, stopping=self.signal > 0)
        found.suspicion = suspicion
        return found

    def _request_stacks(self, beats: Sequence[Beat]) -> dict[int, Stacks]:
        logs = [self._run_dir.rank_log(rank) for rank in self._ranks]
        sizes = [log.stat().st_size for log in logs]
        for beat in beats:
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, DUMP)
        time.sleep(DUMP_S)
        texts = [
            log.read_bytes()[size:].decode(errors="replace")
            for log, size in zip(logs, sizes, strict=True)
        ]
        return {
            slot: read_stacks(texts[slot]) for slot, beat in enumerate(beats) if not beat.finished
        }
