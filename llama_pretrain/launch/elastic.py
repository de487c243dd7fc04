"""Ranks of fresh interpreters, started by torch's elastic agent."""

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.launch.failures import Failure
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.supervisor import POLL_S, WORKER, Supervisor
from llama_pretrain.process import PARENT, list_processes


def _host_store() -> Any:
    """The store of the rendezvous, on the loopback interface: torch's own listens on all.

    It has no authentication, and whoever reaches it can set its keys.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        return dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


class ElasticSupervisor(Supervisor):
    """Runs torch's elastic agent. A rank dies with the thread that has started it: this one."""

    def __init__(self, spec: LaunchSpec, *, log_dir: Path):
        super().__init__()
        self._spec, self._log_dir = spec, log_dir

    def pids(self) -> list[int]:
        # torch gives each its own session; a server of forked ranks, which has one too, is unused
        ours = [process for process in list_processes() if process.parent == os.getpid()]
        return [process.pid for process in ours if process.session == process.pid]

    def supervise(self) -> None:
        # The failed rank, its error and its log are reported by us; each logger has its own level.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        store = _host_store()
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the agent hosts a second one
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._spec.plan.world_size,
            run_id=self._spec.run_dir.path.name,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{store.host}:{store.port}",
            rdzv_configs={"is_host": False},
            local_addr=store.host,  # the host's own name may not resolve
            max_restarts=0,
            monitor_interval=POLL_S,
            # What a rank prints before it opens its own log, which is next to nothing.
            logs_specs=DefaultLogsSpecs(log_dir=str(self._log_dir), redirects=Std.ALL),
        )
        variables = worker_environment(self._spec.run) | {
            PARENT: str(os.getpid()),
            "MASTER_ADDR": store.host,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # ranks are its clients
        }
        # `env` sets the environment of the ranks without touching ours, and becomes the worker
        words = [f"{key}={value}" for key, value in variables.items()]
        words += [sys.executable, "-u", "-m", WORKER, *self._spec.worker_args]
        try:
            elastic_launch(config, "env")(*words)
        except ChildFailedError as error:
            for rank, failure in error.failures.items():
                self.failures[rank] = Failure.of(failure.exitcode, Path(failure.error_file))
