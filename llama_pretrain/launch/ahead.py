"""The imports of ranks, begun before the config is composed: that takes a second, and they many.

What a rank imports depends on its environment, and that on the config. So it is guessed: to be the
last command's. What was begun is used only where the guess turns out right. As run.py comes here
first, nothing is imported here that takes a while.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llama_pretrain.process import PARENT

SERVER = "llama_pretrain.launch.forkserver"
KEEP_IMPORTS = "LLAMA_PRETRAIN_KEEP_IMPORTS_S"
LABEL_BYTES = 200
"""Room in a server's command line for what it works for."""
FORKED = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""The device is looked for through NVML: a process with a CUDA context can't be forked."""
WITHOUT = ("-", "task=", "sweep=", "hydra/", "launch.fork=")
"""How words begin of commands that may train nothing, fork nothing, or do many runs."""


@dataclass(frozen=True)
class ServerProcess:
    """A process of launch/forkserver.py, whose requests and answers are pipes."""

    values: Mapping[str, str]
    """Of its environment, beside ours."""
    ours: Mapping[str, str]
    """Our environment when it was started."""
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def suits(self, values: Mapping[str, str]) -> bool:
        """Whether it imports what a process would that were started now with these values."""
        same = self.values == values and self.ours == os.environ
        return same and self.process.poll() is None

    def end(self) -> None:
        """End it, which has done nothing but import."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            if file is not None:
                file.close()


def start_server(values: Mapping[str, str]) -> ServerProcess:
    """Have a server begin, in our environment with these values.

    Call it in the main thread: the server ends with the thread that has started it.
    """
    log, ours = tempfile.TemporaryFile(), dict(os.environ)  # noqa: SIM115  # open as long as it is
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", SERVER, " " * LABEL_BYTES],
        env={**ours, **values, **FORKED, PARENT: str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,  # signals of a terminal are ours to pass on
    )
    return ServerProcess(values=values, ours=ours, process=process, log=log)


def start_ahead(argv: Sequence[str]) -> ServerProcess | None:
    """A server in the environment of the last run; `None` where there was none, or needs none."""
    kept = os.environ.get(KEEP_IMPORTS) not in (None, "", "0")
    if kept or any(word.startswith(WITHOUT) for word in argv):
        return None
    with suppress(OSError, ValueError):
        values = json.loads(_memory().read_bytes())
        if isinstance(values, dict) and all(isinstance(value, str) for value in values.values()):
            return start_server(values)
    return None


def remember(values: Mapping[str, str]) -> None:
    """Keep a run's values for the next command's guess, where there is a place for them."""
    content = json.dumps(values, sort_keys=True).encode()
    with suppress(OSError):
        path = _memory()
        if path.exists() and path.read_bytes() == content:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)


def own_folder() -> Path:
    """A folder of this user's alone, for what lasts as long as the machine runs.

    Raises:
        PermissionError: if others could have put something there.
    """
    given = Path(os.environ.get("XDG_RUNTIME_DIR") or "")
    parent = given if given.is_absolute() and given.is_dir() else Path(tempfile.gettempdir())
    folder = parent / f"llama_pretrain-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"needs {folder} to be yours alone (mode 700)")
    return folder


def _memory() -> Path:
    """Of this interpreter and this code."""
    ours = f"{sys.executable} {__file__}"
    return own_folder() / f"{hashlib.sha256(ours.encode()).hexdigest()[:16]}.environment.json"
