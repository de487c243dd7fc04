"""The stacks that faulthandler writes into ranks' logs, and which rank the others wait for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
WAITING = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/", "llama_pretrain/distributed")
"""Files in the stack of a rank that waits for others. Our own is one of them: on a GPU a collective
returns at once, and the wait is for its result."""


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{'/'.join(self.file.split('/')[-2:])}:{self.line} {self.function}"


Stacks = Sequence[Sequence[Frame]]
"""Of the threads of a rank, the main thread last, each innermost frame first."""


def read_stacks(text: str) -> list[list[Frame]]:
    """Parse what faulthandler has written: the newest thread first, the main thread last."""
    stacks: list[list[Frame]] = []
    for line in text.splitlines():
        if line.endswith("(most recent call first):"):
            stacks.append([])
        elif stacks and (match := FRAME.fullmatch(line)):
            stacks[-1].append(Frame(match[1], int(match[2]), match[3]))
    return stacks


Suspicion = tuple[bool, int, bool]
"""What tells a rank that hangs from those that wait for it: the least does."""


def suspect(stacks: Stacks, count: int) -> Suspicion:
    """Order ranks: first one that could write no stack, because it is stopped or blocked in a
    system call, then the one with the fewest heartbeats, then one of which no thread waits for
    other ranks.

    Args:
        count: its heartbeats.
    """
    files = [frame.file for stack in stacks for frame in stack]
    waits = any(name in file for file in files for name in WAITING)  # autograd has own threads
    return bool(stacks), count, waits


def find_hanging(stacks: Mapping[int, Stacks], counts: Sequence[int]) -> int:
    """Find the rank that the others wait for.

    Args:
        stacks: by rank, without those that have done their work.
        counts: the heartbeats of every rank.
    """
    return min(stacks, key=lambda rank: (suspect(stacks[rank], counts[rank]), rank))


def describe_stack(frames: Sequence[Frame], *, limit: int = 4) -> str:
    """The innermost frames in one line, and the innermost frame of this package."""
    shown = list(frames[:limit])
    ours = [frame for frame in frames if "llama_pretrain" in frame.file]
    if ours and ours[0] not in shown:
        shown.append(ours[0])
    return " < ".join(str(frame) for frame in shown)
