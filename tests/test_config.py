"""Composing, names, snapshots."""

from pathlib import Path

import pytest

from llama_pretrain.config.compose import name_run
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.rewrite import rewrite_argv
from llama_pretrain.config.snapshot import load_snapshot, render_snapshot
from llama_pretrain.config.validate import unknown_key
from tests.conftest import compose_run


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
        ("optim.learning_rte", "did you mean optim.learning_rate?"),
        ("train.warmup_steps", "did you mean schedule.warmup_steps?"),
        ("completely.elsewhere", "docs/configuration.md lists all settings"),
    ],
)
def test_unknown_keys_get_the_nearest_name(seen: str, hint: str) -> None:
    assert unknown_key(seen, seen="x").hint == hint


def test_resume_becomes_a_run_of_the_snapshot(tmp_path: Path) -> None:
    text = render_snapshot(compose_run(["seed=7"]))
    (tmp_path / "snapshot.yaml").write_text(text)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = rewrite_argv([f"resume={tmp_path}", "train.max_steps=7"], scratch=scratch)
    assert words[:4] == ["--config-path", str(scratch), "--config-name", "snapshot"]
    assert (scratch / "snapshot.yaml").read_text() == text
    assert words[-3:] == [
        f"hydra.run.dir='{tmp_path}'",
        f"resume.run_dir='{tmp_path}'",
        "train.max_steps=7",
    ]
    words = rewrite_argv(["-m", f"reproduce={tmp_path}", "seed=1,2"], scratch=scratch)
    assert words[4] == "-m"
    assert words[-1] == "seed=1,2"
    assert rewrite_argv(["zero=stage3"], scratch=scratch) == ["zero=stage3"]
    words = rewrite_argv([f"reproduce={tmp_path}", "seed=2"], scratch=scratch)
    assert not [word for word in words if word.startswith(("reproduce", "resume"))]
    for other in ("-m", "hydra.run.dir=x"):
        with pytest.raises(UserError, match="goes on in the run's own directory"):
            rewrite_argv([f"resume={tmp_path}", other], scratch=scratch)
    with pytest.raises(UserError, match="cannot be given together"):
        rewrite_argv([f"resume={tmp_path}", f"reproduce={tmp_path}"], scratch=scratch)


HOSTILE = [
    "hydra:\n  run:\n    dir: x\n",
    "model:\n  name: ${oc.env:HOME}\n",
    "zero:\n  extra:\n    _target_: os.system\n",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_snapshots_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "snapshot.yaml"
    path.write_text(f"defaults: [run_schema, _self_]\n{text}")
    with pytest.raises(UserError, match="which a snapshot never does"):
        load_snapshot(path)


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [run_schema, _self_, /hydra/launcher: evil]\n",
        "just text\n",
        "seed: 1\n",
        "a: [\n",
        "!!python/object/apply:os.system [x]\n",
    ],
)
def test_what_is_no_snapshot_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "snapshot.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is not"):
        load_snapshot(path)


def test_seed_0_is_a_seed() -> None:
    assert compose_run(["seed=0"]).seed == 0
