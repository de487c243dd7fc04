"""Several hosts in namespaces: torchrun, ssh and Slurm; and what happens when one is lost."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.process import read_beats
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EventRow, evaluations, read_metrics, steps
from tests.conftest import ROOT
from tests.hosts import Host, hosts, slurm_on, ssh_between

BATCH = shlex.split("""debug=smoke batch.global_batch_size=12 batch.micro_batch_size=null
    batch.gradient_accumulation_steps=null checkpoint.export=false monitor=none""")
LONG = shlex.split("""train.max_steps=4000 train.eval_every_steps=null checkpoint.every_steps=20
    launch.timeout_s=15""")
"""A run that a test interrupts."""
TIMEOUT_S = 15
SILENT_S = TIMEOUT_S + 10
"""A lost node is noticed after launch.timeout_s, and everything has ended soon after."""


class Job:
    """A run over hosts `a`, `b`, ..., in a folder that all share."""

    def __init__(self, folder: Path, machines: Sequence[Host], ssh: str = ""):
        self.folder, self.machines, self.ssh = folder, machines, ssh
        self.run_dir = RunDir(folder / "run")
        self.commands: list[subprocess.Popen[bytes]] = []

    def words(self, *more: str) -> list[str]:
        place = f"hydra.run.dir={self.run_dir.path}"
        return [sys.executable, str(ROOT / "run.py"), *BATCH, place, *more]

    def start(self, *more: str) -> None:
        """Start the command on node 0 if ssh starts the others, else on every node."""
        if self.ssh:
            names = ",".join(host.name for host in self.machines)
            more = ("launch=ssh", f"launch.hosts=[{names}]", f"launch.ssh='{self.ssh}'", *more)
            self.start_on(0, *more)
            return
        for node in range(len(self.machines)):
            self.start_on(node, *self.torchrun(node), *more)

    def torchrun(self, node: int) -> list[str]:
        nodes, master = len(self.machines), self.machines[0].address
        return shlex.split(
            f"launch=torchrun launch.nodes={nodes} launch.node_rank={node} launch.master={master}"
        )

    def start_on(self, node: int, *words: str) -> None:
        host = self.machines[node]
        output = self.folder / f"{host.name}.log"
        self.commands.append(host.start(self.words(*words), output=output))

    def output(self, node: int = 0) -> str:
        return (self.folder / f"{self.machines[node].name}.log").read_text()

    def wait(self, timeout_s: float = 120) -> list[int]:
        """The exit codes of the commands."""
        end = time.monotonic() + timeout_s
        return [each.wait(max(0.1, end - time.monotonic())) for each in self.commands]

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 120
        while len(steps(read_metrics(self.run_dir.metrics))) < step:
            assert time.monotonic() < end, self.output()
            assert self.commands[0].poll() is None, self.output()
            time.sleep(0.02)

    def rank_on(self, node: int) -> int:
        """The process id of the first rank of a node, as that node knows it."""
        (beat, *_) = read_beats(self.run_dir.heartbeats(node), ranks=1)
        return beat.pid

    def assert_nothing_is_left(self) -> None:
        """No process on any living host, soon after the commands have ended."""
        end = time.monotonic() + 5
        for host in self.machines:
            while host.init.poll() is None:
                left = [words for words in host.processes() if "sshd" not in words]
                if not left:
                    break
                assert time.monotonic() < end, left
                time.sleep(0.1)

    def process_on(self, node: int, command: str) -> int:
        """The process id of a command, by a part of it."""
        shown = self.machines[node].run("ps", "-eo", "pid=,args=").splitlines()
        return next(int(line.split()[0]) for line in shown if command in line)


@contextmanager
def job(folder: Path, count: int = 2, *, ssh: bool = False) -> Iterator[Job]:
    with hosts(count) as machines:
        if not ssh:
            yield Job(folder, machines)
            return
        keys = folder / "keys"
        keys.mkdir()
        with ssh_between(machines, keys) as command:
            yield Job(folder, machines, command)


def numbers(run_dir: RunDir) -> list[Any]:
    """What must be equal to the bit, wherever a run's ranks are."""
    rows = read_metrics(run_dir.metrics)
    trained = [(row.step, row.loss, row.grad_norm, row.sample_hash) for row in steps(rows)]
    return [*trained, *((row.step, row.eval_loss) for row in evaluations(rows))]


