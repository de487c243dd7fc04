"""`reproduce=DIR`: the same run again, to the bit; what has drifted; and no secret in any file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.runs.layout import RunDir
from tests.conftest import OPERATORS, ROOT, SMALL, Command, Runner
from tests.e2e.test_parity import at_stage
from tests.e2e.test_resume import forget_after, numbers

SHORT = split(
    "train.max_steps=4 train.eval_every_steps=2 train.eval_sequences=4 train.sample_tokens=8"
    " checkpoint.export=false checkpoint.at_end=false batch.global_batch_size=4"
)
"""The default run, but for its length, its samples' and the sequences of a step."""
SECRET = "opaque-v4lue-of-a-token"


def read_reproduction(done: Command) -> Any:
    return json.loads(done.run_dir.reproduction.read_text())


def status(done: Command) -> str:
    return str(json.loads(done.run_dir.status.read_text())["status"])


def reproduce(runner: Runner, of: Path, *words: str, **options: Any) -> Command:
    folder = runner.folder / f"again{len(list(runner.folder.iterdir()))}"
    place = f"hydra.run.dir={folder}"
    return runner.bare(f"reproduce={of}", place, *words, run_dir=RunDir(folder), **options)


@pytest.fixture(scope="module")
def original(shared_runner: Runner) -> Command:
    return shared_runner("train.max_steps=4", "checkpoint.every_steps=2")


def test_the_same_run_again(shared_runner: Runner, original: Command) -> None:
    again = reproduce(shared_runner, original.run_dir.path)
    assert numbers(again) == numbers(original)
    assert again.rows("initial_weights") == original.rows("initial_weights")
    assert again.run_dir.snapshot.read_text() == original.run_dir.snapshot.read_text()
    assert re.search(r"can change results: none\n +can change bits: none\n", again.output)
    assert f"reproduced: bitwise equal to {original.run_dir.path} in all 4 steps" in again.output
    assert (status(again), read_reproduction(again)["drift"]) == ("reproduced", [])
    provenance = json.loads(again.run_dir.provenance.read_text())
    assert provenance["initial_weights"] == again.rows("initial_weights")[0]["initial_weights"]
    assert provenance["seeds"]["seed"] == 1234
    snapshot = load_snapshot(again.run_dir.snapshot)
    assert provenance["threads"]["ranks"] == snapshot.launch.num_processes
    assert provenance["data"]["hash"] == snapshot.data.hash
    assert "bitwise equal" in again.run_dir.report.read_text()


def test_another_seed_is_the_likeliest_cause(shared_runner: Runner, original: Command) -> None:
    done = reproduce(shared_runner, original.run_dir.path, "seed=5", "drift=error", expect=1)
    assert status(done) == "diverged"
    assert "at step 1: sample ids" in done.output
    cause = "the most likely cause (config): seed: 1234 -> 5 (asked for on the command line)"
    assert cause in done.output
    assert "Traceback" not in done.output


def test_a_package_that_has_changed_is_refused(
    runner: Runner, original: Command, tmp_path: Path
) -> None:
    shutil.copytree(original.run_dir.path, tmp_path / "of")
    of = RunDir(tmp_path / "of")
    values = json.loads(of.provenance.read_text())
    values["packages"]["torch"] = "1.0.0"
    values["code"]["llama_pretrain/train/loop.py"] = "0" * 64
    of.provenance.write_text(json.dumps(values))
    refused = reproduce(runner, of.path, "drift=error", expect=1)
    assert re.search(r"torch: was 1\.0\.0 \(got 2[^)]*\)\. To start anyway", refused.output)
    assert "llama_pretrain/train/loop.py: was 000000000000 (got " in refused.output
    assert not refused.run_dir.path.exists()
    done = reproduce(runner, of.path)
    assert "versions: torch: 1.0.0 -> 2" in done.output
    assert status(done) == "reproduced"


