"""What provenance.json holds, how a secret is known, and that none is kept."""

import hashlib
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from llama_pretrain.config.compose import read_config, register
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.rewrite import COMPLETED, rewrite_argv
from llama_pretrain.config.secrets import (
    REDACTED,
    check_files,
    is_secret_file,
    is_secret_name,
    known_secrets,
    redact,
)
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.launch.operators import describe_operators
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.provenance import (
    CHANGES,
    add_provenance,
    collect_provenance,
    earlier_launches,
    hash_code,
    initial_weights,
    list_gpus,
    list_packages,
    read_provenance,
    render_provenance,
    write_changes,
)
from llama_pretrain.runs.status import Status, write_status
from tests.conftest import ROOT, compose_run

TOKENS = {
    "hugging-face": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx",
    "openai": "sk-" + "proj-0123456789abcdefABCDEF",
    "github": "ghp_" + "0123456789abcdefghijABCDEFGHIJ",
    "aws": "AKIA" + "0123456789ABCDEF",
    "slack": "xoxb-" + "1234567890-abcdef",
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
}
PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\n-----END OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_tokens_are_known_by_their_form(token: str) -> None:
    assert redact(f"a '{token}', b", known=[]) == f"a '{REDACTED}', b"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("password=hunter2hunter", "hunter2"),
        ("db.password: 12345678", "12345678"),
        ("clientSecret: 'abcdef'", "abcdef"),
        ('api_key: "two words"', "two words"),
        ('{"auth_token": "a1b2c3d4"}', "a1b2c3d4"),
        ("+HF_TOKEN=abcdef123456", "abcdef123456"),
        ("https://me:pa55word@host/x.git", "pa55word"),
        ("Authorization: Bearer abcdefghij0123456789", "abcdefghij"),
        (f"x\n{PRIVATE_KEY}\ny", "b3BlbnNzaC1r"),
        (PRIVATE_KEY.rpartition("\n")[0], "b3BlbnNzaC1r"),  # cut short
        ("it is pl41n-v4lue here", "pl41n-v4lue"),
    ],
)
def test_what_is_secret_is_cut_out_of_a_text(text: str, hidden: str) -> None:
    found = redact(text, known=["pl41n-v4lue"])
    assert hidden not in found
    assert REDACTED in found


@pytest.mark.parametrize(
    "text",
    [
        "tokens = tokenizer.encode(text)",
        "eos_token: '<|endoftext|>'",
        "token = first_token",
        "train.max_tokens=2_000_000",
        "batch.global_batch_tokens=4096",
        "password = getpass.getpass()",
        "num_key_value_heads: 128000",
        "num_token: 128000",
        "sorted(values, key=lambda value: value)",
        "https://example.org:8080/a@b",
        "a sketch of sk-learn",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, known=[]) == text


def test_no_shipped_file_looks_like_a_secret() -> None:
    assert list(check_files([ROOT / "conf", ROOT / "sweeps"])) == []


def test_names_of_secrets() -> None:
    secret = [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "monitor.password",
        "AWS_SECRET_ACCESS_KEY",
        "db_dsn",
        "PASSWORD_OF_DB",
        "a.my_token.0",
    ]
    plain = [
        "train.max_tokens",
        "eos_token",
        "data.text_field",
        "data.sources.secretary.paths.0",
        "PYTHONHASHSEED",
        "seed",
        "token_id",
    ]
    assert [name for name in secret + plain if is_secret_name(name)] == secret
    files = [".env", ".env.local", "a/id_rsa", "x.pem", ".netrc", "my_credentials.json", "b/.aws/x"]
    others = ["secrets.py", "train.py", "tokenizer.json", "keyboard.txt", "conf/model/tiny.yaml"]
    assert [name for name in files + others if is_secret_file(name)] == files


def test_a_secret_of_the_environment_is_known_by_its_value(tmp_path: Path) -> None:
    """Not a path, and nothing so short that it stands everywhere."""
    variables = {
        "MY_TOKEN": "opaque-value",
        "A_TOKEN": "1",
        "X_TOKEN": str(tmp_path),
        "HOME": "12345678",
        "PWD": "/a/folder/that/is/gone",
    }
    assert known_secrets(variables) == ["opaque-value"]
    assert known_secrets({"BIG_TOKEN": "x" * 10_000}) == ["x" * 10_000]


# The command line: Hydra writes its words to multirun.yaml and into the names of folders.


@pytest.mark.parametrize(
    ("word", "path"),
    [
        (f"monitor.wandb_project={TOKENS['hugging-face']}", "monitor.wandb_project"),
        ("train.sample_prompt=opaque-v4lue", "train.sample_prompt"),
        ("+deepspeed.extra.api_key=abcdefg", "deepspeed.extra.api_key"),
        ("hydra.job.env_set.HF_TOKEN=abcdefg", "hydra.job.env_set.HF_TOKEN"),
        ("data.paths=[https://me:pa55word@host/a.txt]", "data.paths"),
        (TOKENS["github"], "command line"),
        (f"+{TOKENS['aws']}=1", "command line"),
    ],
)
@pytest.mark.parametrize("more", [[], ["-m"]])
def test_a_secret_on_the_command_line_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, path: str, more: list[str]
) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "opaque-v4lue")
    with pytest.raises(UserError) as caught:
        rewrite_argv([*more, "seed=1", word], scratch=tmp_path)
    assert str(caught.value) == (
        f"{path}: holds what looks like a secret, and would be written to the run's files; leave it"
        " out: libraries read secrets from the environment or their own login"
    )


