"""Lose parts of runs on several nodes at random moments, and interrupt a run of Slurm.

    python benchmarks/nodes.py --losses 30 [--seed 0] [--results FILE]
    python benchmarks/nodes.py --preemptions 10 [--grace-s 10]

The hosts are namespaces of this machine (tests/hosts.py), with a real sshd and a real Slurm. A
rank, an agent, a host or a link is lost in training, in a save, or in an evaluation. Half of the
runs restart by themselves. The others must end in time, name what was lost, leave no process and no
torn checkpoint, and complete with `resume` on this machine. The second command submits a run, which
time limits and other jobs interrupt until it has completed. Losses and weights must equal those of
an uninterrupted run on one machine, to the bit. It exits with 1 if anything is wrong.
"""

import argparse
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import CalledProcessError

from benchmarks.faults import pieces
from benchmarks.record import write_record
from llama_pretrain.checkpoint.manifest import find_fault, list_folders, newest_of
from llama_pretrain.files import read_json
from llama_pretrain.launch.rendezvous import LOST_S
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EventRow, StepRow, read_metrics
from tests.conftest import run_cli
from tests.e2e.test_nodes import Job, job, numbers, train_here
from tests.hosts import hosts, slurm_on, why_not

STEPS, EVAL_EVERY, TIMEOUT_S = 300, 25, 8
LIMIT_S, RESTART_S = TIMEOUT_S + LOST_S + 2, 180.0
"""What living hosts have after a loss to end everything, or else to restart and complete."""
RUN = shlex.split(f"""train.max_steps={STEPS} train.eval_every_steps={EVAL_EVERY}
    train.eval_sequences=192 checkpoint.every_steps=20
    launch.threads_per_process=1 launch.timeout_s={TIMEOUT_S} launch.num_processes=1""")
SETTINGS = ("precision=fp32", "precision=bf16 zero=stage2", "precision=bf16 zero=stage3")
RETURNING = (("rank", None), ("command", 1), ("link", 1))
"""What may be lost and come back, and the node that has it; `None` = any."""
LOSSES = (*RETURNING, ("host", 1), ("host", 0), ("command", 0))
SUBMITTED = shlex.split("""train.max_steps=200 train.eval_every_steps=50 precision=fp32
    model.hidden_size=256 model.intermediate_size=704 data.sequence_length=128
    batch.global_batch_size=96 launch.threads_per_process=1""")
SLURM = shlex.split("""launch=slurm launch.nodes=2 launch.num_processes=1 launch.slurm.time=1
    launch.slurm.signal_s=45 launch.slurm.partition=free launch.slurm.wait=true""")
OTHER_JOB = shlex.split("sbatch --partition=high --nodes=2 --cpus-per-task=2 --wrap 'sleep 1'")


@dataclass
class Trial:
    """One loss, and what came of it."""

    number: int
    launcher: str
    num_nodes: int
    settings: str
    lost: str
    """`rank`, `command` (with ssh, the agent of node 1), `host` or `link`."""
    node: int
    restarts: bool
    phase: str
    step: int = 0
    ended_s: float = 0.0
    """From the loss to the end of the last process on a living host."""
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def describe(self) -> str:
        where = f"{self.launcher:8} {self.num_nodes} nodes  {self.lost} of node {self.node}"
        right = "restarted, equal" if self.restarts else "ended, resumed, equal"
        outcome = f"WRONG: {self.wrong}" if self.wrong else f"{right} ({self.ended_s:.1f} s)"
        return f"{self.number:3} {where} lost in {self.phase}, step {self.step}: {outcome}"


def draw(number: int, chance: random.Random) -> Trial:
    """Choose a run, and what it is to lose."""
    restarts, count = number % 2 == 0, chance.choice((2, 2, 2, 3))
    lost, node = chance.choice(RETURNING if restarts else LOSSES)
    node = chance.randrange(count) if node is None else node
    launcher, settings = chance.choice(("ssh", "torchrun")), chance.choice(SETTINGS)
    phase = chance.choice(("training", "a save", "an evaluation"))
    return Trial(number, launcher, count, settings, lost, node, restarts, phase)


