"""The stacks that faulthandler writes into ranks' logs, and which rank the others wait for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/")
"""A stack with such a file waits for other ranks."""
WAITING = "llama_pretrain/distributed.py"
"""So does one in here: on a GPU a collective returns at once, and its result is waited for."""


@dataclass(frozen=True)
class Frame:
    """A line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        short = "/".join(self.file.split("/")[-2:])
        return f"{short}:{self.line} {self.function}"


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What is known of a rank of which nothing was heard."""

    rank: int
    count: int
    """Its beats."""
    stacks: Sequence[Sequence[Frame]]
    """Of its threads, the main one last, each innermost first; empty where it wrote none: it could
    not even do that, because it is stopped, or deep in the system."""

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks, in whatever thread: autograd has its own."""
        return any(
            frame.file.endswith(WAITING) or any(part in frame.file for part in COLLECTIVES)
            for stack in self.stacks
            for frame in stack
        )


def read_stacks(text: str) -> list[list[Frame]]:
    """The threads in what faulthandler has written: the newest first, the main one last."""
    stacks: list[list[Frame]] = []
    for line in text.splitlines():
        if line.endswith("(most recent call first):"):
            stacks.append([])
        elif stacks and (match := FRAME.fullmatch(line)):
            stacks[-1].append(Frame(match[1], int(match[2]), match[3]))
    return stacks


def find_hanging(states: Sequence[RankState]) -> RankState:
    """The rank that the others wait for: one that could write no stack, else the one that has come
    the least far, else one that waits for nobody."""
    return min(states, key=lambda state: (bool(state.stacks), state.count, state.waits, state.rank))


def describe_stack(frames: Sequence[Frame], *, limit: int = 4) -> str:
    """The innermost frames in one line, and the innermost of ours."""
    shown = list(frames[:limit])
    ours = [frame for frame in frames if "llama_pretrain" in frame.file]
    if ours and ours[0] not in shown:
        shown.append(ours[0])
    return " < ".join(str(frame) for frame in shown)
