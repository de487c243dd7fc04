"""The config group `launch`: device, ranks, threads."""

from dataclasses import field
from enum import Enum
from typing import Annotated, Any

from llama_pretrain.config.fields import (
    NUMBER,
    IsPath,
    NonNegativeInt,
    PositiveInt,
    UsedWhen,
    schema,
)


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Launcher(str, Enum):
    local = "local"
    torchrun = "torchrun"
    ssh = "ssh"
    slurm = "slurm"


BETWEEN_NODES = UsedWhen(".name", ("torchrun", "ssh", "slurm"))
JOINING = UsedWhen(".name", ("torchrun",))
BY_SSH = UsedWhen(".name", ("ssh",))
BY_SLURM = UsedWhen("launch.name", ("slurm",))


@schema
class SlurmJob:
    """The job that `launch=slurm` submits when the command runs outside of an allocation."""

    partition: str | None = None
    """sbatch's option of that name, as are the next ones; `null` = the cluster's default."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit, as in 12:00:00."""
    gres: str | None = None
    """Resources of each node, as in gpu:8."""
    constraint: str | None = None
    """Features that nodes must have."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch by their long names: `+launch.slurm.extra.cpus-per-task=64`,
    `+launch.slurm.extra.exclusive=true`."""
    signal_s: PositiveInt = 300
    """How long before the time limit the run saves and the job goes back into the queue."""
    wait: bool = False
    """Show how the run goes until it has ended, instead of returning at once."""


@schema
class Launch:
    """Nodes, ranks and their threads."""

    name: Launcher = Launcher.local
    """What starts the ranks of other nodes: `local` = there are none; `torchrun` = whatever has
    started this command on every node; `ssh`; `slurm` = srun inside an allocation, and outside of
    one a job that is submitted."""

    device: Device = Device.auto
    """`auto` = CUDA if torch supports it and a GPU is present, else the CPU."""
    num_processes: PositiveInt | None = None
    """Ranks on each node; `null` = one a GPU, or two on a CPU with at least two cores."""
    nodes: PositiveInt | None = None
    """Number of nodes; `null` = those of `hosts` or `hostfile`, of the Slurm allocation, or of the
    environment that a platform sets on each node, else 1."""
    node_rank: Annotated[NonNegativeInt | None, JOINING] = None
    """Which node this is, from 0; `null` = what the platform's environment says."""
    master: Annotated[str | None, BETWEEN_NODES] = None
    """Address of node 0 for the others, as HOST or HOST:PORT; `null` = what the platform's
    environment says, or the address that leads to the other hosts."""
    interface: Annotated[str | None, BETWEEN_NODES] = None
    """Network interface of every node for traffic between nodes; `null` = the one that leads to
    node 0, or from there to the others."""
    hosts: Annotated[list[str], BY_SSH] = field(default_factory=list)
    """Hosts to train on, among them this machine, which becomes node 0."""
    hostfile: Annotated[str | None, IsPath(), BY_SSH] = None
    """A file of hosts in DeepSpeed's format, a line each: `host slots=8`."""
    ssh: Annotated[str, BY_SSH] = "ssh"
    """The command that reaches another host, with its options."""
    slurm: Annotated[SlurmJob, BY_SLURM] = field(default_factory=SlurmJob)
    join_timeout_s: Annotated[PositiveInt, BETWEEN_NODES] = 1800
    """How long nodes wait for each other at a start."""
    min_nodes: Annotated[PositiveInt | None, BETWEEN_NODES] = None
    """With how few nodes a run goes on after it has lost some (needs `launch.max_restarts`); a node
    that comes back joins again. `null` = with all."""
    rejoin_timeout_s: Annotated[PositiveInt, UsedWhen(".min_nodes", (NUMBER,))] = 300
    """How long lost nodes are waited for before the run goes on without them."""
    allow_node_drift: Annotated[bool, BETWEEN_NODES] = False
    """Train although code or package versions differ between nodes."""
    sequence_parallel_size: PositiveInt = 1
    """Ranks that share each sequence, every one with its part of the tokens and, in attention, of
    the heads (Ulysses, arXiv 2309.14509); they divide all ranks into groups of neighbours."""
    device_memory: str | None = None
    """Memory of one rank's device to plan for, as in 80GiB; `null` = that of the GPU, 80GiB when
    GPUs are planned that are not present, and a rank's share of the host's memory on a CPU."""
    threads_per_process: PositiveInt | None = None
    """Threads of one rank on a CPU; `null` = its share of the cores."""
    bind_cores: bool | None = None
    """Bind each rank to its own cores, neighbours on one socket; `null` = on a CPU, when ranks
    and their threads use all cores that the run may use."""
    malloc_mmap_threshold: PositiveInt | None = None
    """On a CPU: blocks of at least this many bytes are returned to the system when they are freed
    (glibc's M_MMAP_THRESHOLD). With 262144 a rank's memory is within a few percent of the plan, and
    a step takes up to 25% longer; `null` = glibc's own choice."""
    fork: bool = True
    """Fork ranks from a preloaded process that has imported torch, transformers and DeepSpeed
    (Linux only); `false` = a fresh interpreter for each rank."""
    timeout_s: PositiveInt = 1800
    """A rank that makes no progress for this many seconds ends the run, with the stacks of all
    ranks in their logs."""
    max_restarts: NonNegativeInt = 0
    """How many times a run whose rank failed is restarted from its newest checkpoint."""
