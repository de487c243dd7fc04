"""Several jobs at a time on one machine: each has its own cores and GPUs."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llama_pretrain.files import flock
from llama_pretrain.plan.machine import Machine

VISIBLE = "CUDA_VISIBLE_DEVICES"


def share(machine: Machine, slots: int) -> Machine:
    """The share of a machine that one of several jobs has."""
    return replace(
        machine,
        cores=max(1, machine.cores // slots),
        memory_bytes=machine.memory_bytes // slots,
        num_gpus=machine.num_gpus // slots,
    )


def count_slots(machine: Machine, wanted: int) -> int:
    """How many jobs may run at a time: each needs a core, and a GPU if there are any."""
    most = machine.num_gpus or machine.cores
    return most if wanted < 0 else max(1, min(wanted, most))


@contextlib.contextmanager
def claim_slot(folder: Path, slots: int, machine: Machine) -> Iterator[int | None]:
    """Hold a slot: this process and all that it starts use only the slot's cores and GPUs.

    The system releases the slot however the process ends. With fewer than two slots nothing is
    restricted.

    Args:
        machine: the share of one slot.
    """
    if slots < 2:
        yield None
        return
    cores, visible = os.sched_getaffinity(0), os.environ.get(VISIBLE)
    with contextlib.ExitStack() as stack:
        number = _wait_for_slot(folder, slots, stack)
        mine = sorted(cores)[number * machine.cores : (number + 1) * machine.cores]
        os.sched_setaffinity(0, mine or cores)
        if machine.num_gpus:
            gpus = (visible or ",".join(map(str, range(slots * machine.num_gpus)))).split(",")
            own = gpus[number * machine.num_gpus : (number + 1) * machine.num_gpus]
            os.environ[VISIBLE] = ",".join(own)
        try:
            yield number
        finally:
            os.sched_setaffinity(0, cores)
            if machine.num_gpus:
                os.environ.pop(VISIBLE)
                if visible is not None:
                    os.environ[VISIBLE] = visible


def _wait_for_slot(folder: Path, slots: int, stack: contextlib.ExitStack) -> int:
    while True:
        for number in range(slots):
            lock = (folder / f".slot{number}").open("w")
            try:
                flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            stack.enter_context(lock)
            return number
        time.sleep(0.1)
