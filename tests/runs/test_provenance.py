"""What provenance.json holds, and that it holds no secret."""

import hashlib
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.from_snapshot import COMPLETED
from llama_pretrain.config.secrets import REDACTED
from llama_pretrain.files import hash_file, read_json
from llama_pretrain.launch.operators import describe_operators
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.provenance import (
    MAX_CHANGES,
    add_provenance,
    collect_provenance,
    earlier_launches,
    hash_code,
    list_gpus,
    list_packages,
    write_changes,
)
from llama_pretrain.runs.status import Outcome, Status, write_status
from tests.conftest import ROOT
from tests.machines import resolve_for


def test_provenance_is_complete_and_quick() -> None:
    machine = asdict(detect_machine())
    began = time.perf_counter()
    found = collect_provenance(argv=["seed=1"], root=ROOT, machine=machine)
    seconds = time.perf_counter() - began
    print(f"collected in {seconds:.3f} s")
    assert seconds < 0.5  # 0.03 where nothing else runs
    assert found["argv"] == ["seed=1"]
    assert found["code"]["run.py"] == hash_code(ROOT)["run.py"]
    assert "llama_pretrain/train/loop.py" in found["code"]
    assert found["cpu_isa"] == sorted(found["cpu_isa"])
    assert {"torch", "transformers", "deepspeed", "hydra-core"} <= set(found["packages"])
    assert json.loads(json.dumps(found)) == found


def test_gpus_are_asked_of_the_driver(tmp_path: Path) -> None:
    """Its files as NVIDIA's kernel module writes them."""
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Tue Mar  5 22:42:15 UTC 2024\n"
    )
    for number in range(2):
        folder = tmp_path / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 57\n"
        (folder / "information").write_text(text)
    assert list_gpus(tmp_path) == [{"name": "NVIDIA H100 80GB HBM3", "driver": "535.161.08"}] * 2


def test_a_compiled_operator_is_known_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    words = ["debug=smoke", "zero=stage2_offload"]
    assert describe_operators(resolve_for("debug=smoke", "optim=torch_adamw")) == {}
    run = resolve_for(*words, "optim=cpu_adam")
    before = describe_operators(run)
    assert list(before["cpu_adam"]) == ["built_for"]
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").write_bytes(b"abc")
    found = describe_operators(run)["cpu_adam"]
    assert found == before["cpu_adam"] | {"sha256": hashlib.sha256(b"abc").hexdigest()}


def test_versions_are_those_that_python_finds() -> None:
    from importlib.metadata import version

    found = list_packages()
    for name in ("torch", "transformers", "deepspeed", "pyyaml", "rich", "hydra-core"):
        assert found[name] == version(name)


def test_only_listed_variables_are_kept_and_none_with_a_secret() -> None:
    variables = {
        "OMP_NUM_THREADS": "2",
        "NCCL_DEBUG": "INFO",
        "HOME": "/home/me",
        "HF_TOKEN": "opaque-v4lue",
        "NCCL_AUTH_TOKEN": "another",
        "TORCH_LOGS": "opaque-v4lue",
        "CUDA_CACHE_PATH": "https://me:pa55word@host",
        "PATH": "/bin",
    }
    argv = ["a=opaque-v4lue", "password=hunter2hunter"]
    found = collect_provenance(argv=argv, root=ROOT, machine={}, environment=variables)
    assert found["environment"] == {
        "CUDA_CACHE_PATH": f"https://{REDACTED}@host",
        "NCCL_AUTH_TOKEN": REDACTED,
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "2",
        "TORCH_LOGS": REDACTED,
    }
    assert found["argv"] == [f"a={REDACTED}", f"password={REDACTED}"]


