"""How a command ends: expected errors as lines, signals as codes, bugs as tracebacks."""

from collections.abc import Sequence
from types import FrameType

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llama_pretrain.config.compose import explain
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.launch.local import RankError, Stopped

EXPECTED = (UserError, RankError)


def stop(number: int, _frame: FrameType | None) -> None:
    """A signal handler: end as Ctrl-C does, with every status written."""
    raise Stopped(number)


def tell(error: Exception) -> None:
    """Print an expected error."""
    from llama_pretrain import console

    if isinstance(error, UserError):
        console.show_problems(error.problems)
    else:
        console.show_failure(str(error))


def end(error: BaseException, argv: Sequence[str], *, composing: bool) -> int:
    """Tell how it ended. Returns the exit code; raises what nobody expected.

    Args:
        composing: whether Hydra was still composing the config: then any error is the config's.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        from llama_pretrain import console

        console.show_failure("stopped; all ranks have ended")
        return 128 + (error.number if isinstance(error, Stopped) else 2)
    if isinstance(error, EXPECTED):
        tell(error)
        return 1
    if isinstance(error, (HydraException, OmegaConfBaseException)) or composing:
        tell(UserError(_all_problems(error, argv)))
        return 1
    raise error


def _all_problems(error: BaseException, argv: Sequence[str]) -> list[Problem]:
    from llama_pretrain.plan.machine import detect_machine
    from llama_pretrain.tasks import check_everything

    problems, run = explain(argv, error)
    if run is not None:
        problems += check_everything(run, detect_machine())[1]
    return problems
