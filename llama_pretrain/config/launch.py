"""The config group `launch`: device, ranks, threads."""

from enum import Enum

from llama_pretrain.config.fields import NonNegativeInt, PositiveInt, schema


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@schema
class Launch:
    """Nodes, ranks and their threads."""

    device: Device = Device.auto
    """`auto` = CUDA if torch supports it and a GPU is present, else the CPU."""
    num_processes: PositiveInt | None = None
    """Ranks on each node; `null` = one a GPU, or two on a CPU with at least two cores."""
    nodes: PositiveInt = 1
    """Number of nodes. More than one can be planned, but not launched yet."""
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
    (Linux only); `false` = a fresh interpreter for each rank, through torch's elastic agent."""
    timeout_s: PositiveInt = 1800
    """A rank that makes no progress for this many seconds ends the run, with the stacks of all
    ranks in their logs."""
    max_restarts: NonNegativeInt = 0
    """How many times a run whose rank failed is restarted from its newest checkpoint."""