def find_phase(run_dir: RunDir) -> tuple[str, int]:
    """What a run is doing, and after which step."""
    last = read_metrics(run_dir.metrics)[-1]
    if any(run_dir.checkpoints.glob(".tmp-step-*")):
        return "a save", last.step
    evaluates = isinstance(last, StepRow) and last.step % EVAL_EVERY == 0
    return "an evaluation" if evaluates else "training", last.step


def wait_for_moment(running: Job, trial: Trial, chance: random.Random) -> None:
    """Wait for a random moment of a phase, after the first checkpoint. Notes what it has hit."""
    running.wait_for_step(chance.randrange(2 * EVAL_EVERY, STEPS - 3 * EVAL_EVERY))
    while find_phase(running.run_dir)[0] != trial.phase and running.commands[0].poll() is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03))
    trial.phase, trial.step = find_phase(running.run_dir)


def prepare_loss(running: Job, trial: Trial) -> Callable[[], object]:
    """Find what is to be lost. Calling the result loses it at once."""
    host, node = running.machines[trial.node], trial.node
    if trial.lost == "host":
        return host.die
    if trial.lost == "link":
        return lambda: host.set_link("down")
    command = "launch.agent" if running.ssh and node > 0 else "run.py"
    pid = running.rank_on(node) if trial.lost == "rank" else running.process_on(node, command)
    return lambda: host.run("kill", "-9", str(pid))


def wait_for_end(running: Job, trial: Trial, words: list[str]) -> None:
    """Wait until no command and no process is left; meanwhile what was lost comes back."""
    began, commands, cut = time.monotonic(), running.commands, trial.lost == "link"
    deadline = began + (RESTART_S if trial.restarts else LIMIT_S)
    while any(each.poll() is None for each in commands) and time.monotonic() < deadline:
        if trial.restarts and cut and "restart 1 of" in running.output():
            running.machines[trial.node].set_link("up")
            cut = False
        for node, command in enumerate(commands):
            if trial.restarts and node > 0 and command.poll() and commands[0].poll() is None:
                running.start_on(node, *running.torchrun(node), *words)  # as a platform does
                commands[node] = commands.pop()
        time.sleep(0.05)
    if any(each.poll() is None for each in commands):
        trial.wrong["hung"] = [running.output()[-2000:]]
    deadline = max(began + LIMIT_S, time.monotonic() + 5)
    while (left := list_processes(running)) and time.monotonic() < deadline:
        time.sleep(0.1)
    trial.ended_s = time.monotonic() - began
    if left:
        trial.wrong["left"] = left


def list_processes(running: Job) -> list[str]:
    """What runs on the living hosts, but for sshd."""
    living = [host for host in running.machines if host.init.poll() is None]
    return [words for host in living for words in host.processes() if "sshd" not in words]


def check_end(running: Job, trial: Trial) -> None:
    """A run that has ended must say what was lost, and must have no torn checkpoint."""
    node, run_dir, status = trial.node, running.run_dir, read_json(running.run_dir.status) or {}
    codes = [each.poll() for each in running.commands]
    if not trial.restarts and trial.lost in ("command", "host"):
        del codes[node : node + 1]
    if set(codes) - {0 if trial.restarts else 1}:
        trial.wrong["exit codes"] = [str(codes)]
    if trial.restarts and not (status.get("status") == "completed" and status.get("restarts")):
        trial.wrong["restarts"] = [str(status)]
    if not trial.restarts and (node > 0 or trial.lost == "rank"):  # node 0 lives
        named = f"rank {node} on node {node} (" in running.output()
        if (status.get("status"), status.get("rank"), named) != ("failed", node, True):
            trial.wrong["not named"] = [str(status), running.output()[-2000:]]
    faults = {each.name: find_fault(each) for each in list_folders(run_dir.checkpoints)}
    if torn := [f"{name} {fault}" for name, fault in faults.items() if fault is not None]:
        trial.wrong["torn"] = torn


def results_of(run_dir: RunDir) -> object:
    """What must be equal to the bit: the numbers of all steps, and the last checkpoint."""
    last = newest_of(run_dir.checkpoints)
    return numbers(run_dir), None if last is None else (last.name, pieces(last))


