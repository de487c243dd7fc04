"""Whether a run directory may be written to: it is this user's, and holds no link."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from llama_pretrain.config.problems import Problem

NOT_ENTERED = ("wandb",)
"""Folders whose links are made by their own program."""


def validate_ownership(folder: Path) -> Iterator[Problem]:
    """Why a run directory must not be written to; nothing if it does not exist.

    A directory that somebody else has made is only data: through a link in it, a resume would
    overwrite whatever the link points to.
    """
    for path in _walk(folder):
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue
        fault = _find_fault(info)
        if fault:
            message = f"must not be written to: {path} {fault}"
            hint = f"Start a new run from it with reproduce={folder}"
            yield Problem(path=str(folder), message=message, hint=hint)
            return


def _find_fault(info: os.stat_result) -> str:
    if stat.S_ISLNK(info.st_mode):
        return "is a link"
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        return "is neither a file nor a folder"
    return "" if info.st_uid == os.geteuid() else "belongs to another user"


def _walk(folder: Path) -> Iterator[Path]:
    yield folder
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in [*folders, *files])
        folders[:] = [name for name in folders if name not in NOT_ENTERED]
