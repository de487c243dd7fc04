"""Hosts on this machine: network, process and host-name namespaces, joined by a bridge.

Killing a host's first process ends everything that runs on it, as when a machine dies.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from tests.conftest import ROOT

NETWORK = "10.77.0"
INIT = """
ip link set lo up
hostname $1
mount --make-rprivate /
mount -t proc proc /proc
mount --bind $2 /etc/hosts
echo ready
while :; do sleep 1000 & wait; done
"""
"""What the first process of a host does; as such a process must, it waits for orphans."""


@dataclass(frozen=True)
class Host:
    """A machine of its own, as far as processes, names and addresses go."""

    name: str
    address: str
    init: "subprocess.Popen[str]"

    def command(self, words: Sequence[str]) -> list[str]:
        """A command as it runs on this host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", "--", *words]

    @property
    def pid(self) -> int:
        """The host's first process: the child of the one that made the namespaces."""
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text()
        return int(children.split()[0])

    def start(
        self, words: Sequence[str], *, output: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command; its output goes to a file."""
        with output.open("ab") as log:
            return subprocess.Popen(
                self.command(words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=output.parent,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
            )

    def run(self, *words: str) -> str:
        """Run a command to its end. Returns what it prints."""
        done = subprocess.run(self.command(words), check=True, capture_output=True, text=True)
        return done.stdout

    def processes(self) -> list[str]:
        """The command lines of what runs on this host, but for its first process."""
        shown = self.run("ps", "-eo", "pid=,args=").splitlines()
        found = [line.split(None, 1) for line in shown]
        ours = ("ps -eo", "sleep 1000")
        return [words for pid, words in found if pid != "1" and not words.startswith(ours)]

    def die(self) -> None:
        """Lose power."""
        with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):
            os.kill(self.pid, signal.SIGKILL)
        self.init.wait(10)

    def set_link(self, state: str) -> None:
        """Plug the network cable in or out: `up` or `down`."""
        self.run("ip", "link", "set", "eth0", state)


@cache
def why_not() -> str:
    """Why this machine cannot have hosts; empty if it can."""
    for program in ("ip", "nsenter", "unshare"):
        if shutil.which(program) is None:
            return f"needs {program}"
    done = subprocess.run(["unshare", "-n", "-p", "-f", "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"cannot make namespaces: {done.stderr.strip()}"


def skip(reason: str) -> NoReturn:
    """Skip a test, unless this machine is one that must run it."""
    if os.environ.get("LLAMA_PRETRAIN_NEED_HOSTS"):
        pytest.fail(f"several hosts: {reason}")
    pytest.skip(f"several hosts: {reason}")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Hosts `a`, `b`, ... on one network, with one file system."""
    if reason := why_not():
        skip(reason)
    names = [chr(ord("a") + index) for index in range(count)]
    bridge = f"br{os.getpid() % 100_000}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lines = [f"{NETWORK}.{place} {name}" for place, name in enumerate(names, start=1)]
        table = folder / "hosts"
        table.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        # a network namespace of its own for the bridge: tests may run beside each other
        switch = stack.enter_context(_namespaces("switch", table))
        _enter(switch, "ip", "link", "add", bridge, "type", "bridge")
        _enter(switch, "ip", "link", "set", bridge, "up")
        made = []
        for place, name in enumerate(names, start=1):
            init = stack.enter_context(_namespaces(name, table))
            host = Host(name, f"{NETWORK}.{place}", init)
            port = f"port{place}"
            _enter(switch, "ip", "link", "add", port, "type", "veth", "peer", "eth0", "netns",
                   str(host.pid))  # fmt: skip
            _enter(switch, "ip", "link", "set", port, "master", bridge, "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.set_link("up")
            made.append(host)
        yield made


def _enter(init: "subprocess.Popen[str]", *words: str) -> None:
    """Run a command in the network of a host, but with our process ids."""
    pid = Host("", "", init).pid
    subprocess.run(["nsenter", "-t", str(pid), "-n", "--", *words], check=True)


@contextmanager
def _namespaces(name: str, table: Path) -> Iterator["subprocess.Popen[str]"]:
    words = ["unshare", "-n", "-u", "-m", "-p", "--fork", "--kill-child", "--mount-proc"]
    init = subprocess.Popen(
        [*words, "bash", "-ec", INIT, "init", name, str(table)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert init.stdout is not None
        assert init.stdout.readline() == "ready\n"
        yield init
    finally:
        with contextlib.suppress(ProcessLookupError):
            init.kill()
        init.wait(10)
        if init.stdout is not None:
            init.stdout.close()


@contextmanager
def ssh_between(machines: Sequence[Host], folder: Path) -> Iterator[str]:
    """A real sshd on every host, with keys made for it. Yields the command that reaches them."""
    for program in ("sshd", "ssh-keygen", "ssh"):
        if shutil.which(program) is None:
            skip(f"needs {program}")
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    server = [str(shutil.which("sshd")), "-D", "-e", "-f", str(folder / "sshd_config")]
    with ExitStack() as stack:
        for host in machines:
            process = host.start(server, output=folder / f"sshd-{host.name}.log")
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
        deadline = time.monotonic() + 10
        for host in machines:
            while "LISTEN" not in host.run("ss", "-ltn", "sport = :22"):
                assert time.monotonic() < deadline, "sshd does not listen"
                time.sleep(0.05)
        yield f"ssh -F {folder}/ssh_config"


SLURM = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType={tracking}
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
ReturnToService=2
SlurmdTimeout=10
{more}
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes={names} Default=YES PriorityTier=1 GraceTime=10 State=UP
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF State=UP
"""


@contextmanager
def slurm_on(
    machines: Sequence[Host],
    folder: Path,
    *,
    tracking: str = "proctrack/linuxproc",
    more: str = "RequeueExit=75",
) -> Iterator[dict[str, str]]:
    """A real Slurm of these hosts; the first one has the controller. Yields its environment."""
    for program in ("slurmctld", "slurmd", "munged"):
        if shutil.which(program) is None:
            skip(f"needs {program}")
    conf, socket = folder / "slurm.conf", folder / "munge.socket"
    nodes = [f"NodeName={h.name} NodeAddr={h.address} CPUs=2 RealMemory=4000" for h in machines]
    names = ",".join(host.name for host in machines)
    first = f"{machines[0].name}({machines[0].address})"
    text = SLURM.format(
        first=first,
        folder=folder,
        nodes="\n".join(nodes),
        names=names,
        tracking=tracking,
        more=more,
    )
    conf.write_text(text)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munged = ["munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={key}"]
    munged += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed"]
    env = {"SLURM_CONF": str(conf)}
    with ExitStack() as stack:

        def daemon(host: Host, words: Sequence[str]) -> None:
            process = host.start(words, output=folder / "daemons.out", env=env)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)

        daemon(machines[0], [*munged, f"--log-file={folder}/munged.log"])
        daemon(machines[0], ["slurmctld", "-D", "-c"])
        for host in machines:
            daemon(host, ["slurmd", "-D", "-N", host.name])
        deadline = time.monotonic() + 20
        shown = ["env", f"SLURM_CONF={conf}", "sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D"]
        while True:
            try:
                if machines[0].run(*shown).split() == [str(len(machines))]:
                    break
            except subprocess.CalledProcessError:  # the controller is not up
                pass
            assert time.monotonic() < deadline, (folder / "daemons.out").read_text()[-3000:]
            time.sleep(0.1)
        yield env