def test_pickles_of_hydra_are_not_opened(tmp_path: Path) -> None:
    for word in ("--experimental-rerun", "--exp"):
        with pytest.raises(UserError, match="--experimental-rerun: opens a pickle"):
            rewrite_argv([word, "config.pickle"], scratch=tmp_path)


def test_a_secret_in_a_config_file_stops_a_sweep(tmp_path: Path) -> None:
    """Hydra writes the whole config to multirun.yaml before it calls us."""
    folder = tmp_path / "mine" / "monitor"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"wandb_project: {TOKENS['slack']}\n")
    words = ["--config-dir", str(tmp_path / "mine"), "monitor=mine"]
    for more in (["-m"], ["--multi"], ["hydra.output_subdir=.hydra"]):
        with pytest.raises(UserError) as caught:
            rewrite_argv([*more, *words], scratch=tmp_path)
        assert str(caught.value).startswith(f"{folder}/mine.yaml: holds what looks like a secret")


def test_a_snapshot_with_a_secret_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = render_snapshot(compose_run(["monitor.wandb_project=opaque-v4lue"]))
    (tmp_path / "snapshot.yaml").write_text(text)
    monkeypatch.setenv("SOME_PASSWORD", "opaque-v4lue")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(UserError, match=r"^monitor\.wandb_project: holds what looks like a secret"):
        rewrite_argv([f"resume={tmp_path}"], scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


# Interpolations: what they resolve to would be written to the snapshot.


@pytest.mark.parametrize(
    "override",
    [
        "monitor.wandb_project=${oc.env:HF_TOKEN}",
        "monitor.wandb_project='${oc.env: HF_TOKEN, none}'",
        "monitor.wandb_project='${oc.env:${oc.env:INNOCENT}}'",
        "monitor.wandb_project='${oc.decode:${oc.env:HF_TOKEN}}'",
        "monitor.wandb_project=${oc.env:COPY}",
        "train.sample_prompt='a ${oc.env:HF_TOKEN} b'",
        "data.paths=['${oc.env:HF_TOKEN}']",
        "+deepspeed.extra.my_password=${oc.env:INNOCENT}",
        "+data.sources={a:{paths:['${oc.env:HF_TOKEN}']}}",
    ],
)
def test_a_secret_of_the_environment_is_not_resolved(
    monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    for name, value in (("HF_TOKEN", "opaque-v4lue"), ("COPY", "opaque-v4lue")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("INNOCENT", "HF_TOKEN")
    with pytest.raises(UserError) as caught:
        compose_run(["debug=smoke", override])
    assert "opaque" not in str(caught.value)
    assert "looks like a secret" in str(caught.value)


def test_other_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNOCENT", "here")
    register()
    values = {
        "a": "${oc.env:INNOCENT}",
        "b": "${oc.env:NOT_THERE,5}",
        "c": "${oc.env:NOT_THERE,null}",
    }
    config = OmegaConf.create(values)
    assert (config.a, config.b, config.c) == ("here", "5", None)
    with pytest.raises(UserError, match="NOT_THERE is not set"):
        read_config(OmegaConf.create({"seed": "${oc.env:NOT_THERE}"}))


def test_a_text_that_no_snapshot_can_keep_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.sample_prompt: has a text that a snapshot can't"):
        compose_run([r"train.sample_prompt='\${HOME}'"])


# provenance.json


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
    assert json.loads(render_provenance(found)) == json.loads(json.dumps(found))


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
    assert describe_operators(compose_run(["debug=smoke", "optim=torch_adamw"])) == {}
    run = compose_run([*words, "optim=cpu_adam"])
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
    token = TOKENS["hugging-face"]
    (repository / "run.py").write_text(f"a = 2\ntoken = '{token}'\nb = 'opaque-v4lue'\n")
    (repository / ".env").write_text("A=s3cr3t-of-a-tracked-file\n")
    (repository / "big.txt").write_text("y" * (CHANGES + 1))
    (repository / "new.py").write_text(f"url = 'https://me:pa55word@host'\n{PRIVATE_KEY}\n")
    (repository / "deploy.pem").write_text("s3cr3t-of-a-pem")
    (repository / "aws_credentials").write_text("s3cr3t-of-aws")
    (repository / "data.bin").write_bytes(b"\x00\xff")
    private = tmp_path / "private"
    private.write_text("s3cr3t-behind-a-link")
    (repository / "link.py").symlink_to(private)
    (repository / "é ü.py").write_text("c = 3\n")
    found = write_changes(repository, target, environment={"MY_TOKEN": "opaque-v4lue"})
    assert found == {
        "patch": True,
        "untracked": ["new.py", "é ü.py"],
        "left_out": [
            ".env (its name)",
            "big.txt (its size)",
            "aws_credentials (its name)",
            "data.bin (no text)",
            "deploy.pem (its name)",
            "link.py (no plain file)",
        ],
    }
    text = all_text(target)
    assert "+a = 2" in text
    assert (target / "untracked" / "é ü.py").read_text() == "c = 3\n"
    for secret in (token, "opaque", "s3cr3t", "pa55word", "b3BlbnNzaC1r"):
        assert secret not in text
    git(repository, "checkout", "run.py", "big.txt")
    (repository / "run.py").write_text("a = 2\n")
    write_changes(repository, target)
    git(repository, "checkout", "run.py")
    git(repository, "apply", str(target / "changes.patch"))  # it is a patch that git takes
    assert (repository / "run.py").read_text() == "a = 2\n"


def test_changes_are_bounded(repository: Path, tmp_path: Path) -> None:
    for number in range(5):
        (repository / f"{number}.txt").write_text("z" * (CHANGES // 3))
    found = write_changes(repository, tmp_path / "kept")
    assert found is not None
    assert found["left_out"] == ["3.txt (its size)", "4.txt (its size)"]
    assert len(all_text(tmp_path / "kept")) <= CHANGES + 10


def test_without_git_there_are_hashes_alone(tmp_path: Path) -> None:
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
        run_dir.provenance.write_text(render_provenance(values))
    assert [launch["python"] for launch in earlier_launches(run_dir)] == list(range(2, 10))
    add_provenance(run_dir, initial_weights="abc")
    assert read_provenance(run_dir)["initial_weights"] == "abc"
    run_dir.provenance.write_text("{")
    assert read_provenance(run_dir) == {}


def test_the_first_line_of_the_metrics_has_the_weights(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert initial_weights(run_dir) is None
    run_dir.metrics.write_text('{"step": 0, "tokens": 0, "initial_weights": "abc"}\n')
    assert initial_weights(run_dir) == "abc"


def test_an_error_is_written_without_its_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "opaque-v4lue")
    write_status(
        RunDir(tmp_path), Status.failed, error="can't open https://a:pa55w@h: opaque-v4lue"
    )
    assert json.loads((tmp_path / "status.json").read_text())["error"] == (
        f"can't open https://{REDACTED}@h: {REDACTED}"
    )


def test_runs_that_have_completed_are_known_everywhere() -> None:
    assert {status.value for status in Status if status.is_complete} == set(COMPLETED)
