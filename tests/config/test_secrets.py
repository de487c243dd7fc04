"""How a secret is recognized, and that none gets into a run's files."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from llama_pretrain.config.command_line import parse_command_line
from llama_pretrain.config.compose import read_config, register
from llama_pretrain.config.from_snapshot import words_for_hydra
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.secrets import (
    REDACTED,
    find_secret_files,
    is_secret_file,
    is_secret_name,
    known_secrets,
    redact,
)
from llama_pretrain.config.snapshot import render_snapshot
from tests.conftest import ROOT, compose_run
from tests.machines import resolve_for

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


CASES = yaml.safe_load((Path(__file__).parent / "secrets.yaml").read_text())
PGP_KEY = PRIVATE_KEY.replace("OPENSSH", "PGP").replace("KEY--", "KEY BLOCK--")
KEYS = [
    (f"x\n{PRIVATE_KEY}\ny", "b3BlbnNzaC1r"),
    (PRIVATE_KEY.rpartition("\n")[0], "b3BlbnNzaC1r"),  # cut short
    (PGP_KEY, "b3BlbnNzaC1r"),
    ("ya29." + "a0AfH6SMBxxxxxxxxxxxxxxx", "a0AfH6"),  # in parts, for scanners of repositories
    ("SG." + "abcdefghijklmnop1234.abcdefghijklmnop1234", "abcdefghij"),
    ("AGE-SECRET-" + "KEY-1QQPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", "1QQPZRY"),
]


@pytest.mark.parametrize(("text", "hidden"), [*CASES["hidden"], *KEYS])
def test_what_is_secret_is_cut_out_of_a_text(text: str, hidden: str) -> None:
    found = redact(text, known=["pl41n-v4lue"])
    assert hidden not in found
    assert REDACTED in found


@pytest.mark.parametrize("text", CASES["stays"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, known=[]) == text


def test_no_shipped_file_looks_like_a_secret() -> None:
    assert list(find_secret_files([ROOT / "conf", ROOT / "sweeps"])) == []


def test_names_of_secrets() -> None:
    for kind, is_secret in (("names", is_secret_name), ("files", is_secret_file)):
        secret, plain = CASES[f"secret_{kind}"], CASES[f"plain_{kind}"]
        assert [name for name in secret + plain if is_secret(name)] == secret


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
    problem, *_ = parse_command_line([*more, "seed=1", word]).problems
    assert str(problem) == (
        f"{path}: looks like a secret, and would be written to the run's files. Remove it:"
        " libraries read secrets from the environment or their own login."
    )


def test_pickles_of_hydra_are_not_opened(tmp_path: Path) -> None:
    for word in ("--experimental-rerun", "--exp"):
        (problem,) = parse_command_line([f"{word}=config.pickle"]).problems
        assert str(problem).startswith("--experimental-rerun: opens a pickle")


def test_a_secret_in_a_config_file_stops_a_sweep(tmp_path: Path) -> None:
    """Hydra writes the whole config to multirun.yaml before it calls us."""
    folder = tmp_path / "mine" / "monitor"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"wandb_project: {TOKENS['slack']}\n")
    words = ["--config-dir", str(tmp_path / "mine"), "monitor=mine"]
    for more in (["-m"], ["--multi"], ["hydra.output_subdir=.hydra"]):
        (problem,) = parse_command_line([*more, *words]).problems
        assert str(problem).startswith(f"{folder}/mine.yaml: looks like a secret")


def test_a_snapshot_with_a_secret_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = render_snapshot(resolve_for("monitor.wandb_project=opaque-v4lue"))
    (tmp_path / "snapshot.yaml").write_text(text)
    monkeypatch.setenv("SOME_PASSWORD", "opaque-v4lue")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(UserError, match=r"^monitor\.wandb_project: looks like a secret"):
        words_for_hydra(parse_command_line([f"resume={tmp_path}"]), scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


# Interpolations: what they resolve to would be written to the snapshot.


@pytest.mark.parametrize("override", CASES["interpolations"])
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
    with pytest.raises(
        UserError, match=r"train\.sample_prompt: holds text that a snapshot cannot hold"
    ):
        compose_run([r"train.sample_prompt='\${HOME}'"])