def train_here(folder: Path, *words: str) -> list[Any]:
    """The numbers of a run on this machine alone."""
    command = [sys.executable, str(ROOT / "run.py"), *BATCH, f"hydra.run.dir={folder}", *words]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent)
    return numbers(RunDir(folder))


def test_two_nodes_equal_one_machine_to_the_bit(tmp_path: Path) -> None:
    words = ("train.max_steps=4", "zero=stage2")
    with job(tmp_path) as two:
        two.start("launch.num_processes=1", *words)
        assert two.wait() == [0, 0]
        two.assert_nothing_is_left()
    expected = train_here(tmp_path / "one", "launch.num_processes=2", *words)
    assert numbers(two.run_dir) == expected
    assert len(expected) == 6
    assert "waiting for node 1" in two.output()
    assert two.output(1).startswith("node 1: waiting for node 0 at 10.77.0.1:29500\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "ranks", "words"),
    [
        (3, 1, ("zero=stage3", "precision=bf16")),
        (2, 2, ("zero=stage1", "launch.fork=false")),
        (2, 2, ("zero=stage3", "zero.zero_hpz_partition_size=2")),
        (2, 1, ("zero=stage0",)),
    ],
)
def test_nodes_that_ssh_starts_equal_one_machine(
    tmp_path: Path, count: int, ranks: int, words: tuple[str, ...]
) -> None:
    words = ("train.max_steps=4", *words)
    with job(tmp_path, count, ssh=True) as several:
        several.start(f"launch.num_processes={ranks}", *words)
        assert several.wait() == [0], several.output()
    expected = train_here(tmp_path / "one", f"launch.num_processes={count * ranks}", *words)
    assert numbers(several.run_dir) == expected


def kill_rank(running: Job) -> None:
    running.machines[1].run("kill", "-9", str(running.rank_on(1)))


def kill_agent(running: Job) -> None:
    running.machines[1].run("kill", "-9", str(running.process_on(1, "launch.agent")))


def stop_rank(running: Job) -> None:
    running.machines[1].run("kill", "-STOP", str(running.rank_on(1)))


def kill_host(running: Job) -> None:
    running.machines[1].die()


def cut_link(running: Job) -> None:
    running.machines[1].set_link("down")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lose", "ssh", "says", "limit_s"),
    [
        (kill_rank, True, "rank 1 on node 1 (b, rank 1) failed: killed by SIGKILL", TIMEOUT_S),
        (
            kill_agent,
            True,
            "rank 1 on node 1 (b, rank 1) failed: the node is lost: ssh ended",
            TIMEOUT_S,
        ),
        (
            kill_host,
            True,
            "rank 1 on node 1 (b, rank 1) failed: the node is lost: ssh ended",
            TIMEOUT_S,
        ),
        (cut_link, False, "rank 1 on node 1 (b, rank 1) failed: the node is lost: no", SILENT_S),
        (stop_rank, False, "rank 1 on node 1 (b, rank 1) failed: no heartbeat for", SILENT_S),
    ],
)
def test_a_node_that_is_lost_ends_the_run(
    tmp_path: Path, lose: Callable[[Job], None], ssh: bool, says: str, limit_s: float
) -> None:
    with job(tmp_path, ssh=ssh) as running:
        running.start("launch.num_processes=1", *LONG)
        running.wait_for_step(25)
        lose(running)
        began = time.monotonic()
        assert set(running.wait()) == {1}
        assert time.monotonic() - began < limit_s
        assert says in running.output()
        status = json.loads(running.run_dir.status.read_text())
        assert status["status"] == "failed"
        assert status["rank"] == 1
        running.assert_nothing_is_left()


