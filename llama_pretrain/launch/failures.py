"""How ranks have failed, and which failure caused the others."""

import json
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.run import Run
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.advice import advise_memory, is_out_of_memory, may_be_out_of_memory
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir

LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "remote process exited",
    "remote error",
)
"""What gloo and NCCL say in a rank whose neighbour has died."""


@dataclass(frozen=True)
class Failure:
    """The end of a rank that failed."""

    exitcode: int
    """Less than 0: the signal that ended it."""
    timestamp: int
    """Seconds since 1970."""
    text: str = ""
    """What it wrote down of its error; empty if it could not."""

    @classmethod
    def of(cls, exitcode: int, error_file: Path) -> "Failure":
        """That of a rank that has ended; torch's `record` may have written the file before.

        torch reads it too, but takes seconds to import, which whoever waits for the error needn't.
        """
        try:
            written = json.loads(error_file.read_text(encoding="utf-8"))["message"]
            timestamp = int(written["extraInfo"]["timestamp"])
            return cls(exitcode, timestamp, str(written["message"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(exitcode, int(time.time()))


def describe_failure(
    failures: Mapping[int, Failure],
    run: Run,
    plan: Plan,
    run_dir: RunDir,
    *,
    killed: Collection[int],
    stopping: bool,
    early_logs: Path,
) -> RankError:
    """The failure that caused the others.

    Args:
        failures: by rank.
        killed: ranks that were ended because another had failed.
        stopping: whether a signal had asked the run to end.
    """
    rank = find_first(failures, killed=killed)
    text, code, log = failures[rank].text, failures[rank].exitcode, run_dir.rank_log(rank)
    advice = ""
    if code < 0:
        text = f"ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            text += " (by hand, or by the system for want of memory)"
            advice = advise_memory(run, plan)
    elif not log.exists():
        early = [path.read_text(errors="replace") for path in early_logs.rglob("stderr.log")]
        text = "\n".join(content[-2000:] for content in early)
    elif not text:  # it could not write its error down
        lines = log.read_text(errors="replace").splitlines()
        text = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    if is_out_of_memory(text):
        advice = advise_memory(run, plan)
    elif may_be_out_of_memory(text):
        advice = advise_memory(run, plan, certain=False)
    return RankError(rank=rank, error=text, log=log, advice=advice, stopping=stopping)


def find_first(failures: Mapping[int, Failure], *, killed: Collection[int]) -> int:
    """The rank whose failure is not for want of another.

    Times don't tell: they are in seconds, and of a killed rank it is the time when that was
    noticed.
    """

    def order(rank: int) -> tuple[int, int, int]:
        failure = failures[rank]
        degree = 0
        if failure.exitcode == -signal.SIGABRT:  # gloo's threads abort where a neighbour is lost
            degree = 1
        if any(text in failure.text for text in LOST_PEER):
            degree = 2
        if failure.exitcode == -signal.SIGTERM or (
            failure.exitcode == -signal.SIGKILL and rank in killed
        ):
            degree = 3
        return degree, failure.timestamp, rank

    return min(failures, key=order)
