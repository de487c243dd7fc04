"""What a run leaves open is decided, and its paths become absolute."""

from pathlib import Path

import pytest

from llama_pretrain.config.fields import path_mark, walk_fields
from llama_pretrain.config.run import Run
from llama_pretrain.console import show_plan
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import build_plan
from llama_pretrain.plan.resolve import resolve, with_absolute_paths
from tests.conftest import compose_run


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are in the config, those of a mixture's sources too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "disk").mkdir()
    sources = (
        "web:{name:text,paths:['a/*.txt',/b.txt],heldout_paths:[c.txt]}",
        "disk:{name:huggingface,dataset:disk}",
        "hub:{name:huggingface,dataset:org/name}",
    )
    words = (
        "data=mixture",
        f"+data.sources={{{','.join(sources)}}}",
        "data.cache_dir=cache",
        "tokenizer=pretrained",
        "tokenizer.path='~/t'",
        "zero=stage3",
        "zero.offload_param.nvme_path=nvme/../fast",
        "export.target=out",
        "deepspeed.flops_profiler.output_file=flops.txt",
    )
    run = with_absolute_paths(compose_run(words))
    here = str(tmp_path)
    assert run.data.sources["web"].paths == [f"{here}/a/*.txt", "/b.txt"]
    assert run.data.sources["web"].heldout_paths == [f"{here}/c.txt"]
    assert run.data.sources["disk"].dataset == f"{here}/disk"
    assert run.data.sources["hub"].dataset == "org/name"
    assert run.data.cache_dir == f"{here}/cache"
    assert run.tokenizer.path == "/home/me/t"
    assert run.zero.offload_param.nvme_path == f"{here}/fast"
    assert run.export.target == f"{here}/out"
    assert run.deepspeed.flops_profiler.output_file == f"{here}/flops.txt"
    assert with_absolute_paths(Run()).data.cache_dir == "~/.cache/llama_pretrain"


def test_every_setting_with_the_name_of_a_path_is_marked() -> None:
    """`of_run` and `resume.run_dir` are absolute before Hydra composes."""
    names = ("path", "paths", "dir", "file", "dataset", "target")
    unmarked = {
        path
        for path, item in walk_fields(Run)
        if path.rpartition("_")[2].rpartition(".")[2] in names and path_mark(item) is None
    }
    assert unmarked == {"resume.run_dir"}


def test_the_plan_says_what_a_schedule_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    """A warm-up that is longer than the run, and a decay that is."""
    long = ["optim.learning_rate=1e-3", "train.max_steps=10", "schedule.warmup_steps=40"]
    plan = build_plan(resolve(compose_run(long), detect_machine()))
    assert plan.peak_learning_rate == pytest.approx(2.5e-4)
    assert plan.final_learning_rate == pytest.approx(2.5e-4)
    for words, text in (
        (long, "0.00025 at the end, within 40 steps of warm-up to 0.001"),
        ([*long[:2], "schedule=wsd", "schedule.decay_steps=50", "schedule.warmup_steps=2"],
         "decay of 8 steps instead of 50"),
    ):  # fmt: skip
        run = resolve(compose_run(words), detect_machine())
        show_plan(run, build_plan(run), None)
        assert text in capsys.readouterr().out