@pytest.mark.slow
def test_a_byte_of_the_data_that_has_changed_is_named(runner: Runner, tmp_path: Path) -> None:
    text = tmp_path / "text"
    shutil.copytree(runner.corpus, text, ignore=shutil.ignore_patterns("__pycache__"))
    words = (f"data.paths=['{text}/*.py']", "tokenizer.vocab_size=300")
    first = runner(*words)
    file = text / "message.py"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    refused = reproduce(runner, first.run_dir.path, expect=1).output
    assert f"data: {file}: " in refused
    assert "data.hash: the data and its tokenizer are" in refused
    done = reproduce(runner, first.run_dir.path, "data.hash=null", "drift=error", expect=1)
    assert status(done) == "diverged"
    assert f"the most likely cause (data): {file}: " in done.output


@pytest.mark.slow
def test_an_interrupted_reproduction_ends_with_its_verdict(
    runner: Runner, original: Command
) -> None:
    done = reproduce(runner, original.run_dir.path)
    forget_after(done, step=2)
    done.run_dir.status.write_text('{"status": "running"}')
    again = runner.bare(f"resume={done.run_dir.path}", run_dir=done.run_dir)
    assert f"reproduced: bitwise equal to {original.run_dir.path} in all 4 steps" in again.output
    assert status(again) == "reproduced"
    launches = json.loads(again.run_dir.provenance.read_text())["earlier_launches"]
    assert [launch["argv"][0] for launch in launches] == [f"reproduce={original.run_dir.path}"]


@pytest.mark.slow
def test_a_sweep_of_a_snapshot(runner: Runner, original: Command, tmp_path: Path) -> None:
    """Its jobs in folders of their own."""
    sweep = tmp_path / "sweep"
    words = (f"reproduce={original.run_dir.path}", "-m", "seed=1,1234", f"hydra.sweep.dir={sweep}")
    done = runner.bare(*words)
    folders = sorted(path.parent for path in sweep.glob("*/snapshot.yaml"))
    assert [path.name[:-9] for path in folders] == ["00-seed=1", "01-seed=1234"]
    assert "2 jobs: 1 diverged, 1 reproduced" in done.output
    logs = [(path / "console.log").read_text() for path in folders]
    assert ["most likely cause" in log for log in logs] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(s, n) for n in (1, 2) for s in range(4)])
def test_the_default_run_is_reproduced_to_the_bit(
    runner: Runner, cache_dir: Path, stage: int, ranks: int
) -> None:
    words = (*SHORT, *at_stage(stage), f"launch.num_processes={ranks}")
    run_dir = RunDir(runner.folder / "first")
    place = (f"data.cache_dir={cache_dir}", f"hydra.run.dir={run_dir.path}")
    first = runner.bare(*words, *place, run_dir=run_dir)
    again = reproduce(runner, run_dir.path, "drift=error")
    assert f"reproduced: bitwise equal to {run_dir.path} in all 4 steps" in again.output
    assert len(numbers(first)) == 4
    for rows in (numbers, lambda done: done.rows("eval_loss")):
        assert rows(again) == rows(first)
    assert again.run_dir.snapshot.read_text() == run_dir.snapshot.read_text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project without git, whose files may be edited."""
    folder = tmp_path / "project"
    for name in ("llama_pretrain", "conf", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", folder)
    return folder


@pytest.mark.slow
def test_an_edited_project_reads_the_snapshot_and_names_the_changed_code(
    project: Path, cache_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    """conf/ has other values, lacks a group, and has files in the way of the snapshot's."""

    def call(*words: str) -> str:
        command = [sys.executable, str(project / "run.py"), *words]
        environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(project)} | OPERATORS
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    paths = (f"data.paths=['{corpus}/*.py']", f"data.cache_dir={cache_dir}")
    first = RunDir(tmp_path / "first")
    call(*SMALL, *paths, f"hydra.run.dir={first.path}")
    conf = project / "conf"
    text = (conf / "config.yaml").read_text()
    (conf / "config.yaml").write_text(text.replace("learning_rate: 1.0e-3", "learning_rate: 9"))
    (conf / "model" / "tiny.yaml").write_text("name: other\nhidden_size: 64\n")
    shutil.rmtree(conf / "schedule")
    for name in ("snapshot", "run_schema"):
        (conf / f"{name}.yaml").write_text("seed: 666\nhydra: {run: {dir: elsewhere}}\n")
    again = RunDir(tmp_path / "again")
    output = call(f"reproduce={first.path}", f"hydra.run.dir={again.path}", "drift=error")
    assert f"reproduced: bitwise equal to {first.path} in all 3 steps" in output
    assert first.snapshot.read_text() == again.snapshot.read_text()
    file = project / "llama_pretrain" / "train" / "loss.py"
    text = file.read_text()
    file.write_text(text.replace("return losses[0] if", "return losses[0] * 1.001 if"))
    assert file.read_text() != text
    output = call(f"reproduce={first.path}", f"hydra.run.dir={tmp_path}/changed")
    assert re.search(r"code: llama_pretrain/train/loss\.py: \w{12} -> \w{12}\n", output)
    assert "the most likely cause (code): llama_pretrain/train/loss.py: " in output


