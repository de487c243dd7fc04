"""Which node of how many this is, and where node 0 is: from the config, or what platforms set."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.launch import Launch, Launcher
from llama_pretrain.config.problems import Problem, UserError

DEFAULT_PORT = 29500
"""torchrun's."""
RANKS = ("PET_NODE_RANK", "NODE_RANK", "SKYPILOT_NODE_RANK", "SLURM_NODEID", "RANK")
"""Variables that hold the index of a node: Kubeflow Trainer and torchrun, hand-made scripts,
SkyPilot, Slurm, and Kubeflow's PyTorchJob, which starts one command a node."""
COUNTS = ("PET_NNODES", "NNODES", "SKYPILOT_NUM_NODES", "SLURM_JOB_NUM_NODES", "WORLD_SIZE")
"""Variables that hold the number of nodes, in the same order."""
SLURM_COUNTS = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")
MASTERS = ("PET_MASTER_ADDR", "MASTER_ADDR", "PET_RDZV_ENDPOINT", "SKYPILOT_NODE_IPS")
"""Variables that hold the address of node 0, alone or as the first line of a list."""
PORTS = ("PET_MASTER_PORT", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int | None = None
    """Ranks that it is to have, if the file says so."""


def count_nodes(launch: Launch, environ: Mapping[str, str] | None = None) -> int:
    """The number of nodes of a run.

    Raises:
        UserError: if it cannot be known.
    """
    environ = os.environ if environ is None else environ
    if launch.nodes is not None or launch.name is Launcher.local:
        return launch.nodes or 1
    if launch.name is Launcher.ssh:
        return len(list_hosts(launch))
    if submits_job(launch, environ):
        return 1
    names = SLURM_COUNTS if launch.name is Launcher.slurm else COUNTS
    nodes = _whole_number("launch.nodes", environ, names)
    if nodes is None:
        message = f"is required: no platform has set it (looked for {', '.join(names)})"
        raise UserError([Problem(path="launch.nodes", message=message)])
    return nodes


def submits_job(launch: Launch, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the run is to be submitted to Slurm: this command is in no allocation."""
    environ = os.environ if environ is None else environ
    return launch.name is Launcher.slurm and not environ.get("SLURM_JOB_NODELIST")


def validate_nodes(launch: Launch, environ: Mapping[str, str] | None = None) -> Iterator[Problem]:
    """Problems of finding the nodes of a run, and this one among them."""
    try:
        nodes = count_nodes(launch, environ)
        if launch.name is Launcher.ssh and len(list_hosts(launch)) != nodes:
            hosts = len(list_hosts(launch))
            message = f"differs from the number of hosts, {hosts} (got {nodes})"
            yield Problem(path="launch.nodes", message=message, hint=f"Set launch.nodes={hosts}")
        if nodes > 1 and launch.name is Launcher.torchrun:
            node_rank(launch, environ)
            if master_of(launch, environ)[0] is None:
                message = "is required, as HOST or HOST:PORT: no platform has set it"
                yield Problem(path="launch.master", message=message)
    except UserError as error:
        yield from error.problems


def node_rank(launch: Launch, environ: Mapping[str, str] | None = None) -> int:
    """The index of this node; 0 starts the run.

    Raises:
        UserError: with `torchrun`, if it cannot be known.
    """
    environ = os.environ if environ is None else environ
    if launch.name is not Launcher.torchrun:
        return 0
    found = launch.node_rank
    if found is None:
        found = _whole_number("launch.node_rank", environ, RANKS)
    nodes = count_nodes(launch, environ)
    if found is None and nodes == 1:
        return 0
    if found is None or found >= nodes:
        message = f"must be below launch.nodes={nodes} (got {found})"
        if found is None:
            message = f"is required: no platform has set it (looked for {', '.join(RANKS)})"
        raise UserError([Problem(path="launch.node_rank", message=message)])
    return found


def master_of(launch: Launch, environ: Mapping[str, str] | None = None) -> tuple[str | None, int]:
    """Host and port of node 0 as the others reach it; no host if nothing names one.

    Raises:
        UserError: if the port is none.
    """
    environ = os.environ if environ is None else environ
    named = launch.master or next((environ[name] for name in MASTERS if environ.get(name)), None)
    host, _, port = (named or "").split("\n")[0].strip().partition(":")
    if port and not port.isdigit():
        message = f"must be HOST or HOST:PORT (got {named})"
        raise UserError([Problem(path="launch.master", message=message)])
    given = None if launch.master else _whole_number("launch.master", environ, PORTS)
    return host or None, int(port) if port else given or DEFAULT_PORT


def list_hosts(launch: Launch) -> Sequence[Host]:
    """The hosts of `launch.hosts` or `launch.hostfile`.

    Raises:
        UserError: if there are none, or a line of the file is no host.
    """
    hosts = [Host(name=name) for name in launch.hosts]
    if launch.hostfile is not None:
        if hosts:
            message = "name the same hosts in two ways (got both)"
            raise UserError([Problem(path="launch.hosts, launch.hostfile", message=message)])
        hosts = _read_hostfile(launch.hostfile)
    if not hosts:
        message = "is required by launch=ssh, as a list of names, or launch.hostfile (got neither)"
        raise UserError([Problem(path="launch.hosts", message=message)])
    names = [host.name for host in hosts]
    if len({*names}) < len(names):
        message = f"names a host twice (got {', '.join(names)})"
        raise UserError([Problem(path="launch.hosts", message=message)])
    return hosts


def _read_hostfile(path: str) -> list[Host]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {error}"
        raise UserError([Problem(path="launch.hostfile", message=message)]) from error
    hosts = []
    for number, line in enumerate(lines, start=1):
        name, *rest = line.partition("#")[0].split() or [""]
        slots = rest[0].removeprefix("slots=") if rest else None
        if len(rest) > 1 or (slots is not None and not slots.isdigit()):
            message = f"line {number} must be HOST or HOST slots=N (got {line.strip()})"
            raise UserError([Problem(path="launch.hostfile", message=message)])
        if name:
            hosts.append(Host(name=name, slots=None if slots is None else int(slots)))
    if len({host.slots for host in hosts}) > 1:
        slots = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        message = f"gives its hosts different numbers of ranks (got {slots})"
        hint = "Give each host as many slots as the smallest has"
        raise UserError([Problem(path="launch.hostfile", message=message, hint=hint)])
    return hosts


def _whole_number(path: str, environ: Mapping[str, str], names: Sequence[str]) -> int | None:
    """The first of some variables that is set."""
    for name in names:
        value = environ.get(name, "")
        if value.isdigit():
            return int(value)
        if value and ":" not in value:  # PET_NNODES=1:4 is a range of an elastic job
            raise UserError([Problem(path=path, message=f"{name} is no number (got {value})")])
    return None
