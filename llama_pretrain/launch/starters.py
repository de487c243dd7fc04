"""Start the agents of other nodes: through ssh, or with srun inside a Slurm allocation."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

from llama_pretrain.config.launch import Launch, Launcher
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.launch.network import list_addresses
from llama_pretrain.launch.server import ROOT
from llama_pretrain.plan.nodes import list_hosts
from llama_pretrain.runs.layout import RunDir

ALIVE = ("ServerAliveInterval=5", "ServerAliveCountMax=3")
"""So that ssh ends when a host has lost power, and its agent can be started again."""
AGENT = "llama_pretrain.launch.agent"
CARRIED = ("PATH", "LD_LIBRARY_PATH", "LLAMA_PRETRAIN_CACHE", "TORCH_EXTENSIONS_DIR", "TMPDIR")
"""Variables that ssh does not pass on and that ranks may need, with those of NCCL and gloo."""


class Agent:
    """A process of this machine that has started the agents of other nodes, and lives as long."""

    def __init__(self, words: Sequence[str]):
        self._words = words
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for node 0, which tells the others
        )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def describe_end(self) -> str:
        """How it ended, with the last line that it printed."""
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"{self._words[0]} ended with {self._process.returncode}: {last}"

    def close(self) -> None:
        """End it; the agents have ended by now, or are unreachable."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        if not self.has_ended():
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        if not self.has_ended():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()


def start_agents(
    run: ResolvedRun, run_dir: RunDir, nodes: Sequence[int], master: tuple[str, int]
) -> dict[int, Agent]:
    """Start the agents of some nodes; none with `torchrun`, whose nodes start themselves."""
    words = [sys.executable, "-u", "-m", AGENT, str(run_dir.path), f"{master[0]}:{master[1]}"]
    if run.launch.name is Launcher.ssh:
        return {node: Agent(_ssh(run, words, node)) for node in nodes}
    if run.launch.name is Launcher.slurm:
        return {node: Agent(_srun(run, words, node)) for node in nodes}
    return {}


def _ssh(run: ResolvedRun, words: Sequence[str], node: int) -> list[str]:
    host = other_hosts(run.launch)[node - 1]
    carried = [
        f"{name}={value}"
        for name, value in os.environ.items()
        if name in CARRIED or name.startswith(("NCCL_", "GLOO_"))
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    remote = ["env", *carried, f"PYTHONPATH={path}", *words, str(node)]
    command = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(remote)}"
    options = ("BatchMode=yes", "ConnectTimeout=10", *ALIVE)
    given = [word for option in options for word in ("-o", option)]
    return [*shlex.split(run.launch.ssh), *given, host, command]


def _srun(run: ResolvedRun, words: Sequence[str], node: int) -> list[str]:
    options = ["--nodes=1", "--ntasks=1", f"--nodelist={allocated_hosts()[node]}"]
    options += ["--kill-on-bad-exit=1", "--export=ALL", "--overlap"]
    return ["srun", *options, *words, str(node)]


def allocated_hosts() -> list[str]:
    """The hosts of this Slurm allocation, this one first.

    Raises:
        KeyError: outside one.
    """
    listed = os.environ["SLURM_JOB_NODELIST"]
    shown = subprocess.run(
        ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True
    ).stdout.split()
    here = os.environ.get("SLURMD_NODENAME", shown[0])
    return [here, *(name for name in shown if name != here)]


def other_hosts(launch: Launch) -> list[str]:
    """The hosts of a launch but this one, in order.

    Raises:
        UserError: if this machine is not among them.
    """
    if launch.name is Launcher.slurm:
        return allocated_hosts()[1:]
    names = [host.name for host in list_hosts(launch)]
    here = [name for name in names if is_here(name)]
    if len(here) != 1:
        message = f"must name this machine, {socket.gethostname()}, once (got {', '.join(names)})"
        raise UserError([Problem(path="launch.hosts", message=message)])
    return [name for name in names if name != here[0]]


def is_here(host: str) -> bool:
    """Whether a host's name, or one of its addresses, is this machine's."""
    own = socket.gethostname()
    if host in (own, own.partition(".")[0], "localhost"):
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return False
    return bool(found & set(list_addresses().values()))
