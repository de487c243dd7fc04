"""A user's mistakes: collected, and reported all at once."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake: where it is, what is wrong (with the value in parentheses), how to fix it."""

    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        if not self.hint:
            return text
        first = self.hint.split()[0]
        name = not first.isalpha()  # a setting such as data.hash=null keeps its spelling
        hint = self.hint if name else self.hint[0].upper() + self.hint[1:]
        return f"{text}. {hint}" + ("" if hint.endswith((".", "?")) else ".")


class UserError(Exception):
    """Something that the user can fix; printed without a traceback, before anything starts."""

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
