"""Everything that can be known of a run before its data is read, checked at once."""

from llama_pretrain.checkpoint.pretrained import validate_pretrained
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.validate import validate_run
from llama_pretrain.plan.feasible import validate_machine
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import validate_plan
from llama_pretrain.plan.resolve import resolve


def find_problems(run: Run, machine: Machine) -> tuple[ResolvedRun | None, list[Problem]]:
    """The resolved run, if it can be resolved, and every problem that needs no look at the data."""
    problems = list(validate_pretrained(run))
    resolved = None
    if not problems:
        try:
            resolved = resolve(run, machine)
        except UserError as error:
            problems = error.problems
    if resolved is None:
        return None, [*validate_run(run), *problems]
    problems = list(validate_run(resolved))
    if resolved.task.trains:
        problems += validate_machine(resolved, machine)
    return resolved, problems + list(validate_plan(resolved))


def resolve_valid(run: Run, machine: Machine) -> ResolvedRun:
    """The resolved run.

    Raises:
        UserError: with every problem at once.
    """
    resolved, problems = find_problems(run, machine)
    if problems or resolved is None:
        raise UserError(problems)
    return resolved
