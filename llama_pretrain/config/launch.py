"""The config group `launch`: device, ranks, threads."""

from enum import Enum

from llama_pretrain.config.fields import NonNegativeInt, PositiveInt, schema


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@schema
class Launch:
    """Processes and machines."""

    device: Device = Device.auto
    """`auto` = CUDA where torch and a GPU are there, else the CPU."""
    num_processes: PositiveInt | None = None
    """Ranks on each machine; `null` = one a GPU, or two on a CPU with two cores or more."""
    nodes: PositiveInt = 1
    """Machines. More than one can be planned, not yet launched."""
    device_memory: str | None = None
    """Memory of one rank's device, as in 80GiB, to plan for; `null` = the GPU's here, 80GiB where
    GPUs are planned that aren't here, and a rank's share of the host's memory on a CPU."""
    threads_per_process: PositiveInt | None = None
    """Threads of one rank on a CPU; `null` = its share of the cores."""
    bind_cores: bool | None = None
    """Each rank keeps to cores of its own, neighbours of a socket; `null` = on a CPU, where ranks
    and their threads take all cores that the run may use."""
    malloc_mmap_threshold: PositiveInt | None = None
    """On a CPU: blocks of this many bytes or more go back to the system when they are freed
    (glibc's MALLOC_MMAP_THRESHOLD_). With 262144 a rank's memory is what the plan says to a few
    percent, and a step takes up to a quarter longer; `null` = glibc's own choice."""
    fork: bool = True
    """Fork ranks from a process that imports everything once, while the data is prepared (on Linux
    alone); `false` = a fresh interpreter for each rank, through torch's elastic agent."""
    timeout_s: PositiveInt = 1800
    """A rank that makes no progress for so many seconds ends the run, with the stacks of all ranks
    in their logs."""
    max_restarts: NonNegativeInt = 0
    """How often a run whose rank failed goes on by itself from its newest checkpoint."""