def run_trial(trial: Trial, folder: Path, chance: random.Random) -> None:
    """Run one to its end, resume it on this machine, and compare; what is wrong is kept."""
    place, ranks = folder / f"trial{trial.number:02d}", f"launch.num_processes={trial.num_nodes}"
    place.mkdir()
    words = [*RUN, *trial.settings.split(), f"launch.max_restarts={3 * trial.restarts}"]
    try:
        with job(place, trial.num_nodes, ssh=trial.launcher == "ssh") as running:
            running.start(*words)
            running.wait_for_step(1)
            lose = prepare_loss(running, trial)
            wait_for_moment(running, trial, chance)
            lose()
            wait_for_end(running, trial, words)
            check_end(running, trial)
        if not trial.restarts:
            run_cli(f"resume={place}/run", "launch=local", ranks, cwd=place).check_returncode()
        alone = folder / f"one-{SETTINGS.index(trial.settings)}-{trial.num_nodes}"
        if not alone.exists():
            train_here(alone, *RUN, *trial.settings.split(), ranks)
        if results_of(running.run_dir) != results_of(RunDir(alone)):
            trial.wrong["differs"] = [str(alone)]
    except (AssertionError, OSError, ValueError, CalledProcessError) as error:
        trial.wrong[type(error).__name__] = [str(error)[-2000:]]


def lose_parts(folder: Path, options: argparse.Namespace) -> bool:
    """Run the trials. Returns whether all were right."""
    chance = random.Random(options.seed)
    trials = [draw(number, chance) for number in range(options.losses)]
    for trial in trials:
        run_trial(trial, folder, chance)
        print(trial.describe(), flush=True)
    right = [trial for trial in trials if not trial.wrong]
    keys = {"hung": "hung", "left": "processes left", "torn": "torn checkpoints"}
    counts = {key: sum(len(trial.wrong.get(key, ())) for trial in trials) for key in keys}
    wrong = ", ".join(f"{counts[key]} {name}" for key, name in keys.items())
    again = f"{sum(trial.restarts for trial in right)} restarted and equal to the bit"
    print(f"{len(trials)} losses: {len(right)} ended as described, {wrong}; {again}")
    if options.results is not None:
        path, values = options.results, {"trials": [asdict(trial) for trial in trials]}
        write_record(path.stem, values, packages=("torch", "deepspeed"), folder=path.parent)
    return len(right) == len(trials)


def preempt(folder: Path, options: argparse.Namespace) -> bool:
    """Submit a run, and interrupt every third life of its job. Returns whether it was right."""
    (folder / "slurm").mkdir()
    more = f"PartitionName=free Nodes=a,b PriorityTier=1 GraceTime={options.grace_s} State=UP"
    with hosts(2) as two, slurm_on(two, folder / "slurm", more=more) as variables:
        running, preempted = Job(folder, two), {0}
        words, run_dir = running.words(*SUBMITTED, *SLURM), running.run_dir
        command = two[0].start(words, output=folder / "command.log", env=variables)
        while command.poll() is None:
            rows = read_metrics(run_dir.metrics)
            life = sum(isinstance(row, EventRow) and bool(row.resumed) for row in rows)
            if rows and isinstance(rows[-1], StepRow) and life % 3 == 0 and life not in preempted:
                preempted.add(life)
                two[0].start(OTHER_JOB, output=folder / "other.log", env=variables).wait()
            time.sleep(0.5)
    log = "".join(path.read_text() for path in run_dir.path.glob("slurm-*.log"))
    limits, others = (log.count(f"preempted by {name}") for name in ("SIGUSR1", "SIGTERM"))
    train_here(folder / "one", *SUBMITTED, "launch.num_processes=2")
    equal = results_of(run_dir) == results_of(RunDir(folder / "one"))
    print(f"{limits + others} interruptions: {limits} by time limits, {others} by other jobs")
    print(f"exit code {command.returncode}; losses and weights equal to the bit: {equal}")
    return command.returncode == 0 and equal and limits + others >= options.preemptions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--losses", type=int, default=30)
    parser.add_argument("--preemptions", type=int, default=0)
    parser.add_argument("--grace-s", type=int, default=10, help="that a preempted job has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="JSON file of the losses")
    options, folder = parser.parse_args(), Path(tempfile.mkdtemp(prefix="nodes-"))
    if reason := why_not():
        parser.error(f"several hosts: {reason}")
    if (preempt if options.preemptions else lose_parts)(folder, options):
        shutil.rmtree(folder)
        return 0
    print(f"the runs are in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
