"""What starts the ranks of a launch and waits for them: forked ranks, or torch's elastic agent."""

import threading
from abc import abstractmethod

from llama_pretrain.launch.failures import Failure
from llama_pretrain.process import kill_session

WORKER = "llama_pretrain.train.worker"
POLL_S = 0.1


class Supervisor(threading.Thread):
    """Starts ranks and waits until all have ended.

    It is a thread of its own, which receives no signals: the main thread decides what they mean.
    """

    def __init__(self) -> None:
        super().__init__(name="supervisor", daemon=True)
        self.failures: dict[int, Failure] = {}
        """By rank."""
        self.error: BaseException | None = None
        """Why the ranks could not be supervised."""

    @abstractmethod
    def pids(self) -> list[int]:
        """The process ids of ranks that have not ended, with or without a heartbeat."""

    @abstractmethod
    def supervise(self) -> None:
        """Start the ranks, wait for them, and fill `failures`."""

    def run(self) -> None:
        """Supervise, and leave no rank when that fails."""
        try:
            self.supervise()
        except BaseException as error:
            self.error = error
            for pid in self.pids():
                kill_session(pid)