@pytest.mark.slow
def test_the_other_nodes_end_when_node_0_is_lost(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        running.start("launch.num_processes=1", *LONG)
        running.wait_for_step(5)
        running.machines[0].die()
        assert running.commands[1].wait(SILENT_S) == 1
        assert "error: node 0 is lost: no answer for 15 s" in running.output(1)


@pytest.mark.slow
def test_a_signal_to_any_node_saves(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        running.start("launch.num_processes=1", *LONG)
        running.wait_for_step(5)
        second = running.machines[1]
        second.run("kill", "-TERM", str(running.process_on(1, "run.py")))
        assert running.wait(30) == [75, 75]
        assert "to resume from step-" in running.output()


@pytest.mark.slow
def test_a_lost_agent_comes_back_and_the_run_ends_the_same(tmp_path: Path) -> None:
    words = ("train.max_steps=60", "train.eval_every_steps=null", "checkpoint.every_steps=20")
    with job(tmp_path, ssh=True) as running:
        running.start("launch.num_processes=1", "launch.max_restarts=1", *words)
        running.wait_for_step(25)
        kill_agent(running)
        assert running.wait() == [0], running.output()
        assert "resuming from step-00000020" in running.output()
    expected = train_here(tmp_path / "one", "launch.num_processes=2", *words)
    assert numbers(running.run_dir) == expected


def assert_close(ours: list[Any], expected: list[Any]) -> None:
    """The same steps on the same samples; losses within 1e-5."""
    assert len(ours) == len(expected)
    for row, other in zip(ours, expected, strict=True):
        assert (row[0], row[3:]) == (other[0], other[3:])
        assert row[1] == pytest.approx(other[1], rel=1e-5)


FEWER = shlex.split("""launch.num_processes=1 launch.max_restarts=5 launch.min_nodes=1
    launch.rejoin_timeout_s=2 train.eval_every_steps=null checkpoint.every_steps=20
    precision=fp32""")
"""A run that goes on with the nodes that are left."""


@pytest.mark.slow
@pytest.mark.parametrize("ssh", [True, False])
def test_a_run_goes_on_with_fewer_nodes(tmp_path: Path, ssh: bool) -> None:
    with job(tmp_path, 3, ssh=ssh) as running:
        running.start(*FEWER, "train.max_steps=120")
        running.wait_for_step(25)
        kill_host(running)
        if not ssh:
            del running.commands[1]
        assert set(running.wait()) == {0}, running.output()
        running.assert_nothing_is_left()
    assert "going on with 2 of 3 nodes" in running.output()
    assert "12 sequences = 4 micro x 1 accumulated x 3 ranks" in running.output()
    assert load_snapshot(running.run_dir.snapshot).launch.nodes == 3  # as it was planned
    words = (
        "train.max_steps=120",
        "train.eval_every_steps=null",
        "launch.num_processes=3",
        "precision=fp32",
    )
    assert_close(numbers(running.run_dir), train_here(tmp_path / "one", *words))


@pytest.mark.slow
def test_a_node_that_comes_back_takes_part_again(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        running.start(*FEWER, "train.max_steps=1200")
        running.wait_for_step(25)
        running.machines[1].run("kill", "-9", str(running.process_on(1, "run.py")))
        end = time.monotonic() + 60
        while "going on with 1 of 2 nodes" not in running.output():
            assert time.monotonic() < end
            time.sleep(0.1)
        running.commands.pop().wait(10)
        running.start_on(1, *running.torchrun(1), *FEWER, "train.max_steps=1200")
        assert running.wait() == [0, 0], running.output()
    events = [row.restarted for row in read_metrics(running.run_dir.metrics)
              if isinstance(row, EventRow) and row.restarted]  # fmt: skip
    assert "the node is lost" in events[0]
    assert events[1:] == ["nodes that were lost are back"]
    assert load_snapshot(running.run_dir.snapshot).launch.nodes == 2
    words = (
        "train.max_steps=1200",
        "train.eval_every_steps=null",
        "launch.num_processes=2",
        "precision=fp32",
    )
    ours, expected = numbers(running.run_dir), train_here(tmp_path / "one", *words)
    assert_close(ours[:200], expected[:200])
    assert [row[0] for row in ours] == [row[0] for row in expected]


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        (tmp_path / "run").mkdir()
        running.machines[1].run("mount", "-t", "tmpfs", "none", str(tmp_path / "run"))
        running.start("launch.num_processes=1", *LONG)
        assert running.wait() == [1, 1]
        assert "it must be on a file system that all nodes share" in running.output(1)
        assert "node 1 (b, rank 1) cannot join" in running.output()


@contextmanager
def login_node(folder: Path, *, more: str = "") -> Iterator[Callable[..., str]]:
    """Slurm on two hosts. Yields what runs a command on one of them outside of any job."""
    slurm = folder / "slurm"
    slurm.mkdir()
    with hosts(2) as machines, slurm_on(machines, slurm, more=more) as variables:
        paths = [f"PYTHONPATH={ROOT}", *(f"{name}={value}" for name, value in variables.items())]

        def run(*words: str) -> str:
            place = ["env", f"--chdir={folder}", *paths]
            return machines[0].run(*place, sys.executable, str(ROOT / "run.py"), *BATCH, *words)

        yield run


@pytest.mark.slow
def test_a_submitted_run_goes_on_after_its_time_limit(tmp_path: Path) -> None:
    words = ("train.max_steps=2500", "train.eval_every_steps=null")
    run_dir = RunDir(tmp_path / "a run")
    with login_node(tmp_path) as run:
        shown = run(
            "launch=slurm",
            "launch.nodes=2",
            "launch.num_processes=1",
            "launch.slurm.time=1",
            "launch.slurm.signal_s=45",
            "launch.slurm.wait=true",
            f"hydra.run.dir='{run_dir.path}'",
            *words,
        )
    lines = shown.splitlines()
    assert f"job 1 is submitted: {run_dir.path}/job.sbatch" in lines
    assert lines.index("job 1 is RUNNING") < lines.index("job 1 has ended")
    assert "step 2500: eval loss" in shown
    rows = read_metrics(run_dir.metrics)
    resumed = [row.resumed for row in rows if isinstance(row, EventRow) and row.resumed]
    assert [text.split(" ", 1)[1] for text in resumed] == [
        f"by job 1 of Slurm, restart {count}" for count in range(1, len(resumed) + 1)
    ]
    assert resumed
    assert resumed[0] in run_dir.report.read_text()
    assert numbers(run_dir) == train_here(tmp_path / "one", *words, "launch.num_processes=2")


@pytest.mark.slow
def test_a_submitted_sweep_ends_with_its_table(tmp_path: Path) -> None:
    place = f"hydra.sweep.dir={tmp_path}/sweep"
    words = ("-m", "launch=slurm", "launch.num_processes=1", "train.max_steps=3", place)
    with login_node(tmp_path) as run:
        shown = run(*words, "+launch.slurm.extra.cpus-per-task=1", "seed=1,2,3,4")
        again = run(*words, "+launch.slurm.extra.cpus-per-task=1", "seed=1,2,3,4")
    for output in (shown, again):
        assert f"4 jobs: 4 completed; details in {tmp_path}/sweep" in output
    assert len(list(tmp_path.glob("sweep/*/slurm-*.log"))) == 4
    expected = train_here(tmp_path / "one", "launch.num_processes=1", *words[3:4], "seed=3")
    assert numbers(RunDir(next(tmp_path.glob("sweep/*seed=3*")))) == expected


@pytest.mark.slow
def test_slurm_requeues_a_preempted_job_and_it_ends_the_same(tmp_path: Path) -> None:
    words = ("launch.num_processes=1", "train.max_steps=300", "train.eval_every_steps=null")
    batch = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append\n"
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    with hosts(2) as machines, slurm_on(machines, slurm) as variables:
        running = Job(tmp_path, machines)
        line = running.words("launch=slurm", "resume=auto", *words)
        (tmp_path / "job.sh").write_text(f"{batch}exec {shlex.join(line)}\n")
        env = ["env", *(f"{name}={value}" for name, value in variables.items())]
        place = [f"--output={tmp_path}/job.log", f"--chdir={tmp_path}"]
        machines[0].run(*env, "sbatch", *place, str(tmp_path / "job.sh"))
        end = time.monotonic() + 180
        while len(steps(read_metrics(running.run_dir.metrics))) < 30:
            assert time.monotonic() < end
            time.sleep(0.05)
        other = ["--partition=high", "--nodes=2", "--cpus-per-task=2", "--output=/dev/null"]
        machines[0].run(*env, "sbatch", *other, "--wrap", "sleep 1")
        while machines[0].run(*env, "squeue", "--noheader").strip():
            assert time.monotonic() < end, (tmp_path / "job.log").read_text()[-2000:]
            time.sleep(0.3)
    log = (tmp_path / "job.log").read_text()
    assert f"preempted by {signal.SIGTERM.name}" in log
    assert "resuming from step-" in log
    expected = train_here(tmp_path / "one", *words[1:], "launch.num_processes=2")
    assert numbers(running.run_dir) == expected
