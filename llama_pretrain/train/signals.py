"""A rank's signals: a request to stop is remembered, and read where all ranks can agree on it."""

import ctypes
import faulthandler
import os
import signal
import sys
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
DUMP = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads to its log, even from within a collective."""
PARENT = "LLAMA_PRETRAIN_PARENT"
"""The environment variable with the launcher's process id."""


class StopRequest:
    """Whether this rank has been asked to finish its step, save, and end."""

    def __init__(self) -> None:
        self.number = 0
        """The signal; 0 for none."""

    def install(self) -> None:
        """Catch the signals from here on."""
        for number in STOPPING:
            signal.signal(number, self._remember)
        faulthandler.register(DUMP, all_threads=True)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.number = number


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Get a signal when the launcher dies, however it dies (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, number)  # PR_SET_PDEATHSIG
    parent = os.environ.get(PARENT)
    if parent is not None and int(parent) != os.getppid():  # it was gone before we asked
        os._exit(1)
