"""How a command ends: expected errors as lines, signals as exit codes, bugs as tracebacks."""

import errno

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llama_pretrain import console
from llama_pretrain.config.compose import describe_compose_error
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.launch.signals import PREEMPTED_CODE, Detached, Preempted, Requests, Stopped
from llama_pretrain.launch.slurm import requeue
from llama_pretrain.launch.watch import NodeError, RankError
from llama_pretrain.runs.agreement import DivergedError
from llama_pretrain.tasks.pretrain import UnsavedError
from llama_pretrain.tasks.submit import JobError

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM,
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL,
)  # fmt: skip
"""Of a file of the run that cannot be written or is something else."""
EXPECTED = (UserError, NodeError, RankError, DivergedError, UnsavedError, JobError)


def print_error(error: Exception) -> None:
    """Print an expected error."""
    if isinstance(error, UserError):
        console.show_problems(error.problems)
    else:
        console.show_failure(str(error))


def finish(error: BaseException, *, requests: Requests, swept: int) -> int:
    """Print why a command ended. Returns the exit code; raises what is unexpected.

    Args:
        requests: signals that arrived; a library may have turned one into its own error.
        swept: the exit code of the sweep that was interrupted; 0 if there was none.
    """
    if isinstance(error, Detached):
        console.show_failure("\n".join([str(error), *getattr(error, "__notes__", [])]))
        return 128 + error.number
    if requests.numbers and not isinstance(error, (Preempted, Stopped)):
        error = Preempted(requests.numbers[0])
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    if isinstance(error, (Preempted, Stopped)):
        lines = [f"{error}; all processes have ended", *getattr(error, "__notes__", [])]
        console.show_failure("\n".join(lines))
        requeue(error.number)
        return PREEMPTED_CODE if isinstance(error, Preempted) else 128 + error.number
    if isinstance(error, EXPECTED):
        print_error(error)
        return 1
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        console.show_failure(f"{error.strerror}: {error.filename or 'a file of the run'}")
        return 1
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        message = describe_compose_error(error)
        print_error(UserError([Problem(path="", message=message)]))
        return 1
    if swept and isinstance(error, Exception):  # a sweeper without a single result
        console.show_failure(f"{type(error).__name__}: {error}")
        return swept
    raise error