def git(folder: Path, *words: str) -> None:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *own, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "run.py").write_text("a = 1\n")
    (folder / ".env").write_text("A=1\n")
    (folder / "big.txt").write_text("x\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


def all_text(folder: Path) -> str:
    return "\n".join(
        path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()
    )


def test_changes_are_kept_without_secrets(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept"
    assert write_changes(repository, target) is None
    token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
    (repository / "run.py").write_text(f"a = 2\ntoken = '{token}'\nb = 'opaque-v4lue'\n")
    (repository / ".env").write_text("A=s3cr3t-of-a-tracked-file\n")
    (repository / "big.txt").write_text("y" * (MAX_CHANGES + 1))
    (repository / "new.py").write_text("url = 'https://me:pa55word@host'\n")
    (repository / "deploy.pem").write_text("s3cr3t-of-a-pem")
    (repository / "aws_credentials").write_text("s3cr3t-of-aws")
    (repository / "data.bin").write_bytes(b"\x00\xff")
    private = tmp_path / "private"
    private.write_text("s3cr3t-behind-a-link")
    (repository / "link.py").symlink_to(private)
    (repository / "é ü.py").write_text("c = 3\n")
    words: dict[str, Any] = {"environment": {"MY_TOKEN": "opaque-v4lue"}}
    found = write_changes(repository, target, **words)
    assert not (target / "untracked").exists()
    assert write_changes(repository, target, include_untracked=True, **words) == found
    assert found == {
        "patch": True,
        "untracked": [
            {"name": name, "size": file.stat().st_size, "sha256": hash_file(file)}
            for name in ("new.py", "é ü.py")
            if (file := repository / name)
        ],
        "left_out": [
            ".env (its name)",
            "big.txt (its size)",
            "aws_credentials (its name)",
            "data.bin (not text)",
            "deploy.pem (its name)",
            "link.py (not a regular file)",
        ],
    }
    text = all_text(target)
    assert "+a = 2" in text
    assert (target / "untracked" / "é ü.py").read_text() == "c = 3\n"
    for secret in (token, "opaque", "s3cr3t", "pa55word"):
        assert secret not in text
    git(repository, "checkout", "run.py", "big.txt")
    (repository / "run.py").write_text("a = 2\n")
    write_changes(repository, target)
    git(repository, "checkout", "run.py")
    git(repository, "apply", str(target / "changes.patch"))  # it is a patch that git takes
    assert (repository / "run.py").read_text() == "a = 2\n"


def test_changes_are_bounded(repository: Path, tmp_path: Path) -> None:
    for number in range(5):
        (repository / f"{number}.txt").write_text("z" * (MAX_CHANGES // 3))
    found = write_changes(repository, tmp_path / "kept", include_untracked=True)
    assert found is not None
    assert found["left_out"] == ["3.txt (its size)", "4.txt (its size)"]
    assert len(all_text(tmp_path / "kept")) <= MAX_CHANGES + 10


def test_without_git_there_are_only_hashes(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text("a = 1\n")
    found = collect_provenance(argv=[], root=tmp_path, machine={})
    assert found["git_commit"] is None
    assert list(found["code"]) == ["run.py"]
    assert write_changes(tmp_path, tmp_path / "kept") is None


def test_a_resumed_run_keeps_what_it_was_made_with(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert earlier_launches(run_dir) == []
    for number in range(10):
        values: dict[str, Any] = {"python": number, "earlier_launches": earlier_launches(run_dir)}
        run_dir.provenance.write_text(json.dumps(values))
    assert [launch["python"] for launch in earlier_launches(run_dir)] == list(range(2, 10))
    add_provenance(run_dir, initial_weights="abc")
    assert (read_json(run_dir.provenance) or {})["initial_weights"] == "abc"


def test_an_error_is_written_without_its_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "opaque-v4lue")
    write_status(
        RunDir(tmp_path),
        Status.failed,
        Outcome(error="cannot open https://a:pa55w@h: opaque-v4lue"),
    )
    assert json.loads((tmp_path / "status.json").read_text())["error"] == (
        f"cannot open https://{REDACTED}@h: {REDACTED}"
    )


def test_runs_that_have_completed_are_known_everywhere() -> None:
    assert {status.value for status in Status if status.is_complete} == set(COMPLETED)


def test_other_runs_of_the_clone_are_not_recorded(repository: Path, tmp_path: Path) -> None:
    """With runs inside the clone, each would record the one before."""
    run = repository / "runs" / "first"
    (run / "ranks").mkdir(parents=True)
    for name in ("snapshot.yaml", "plan.json", "ranks/rank0.log"):
        (run / name).write_text("x")
    (repository / "runs" / "notes.md").write_text("mine")
    found = write_changes(repository, tmp_path / "kept")
    assert found is not None
    assert [item["name"] for item in found["untracked"]] == ["runs/notes.md"]
    assert found["left_out"] == []
