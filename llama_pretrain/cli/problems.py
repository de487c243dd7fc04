"""Everything wrong with a command: with its words, and with the run that the others describe."""

from llama_pretrain.config.command_line import CommandLine
from llama_pretrain.config.compose import COMPOSE_ERRORS, compose_run
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.plan.machine import Machine
from llama_pretrain.tasks.validate import find_problems


def list_problems(command: CommandLine, machine: Machine) -> list[Problem]:
    """The problems of the words, and those of the run without these words."""
    if command.is_multirun or command.only_shows or command.reference or command.flags:
        return list(command.problems)
    wrong = {problem.path for problem in command.problems}
    valid = [
        str(override.input_line)
        for override in command.overrides
        if override.key_or_group not in wrong and not override.key_or_group.startswith("hydra")
    ]
    try:
        run = compose_run(valid)
    except UserError as error:
        return [*command.problems, *error.problems]
    except COMPOSE_ERRORS:
        return list(command.problems)
    return [*command.problems, *find_problems(run, machine)[1]]