def files_with(folder: Path, secret: str) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if secret in path.name or (path.is_file() and secret.encode() in path.read_bytes())
    ]


SECRETS = {
    "HF_TOKEN": SECRET,
    "WANDB_API_KEY": f"{SECRET}2",
    "NCCL_NET_PLUGIN": f"has {SECRET} in it",
    "TORCH_OF_OURS": f"https://me:{SECRET}@host",
    "UNLISTED": f"more of {SECRET}",
}


def test_a_run_in_an_environment_of_secrets_writes_none(runner: Runner, tmp_path: Path) -> None:
    """Its logs, events, report, card and all the rest: every file of the run directory."""
    words = split("monitor=tensorboard checkpoint.at_end=true checkpoint.export=true")
    done = runner(*words, f"hydra.run.dir={tmp_path}/run", variables=SECRETS)
    assert done.run_dir.report.is_file()
    assert len(list(done.run_dir.path.rglob("*"))) > 20
    assert files_with(tmp_path, SECRET) == []
    kept = json.loads(done.run_dir.provenance.read_text())["environment"]
    assert kept["NCCL_NET_PLUGIN"] == "has [redacted] in it"


@pytest.mark.filterwarnings("ignore:Callback SweepCallback:UserWarning")  # Hydra's, before ours
@pytest.mark.parametrize(
    "words",
    [
        *("monitor.wandb_project=${oc.env:HF_TOKEN}", "hydra.run.dir=out/${oc.env:HF_TOKEN}"),
        "-m seed=1,2 monitor.wandb_project=${oc.env:HF_TOKEN}",
        f"-m train.sample_prompt=a,{SECRET}",
        f"monitor.wandb_project={SECRET} hydra.output_subdir=.hydra",
        "-m seed=1,2 hydra.sweep.dir=out/${oc.env:HF_TOKEN}",
        "--config-dir mine monitor=mine -m seed=1,2",
        "--config-dir mine monitor=mine hydra.output_subdir=.hydra",
        "--config-dir mine monitor=interpolated -m seed=1,2",
    ],
)
def test_a_secret_in_a_config_reaches_no_file(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    mine = tmp_path / "mine" / "monitor"
    mine.mkdir(parents=True)
    if "monitor=mine" in words:
        (mine / "mine.yaml").write_text(f"wandb_project: {SECRET}\n")
    (mine / "interpolated.yaml").write_text("wandb_project: ${oc.env:HF_TOKEN}\n")
    output = runner.bare(*split(words), "debug=smoke", expect=1).output
    assert "secret" in output
    assert SECRET not in output
    assert "Traceback" not in output
    assert [path for path in files_with(tmp_path, SECRET) if "/mine.yaml" not in path] == []
