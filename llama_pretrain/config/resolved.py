"""The config of a run whose open settings have been decided; workers read it from snapshot.yaml."""

from dataclasses import field

from llama_pretrain.config.checkpoint import Checkpoint
from llama_pretrain.config.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, schema
from llama_pretrain.config.launch import Launch
from llama_pretrain.config.run import Run
from llama_pretrain.config.train import Train
from llama_pretrain.config.zero import Zero


@schema
class ResolvedLaunch(Launch):
    """`Launch` without open settings."""

    nodes: PositiveInt = field()
    num_processes: PositiveInt = field()
    device_memory: str = field()
    threads_per_process: PositiveInt = field()
    bind_cores: bool = field()


@schema
class ResolvedZero(Zero):
    """`Zero` without open sizes; a stage may not read them."""

    reduce_scatter: bool = field()
    reduce_bucket_size: PositiveInt = field()
    stage3_prefetch_bucket_size: NonNegativeInt = field()
    stage3_param_persistence_threshold: NonNegativeInt = field()
    zero_hpz_partition_size: PositiveInt = field()


@schema
class ResolvedTrain(Train):
    """`Train` without an open clipping norm."""

    gradient_clipping: NonNegativeFloat = field()


@schema
class ResolvedCheckpoint(Checkpoint):
    """`Checkpoint` without an open choice of writing in the background."""

    asynchronous: bool = field()


@schema
class ResolvedRun(Run):
    """A run with everything decided; only plan/resolve.py makes one from a `Run`."""

    launch: ResolvedLaunch = field()
    zero: ResolvedZero = field()
    train: ResolvedTrain = field()
    checkpoint: ResolvedCheckpoint = field()

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes."""
        return self.launch.num_processes * self.launch.nodes

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that read different sequences."""
        return max(1, self.num_ranks // self.launch.sequence_parallel_size)
