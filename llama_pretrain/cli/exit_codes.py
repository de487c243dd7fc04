"""How a command ends: expected errors as lines, signals as codes, bugs as tracebacks."""

from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llama_pretrain.config.compose import explain
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.launch.signals import PREEMPTED_CODE, Preempted, Requests, Stopped
from llama_pretrain.launch.watch import RankError
from llama_pretrain.runs.agreement import DivergedError

EXPECTED = (UserError, RankError, DivergedError)


def tell(error: Exception) -> None:
    """Print an expected error."""
    from llama_pretrain import console

    if isinstance(error, UserError):
        console.show_problems(error.problems)
    else:
        console.show_failure(str(error))


def end(error: BaseException, argv: Sequence[str], *, composing: bool, requests: Requests) -> int:
    """Tell how it ended. Returns the exit code; raises what nobody expected.

    Args:
        composing: whether Hydra was still composing the config: then any error is the config's.
        requests: signals that have come; what a library made of one is no error of its own.
    """
    if requests.numbers and not isinstance(error, (Preempted, Stopped)):
        error = Preempted(requests.numbers[0])
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    if isinstance(error, (Preempted, Stopped)):
        from llama_pretrain import console

        lines = [f"{error}; all processes have ended", *getattr(error, "__notes__", [])]
        console.show_failure("\n".join(lines))
        return PREEMPTED_CODE if isinstance(error, Preempted) else 128 + error.number
    if isinstance(error, EXPECTED):
        tell(error)
        return 1
    if isinstance(error, (HydraException, OmegaConfBaseException)) or composing:
        tell(UserError(_all_problems(error, argv)))
        return 1
    raise error


def _all_problems(error: BaseException, argv: Sequence[str]) -> list[Problem]:
    from llama_pretrain.plan.machine import detect_machine
    from llama_pretrain.tasks.run import check_everything

    problems, run = explain(argv, error)
    if run is not None:
        problems += check_everything(run, detect_machine())[1]
    return problems
