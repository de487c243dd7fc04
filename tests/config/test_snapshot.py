"""Composing, names, snapshots."""

from pathlib import Path

import pytest

from llama_pretrain.config.command_line import parse_command_line
from llama_pretrain.config.compose import name_run
from llama_pretrain.config.from_snapshot import words_for_hydra
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.snapshot import load_snapshot, render_snapshot
from llama_pretrain.config.validate import unknown_key
from llama_pretrain.plan.resolve import resolve
from tests.conftest import compose_run
from tests.machines import CLUSTER, resolve_for


def test_folder_names_of_a_sweep() -> None:
    assert name_run(["zero=stage1", "seed=2"]) == "zero=stage1,seed=2"
    assert name_run(["data.paths=[/a/b c]"]) == "data.paths=-a-b-c"
    assert name_run([]) == "run"
    long = name_run(["x" * 300])
    assert len(long) == 80
    assert long != name_run(["x" * 301])


@pytest.mark.parametrize(
    ("seen", "hint"),
    [
        ("optim.learning_rte", "Did you mean optim.learning_rate?"),
        ("train.warmup_steps", "Did you mean schedule.warmup_steps?"),
        ("completely.elsewhere", "docs/configuration.md lists all settings"),
    ],
)
def test_unknown_keys_get_the_nearest_name(seen: str, hint: str) -> None:
    assert unknown_key(seen, got="x").hint == hint


def rewrite(words: list[str], *, scratch: Path) -> list[str]:
    return words_for_hydra(parse_command_line(words), scratch=scratch)


def test_resume_becomes_a_run_of_the_snapshot(tmp_path: Path) -> None:
    text = render_snapshot(resolve(compose_run(["seed=7"]), CLUSTER))
    (tmp_path / "snapshot.yaml").write_text(text)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = rewrite([f"resume={tmp_path}", "train.max_steps=7"], scratch=scratch)
    assert words[:4] == ["--config-path", str(scratch), "--config-name", "snapshot"]
    assert (scratch / "snapshot.yaml").read_text() == text
    assert f"hydra.run.dir='{tmp_path}'" in words
    assert f"resume.run_dir='{tmp_path}'" in words
    assert words[-1] == "train.max_steps=7"
    words = rewrite(["-m", f"reproduce={tmp_path}", "seed=1,2"], scratch=scratch)
    assert words[4] == "--multirun"
    assert words[-1] == "seed=1,2"
    assert rewrite(["zero=stage3"], scratch=scratch) == ["zero=stage3"]
    words = rewrite([f"reproduce={tmp_path}", "seed=2"], scratch=scratch)
    assert not [word for word in words if word.startswith(("reproduce", "resume"))]
    for other in ("-m", "hydra.run.dir=x"):
        with pytest.raises(UserError, match="continues in the run's own directory"):
            rewrite([f"resume={tmp_path}", other], scratch=scratch)


def test_seed_0_is_a_seed() -> None:
    assert compose_run(["seed=0"]).seed == 0


def test_a_snapshot_of_another_version_is_one_problem(tmp_path: Path) -> None:
    text = render_snapshot(resolve_for("debug=smoke"))
    path = tmp_path / "snapshot.yaml"
    path.write_text(text.replace("deepspeed:\n", "deepspeed:\n  a: 1\n  b: 2\n  c: 3\n"))
    with pytest.raises(UserError) as caught:
        load_snapshot(path)
    (problem,) = caught.value.problems
    assert "was written by another version" in problem.message
