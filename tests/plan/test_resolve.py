"""What a run leaves open is decided, and its paths become absolute."""

from pathlib import Path

import pytest

from llama_pretrain.config.fields import path_mark, walk_fields
from llama_pretrain.config.run import Run
from llama_pretrain.plan.resolve import with_absolute_paths
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
