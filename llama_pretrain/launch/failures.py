"""How ranks failed, and which failure caused the others."""

import json
import re
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.advice import advise_memory, is_out_of_memory, may_be_out_of_memory

LOST_PEER = re.compile(
    "Connection (closed|reset) by peer|Broken pipe|Socket closed|Timed out waiting"
    "|remote (process exited|error)"
)
"""What gloo and NCCL report in a rank whose peer has died."""


@dataclass(frozen=True)
class Failure:
    """The exit of a rank that failed."""

    exitcode: int
    """Less than 0: the signal that killed it."""
    timestamp: int
    """Seconds since 1970."""
    text: str = ""
    """The error that it wrote down; empty if it could not."""
    suspicion: Sequence[int] | None = None
    """Of a rank that its node found hanging: as `suspect` has it."""

    @classmethod
    def of(cls, exitcode: int, error_file: Path) -> "Failure":
        """Read the file that torch's `record` may have written, without importing torch."""
        try:
            written = json.loads(error_file.read_text(encoding="utf-8"))["message"]
            timestamp = int(written["extraInfo"]["timestamp"])
            return cls(exitcode, timestamp, str(written["message"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(exitcode, int(time.time()))


def describe(
    failure: Failure, rank: int, spec: LaunchSpec, *, stopping: bool, node: str = ""
) -> RankError:
    """Turn the failure of a rank into the error of its run.

    Args:
        stopping: whether a signal had asked the run to stop.
        node: names its node, if there are several.
    """
    text, code, log = failure.text, failure.exitcode, spec.run_dir.rank_log(rank)
    advice = ""
    if code < 0:
        text = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            text += " (by hand, or by the OOM killer)"
            advice = advise_memory(spec.run, spec.plan)
    elif not text and log.exists():  # it could not write its error down
        lines = log.read_text(errors="replace").splitlines()
        text = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    text = text or f"exit code {code}"
    if is_out_of_memory(text):
        advice = advise_memory(spec.run, spec.plan)
    elif may_be_out_of_memory(text):
        advice = advise_memory(spec.run, spec.plan, certain=False)
    return RankError(rank=rank, error=text, log=log, advice=advice, stopping=stopping, node=node)


def find_first(failures: Mapping[int, Failure], *, killed: Collection[int]) -> int:
    """Find the rank whose failure no other rank caused; `killed` were killed because of it.

    Times alone do not tell: they are in seconds, and that of a killed rank is when its death was
    noticed.
    """

    def order(rank: int) -> tuple[int, int, int]:
        failure = failures[rank]
        by_us = failure.exitcode == -signal.SIGKILL and rank in killed
        if by_us or failure.exitcode == -signal.SIGTERM:
            likely_caused = 3
        elif LOST_PEER.search(failure.text):
            likely_caused = 2
        else:  # gloo's threads abort when they lose a peer
            likely_caused = int(failure.exitcode == -signal.SIGABRT)
        return likely_caused, failure.timestamp, rank

    return min(failures, key=order)
