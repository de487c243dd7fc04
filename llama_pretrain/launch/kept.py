"""Imports that stay for the next command: a process that waits at a socket, and forks servers.

Where LLAMA_PRETRAIN_KEEP_IMPORTS_S says for how long, the first command starts one, and each later
one whose ranks would import the same has its server forked from it. It ends when nobody has come
for so long.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.launch.ahead import KEEP_IMPORTS, LABEL_BYTES, own_folder
from llama_pretrain.launch.environment import read_at_import
from llama_pretrain.process import PROC

LIBRARIES = ("torch", "transformers", "deepspeed", "numpy")
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


def ask_for_server(
    module: str, values: Mapping[str, str], *, seconds: float, log: IO[bytes]
) -> socket.socket:
    """A connection to a server of one's own, which ends with it.

    Args:
        module: what a process is started with that waits.
        values: of the environment in which imports are made.
        seconds: for which it waits, if it has to be started.
        log: takes what the server says.

    Raises:
        UserError: if the folder of sockets isn't this user's alone.
    """
    connection = _connect(module, values, seconds=seconds, log=log)
    told = json.dumps({"folder": os.getcwd(), "umask": _umask()}).encode()
    socket.send_fds(connection, [told], [log.fileno()])
    return connection


def _connect(
    module: str, values: Mapping[str, str], *, seconds: float, log: IO[bytes]
) -> socket.socket:
    path = _find_folder() / f"{_key(values)}.sock"
    with path.with_suffix(".pid").open("a") as lock, _address(path) as address:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that come at once, one starts it
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except OSError:  # there is none, or none any more
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen()
                pid = _start(module, values, listener, path=path, seconds=seconds, log=log)
            lock.truncate(0)
            lock.write(f"{pid}\n")
            connection.connect(address)  # it will look when it has imported
    return connection


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """A socket's path, made short: one may have 107 bytes."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _start(
    module: str,
    values: Mapping[str, str],
    listener: socket.socket,
    *,
    path: Path,
    seconds: float,
    log: IO[bytes],
) -> int:
    """Start a process that waits at a socket. Returns its id."""
    number = listener.fileno()
    words = ["--keep", str(seconds), str(number), str(path), " " * LABEL_BYTES]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", module, *words],
        env={**os.environ, **values},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        pass_fds=[number],
        start_new_session=True,  # it outlives the command
    )
    return process.pid


def _find_folder() -> Path:
    """Where sockets lie.

    Raises:
        UserError: if others could have put one there.
    """
    try:
        return own_folder()
    except PermissionError as error:
        raise UserError([Problem(path=KEEP_IMPORTS, message=str(error))]) from error


def _key(values: Mapping[str, str]) -> str:
    """What ranks get from where they are forked: code and libraries that were imported, the
    environment, and a process's limits and place, such as a container, or a job of Slurm."""
    files = (PROJECT_ROOT / "llama_pretrain").rglob("*.py")
    depends = [
        sorted((str(path), path.stat().st_mtime_ns) for path in files),
        [sys.executable, sys.version, *(importlib.metadata.version(name) for name in LIBRARIES)],
        read_at_import(values),
        [resource.getrlimit(limit) for limit in LIMITS],
        [os.getpriority(os.PRIO_PROCESS, 0), (PROC / "self" / "cgroup").read_text()],
        sorted(os.readlink(namespace) for namespace in (PROC / "self" / "ns").iterdir()),
    ]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _umask() -> int:
    """This process's; it can't be read without being set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
