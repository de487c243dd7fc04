"""A user's mistakes: collected, and told all at once."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake: where it is, what was seen, what to do."""

    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        return f"{text}; {self.hint}" if self.hint else text


class UserError(Exception):
    """Something the user can mend; told without a traceback, before anything has started."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[Problem]]]:
        return UserError, (self.problems,)  # it crosses processes


def refuse(problems: Iterable[Problem]) -> None:
    """Raise all problems at once.

    Raises:
        UserError: if there is at least one.
    """
    found = list(problems)
    if found:
        raise UserError(found)
