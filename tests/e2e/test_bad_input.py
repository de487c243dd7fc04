"""Mistakes end before any rank starts: exit code 1, no traceback, each with what to do."""

import importlib.util
import json
from pathlib import Path

import pytest

from llama_pretrain.config.snapshot import render_snapshot
from tests.conftest import Runner, compose_run

CASES = [
    pytest.param(
        ["optim.learning_rte=1e-3"],
        "optim.learning_rte: there is no such setting (got optim.learning_rte=1e-3);"
        " did you mean optim.learning_rate?",
        id="unknown-key",
    ),
    pytest.param(
        ["+optim.momentum=0.9"],
        "optim.momentum: there is no such setting (got 0.9)",
        id="unknown-key-added",
    ),
    pytest.param(
        ["+foo.bar=1"], "foo: there is no such setting (got {'bar': 1})", id="unknown-group-added"
    ),
    pytest.param(
        ["train.max_steps=ten"], "train.max_steps: should be an integer (got ten)", id="wrong-type"
    ),
    pytest.param(
        ["train.max_tokens=1e9"],
        "train.max_tokens: should be an integer (got 1e9); write 1_000_000_000",
        id="float-for-integer",
    ),
    pytest.param(
        ["schedule.name=cosin"],
        "schedule.name: should be one of cosine, linear, constant, wsd (got cosin)",
        id="wrong-choice",
    ),
    pytest.param(
        ["optim.learning_rate=-1"],
        "optim.learning_rate: should be greater than 0 (got -1.0)",
        id="out-of-range",
    ),
    pytest.param(
        ["optim.betas=[0.9]"],
        "optim.betas: should have at least 2 items after validation, not 1 (got [0.9])",
        id="too-few",
    ),
    pytest.param(
        ["zero=stag3"],
        "zero: there is no option 'stag3'; did you mean zero=stage3? Options: stage0, stage1",
        id="no-such-option",
    ),
    pytest.param(
        ["zeros=stage3"],
        "zeros: there is no such setting (got zeros=stage3)",
        id="no-such-group",
    ),
    pytest.param(
        ["model=pretrained"], "model.path: a value is missing; add model.path=DIR", id="missing"
    ),
    pytest.param(
        ["optim.learning_rate='???'"],
        "optim.learning_rate: a value is missing; add optim.learning_rate=...",
        id="missing-by-hand",
    ),
    pytest.param(
        ["train.sample_prompt='???'"],
        "train.sample_prompt: a value is missing; add train.sample_prompt=...",
        id="missing-text",
    ),
    pytest.param(
        [f"seed={2**63}"], f"seed: should be less than {2**63} (got {2**63})", id="seed-too-large"
    ),
    pytest.param(
        ["optim.learning_rate=inf"],
        "optim.learning_rate: should be a finite number (got inf)",
        id="infinite",
    ),
    pytest.param(
        ["data.cache_dir=/proc/none"], "data: No such file or directory: /proc/none", id="cache"
    ),
    pytest.param(
        ["batch.global_batch_size=10", "batch.micro_batch_size=4", "launch.num_processes=2"],
        "batch.global_batch_size: does not divide by batch.micro_batch_size=4 x 2 ranks (got 10);"
        " nearest global = micro x accumulation x ranks: 8 = 4 x 1 x 2, 16 = 4 x 2 x 2,"
        " 10 = 1 x 5 x 2, 10 = 5 x 1 x 2",
        id="batch",
    ),
    pytest.param(
        ["model.num_attention_heads=7", "model.head_dim=null", "model.num_key_value_heads=1"],
        "model.num_attention_heads: does not divide model.hidden_size=64 (got 7);"
        " nearest that do: 4, 8",
        id="heads",
    ),
    pytest.param(
        ["model.num_key_value_heads=3"],
        "model.num_key_value_heads: does not divide model.num_attention_heads=4 (got 3);"
        " nearest that do: 2, 4",
        id="kv-heads",
    ),
    pytest.param(
        ["precision=fp16"],
        "precision: DeepSpeed has no fp16 on a CPU (got fp16);"
        " add precision=bf16 or precision=fp32",
        id="fp16-on-cpu",
    ),
    pytest.param(
        ["launch.device=cuda"],
        "launch.num_processes: needs as many GPUs, and torch sees 0 here (got 1);"
        " set launch.device=cpu",
        id="no-gpu",
    ),
    pytest.param(
        ["zero=stage3_nvme", "zero.offload_param.nvme_path=/tmp"],
        "zero: offload to nvme moves state off a GPU, and this run has none",
        id="nvme-on-cpu",
    ),
    pytest.param(["zero=zeropp"], "zero: ZeRO++ quantises with CUDA kernels", id="zeropp-on-cpu"),
    pytest.param(
        ["zero=stage2_offload", "optim=torch_adamw"],
        "zero.offload_optimizer.device: cpu needs optim=cpu_adam, cpu_lion or cpu_adagrad"
        " (got optim=torch_adamw);"
        " add optim=cpu_adam, or set zero.offload_optimizer.device=none",
        id="offload-needs-cpu-adam",
    ),
    pytest.param(
        ["zero=stage2", "zero.offload_param.device=cpu"],
        "zero.offload_param.device: cpu needs zero.stage=3 (got stage 2); set zero.stage=3",
        id="param-offload-needs-stage-3",
    ),
    pytest.param(
        ["+deepspeed.extra.gradient_cliping=1"],
        "deepspeed.extra.gradient_cliping: DeepSpeed 0.19.8 doesn't know this key and would drop it"
        " in silence; did you mean train.gradient_clipping?",
        id="unknown-deepspeed-key",
    ),
    pytest.param(
        ["+deepspeed.extra.train_batch_size=1"],
        "deepspeed.extra.train_batch_size: this key has a setting of its own;"
        " use batch.global_batch_size",
        id="owned-deepspeed-key",
    ),
    pytest.param(
        ["+zero.extra.reduce_scater=true"],
        "zero.extra.reduce_scater: DeepSpeed 0.19.8 doesn't know this key",
        id="unknown-zero-key",
    ),
    pytest.param(
        ["zero.extra={reduce_scatter: false}"],
        "zero.extra: cannot be set so (got zero.extra={reduce_scatter: false});"
        " a key is added to it with a plus: +zero.extra.KEY=VALUE",
        id="extra-without-plus",
    ),
    pytest.param(
        ["+zero.extra.load_from_fp32_weights=auto"],
        "zero.extra.load_from_fp32_weights: DeepSpeed takes its default for",
        id="auto",
    ),
    pytest.param(
        ["+zero.extra.stage=2"], "zero.extra.stage: there is a setting of that name", id="shadow"
    ),
    pytest.param(
        ["launch.nodes=2"],
        "launch.nodes: several machines can be planned, not yet launched (got 2)",
        id="nodes",
    ),
    pytest.param(
        ["data.sequence_length=4096"],
        "data.sequence_length: is longer than model.max_position_embeddings=1024 (got 4096)",
        id="too-long",
    ),
    pytest.param(["train.max_steps=null"], "train.max_steps: the run has no end", id="endless"),
    pytest.param(
        ["schedule.decay_steps=3"],
        "schedule.decay_steps: is not used with schedule=cosine (got 3); add schedule=wsd",
        id="ignored-setting",
    ),
    pytest.param(
        ["zero=null"], "zero: there is no option 'null'; options: stage0, stage1", id="null-group"
    ),
    pytest.param(
        ["optim.learning_rte=1", "train.max_steps=x", "zero=stage9", "precision=fp16"],
        "4 problems, nothing was started:",
        id="all-at-once",
    ),
]


@pytest.mark.parametrize(("overrides", "text"), CASES)
def test_refused_before_launch(runner: Runner, overrides: list[str], text: str) -> None:
    done = runner(*overrides, expect=1)
    assert text in done.output
    assert "Traceback" not in done.output
    assert not done.run_dir.status.exists()


def test_a_sweep_without_multirun_says_how(runner: Runner) -> None:
    done = runner("zero=stage1,stage2", expect=1)
    assert "--multirun" in done.output
    assert "Traceback" not in done.output


def test_cpu_adam_without_a_compiler(runner: Runner) -> None:
    done = runner("optim=cpu_adam", variables={"CXX": "no-such-compiler"}, expect=1)
    assert "optim.name: cpu_adam is compiled at its first use, and there is no C++" in done.output
    assert "add optim=torch_adamw" in done.output


def test_unknown_key_in_yaml(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "optim"
    folder.mkdir(parents=True)
    (folder / "bad.yaml").write_text("name: adamw\nlearning_rte: 1.0e-3\n")
    done = runner.bare("--config-dir", str(folder.parent), "optim=bad", expect=1)
    assert "learning_rte" in done.output
    assert "optim/bad" in done.output
    assert "Traceback" not in done.output


def data_case(tmp_path: Path, name: str) -> tuple[list[str], str]:
    """Overrides of a corpus that can't be used, and what is said of it."""
    if name == "missing":
        path = tmp_path / "none" / "*.txt"
        return [f"data.paths=['{path}']"], f"data.paths: names no file (got {path})"
    if name == "directory":
        return [
            f"data.paths=['{tmp_path}']"
        ], f"names a directory (got {tmp_path}); add {tmp_path}/**"
    if name == "suffix":
        (tmp_path / "a.pdf").write_bytes(b"x")
        return [f"data.paths=['{tmp_path}/a.pdf']"], "a.pdf is none of .txt, .jsonl (plain, "
    if name == "empty":
        (tmp_path / "a.txt").write_text(" \n")
        return [f"data.paths=['{tmp_path}/a.txt']"], "data: the corpus has no text (read "
    if name == "short":
        (tmp_path / "a.txt").write_text("a few words\n")
        text = "too few for one row of 64 and the token after it; give more text, or shorten"
        return [f"data.paths=['{tmp_path}/a.txt']"], text
    if name == "not-utf8":
        (tmp_path / "a.txt").write_bytes(b"good text \xff\xfe")
        return [f"data.paths=['{tmp_path}/a.txt']"], f"{tmp_path}/a.txt is not UTF-8 at byte 10"
    if name == "jsonl-not-utf8":
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
        return [f"data.paths=['{tmp_path}/a.jsonl']"], "a.jsonl is not UTF-8 at byte 24"
    if name == "jsonl-field":
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b", "id": 1}\n')
        text = "a.jsonl, line 2: there is no field 'text' (got body, id)"
        return [f"data.paths=['{tmp_path}/a.jsonl']"], text
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    return [f"data.paths=['{tmp_path}/a.jsonl']"], "a.jsonl, line 2: "


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "directory",
        "suffix",
        "empty",
        "short",
        "not-utf8",
        "jsonl-not-utf8",
        "jsonl-field",
        "jsonl-torn",
    ],
)
def test_bad_corpus(runner: Runner, tmp_path: Path, name: str) -> None:
    overrides, text = data_case(tmp_path, name)
    done = runner(*overrides, expect=1)
    assert text in done.output
    assert "Traceback" not in done.output


def test_tokenizer_larger_than_the_model(runner: Runner) -> None:
    done = runner("tokenizer.vocab_size=600", expect=1)
    text = (
        "tokenizer.vocab_size: is larger than model.vocab_size=512 (got 600); set model.vocab_size"
    )
    assert text in done.output


def test_used_run_directory_is_refused(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "snapshot.yaml").write_text("x")
    done = runner(f"hydra.run.dir={tmp_path}", expect=1)
    assert f"hydra.run.dir: {tmp_path} holds a run already; go on with it: resume=" in done.output


def test_a_hostile_snapshot_runs_nothing(runner: Runner, tmp_path: Path) -> None:
    text = "defaults: [run_schema, _self_]\nhydra: {callbacks: {x: {_target_: os.system}}}\n"
    (tmp_path / "snapshot.yaml").write_text(text)
    done = runner.bare(f"resume={tmp_path}", expect=1)
    assert "names hydra settings, interpolations or _target_" in done.output


def test_a_schema_beside_a_snapshot_is_not_read(runner: Runner, tmp_path: Path) -> None:
    """Hydra takes a file before a registered schema: in a run directory it could name code."""
    folder = tmp_path / "from-elsewhere"
    folder.mkdir()
    (folder / "snapshot.yaml").write_text(render_snapshot(compose_run(["seed=7"])))
    evil = "hydra: {callbacks: {x: {_target_: os.mkdir, path: owned}}}\n"
    (folder / "run_schema.yaml").write_text(f"# @package _global_\n{evil}")
    done = runner.bare(f"reproduce={folder}", "task=plan")
    assert "seed: 7" in done.output
    assert not (tmp_path / "owned").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_its_package(runner: Runner) -> None:
    done = runner("monitor=wandb", expect=1)
    assert "monitor.wandb: the package wandb is not installed; pip install" in done.output


def test_a_failing_rank_ends_the_run_with_its_error(runner: Runner) -> None:
    # A file where rank 0 needs a folder: a fault that only a rank meets.
    folder = runner.folder / "broken"
    (folder / "tensorboard").parent.mkdir(parents=True)
    (folder / "tensorboard").write_text("in the way")
    done = runner("monitor=tensorboard", f"hydra.run.dir={folder}", expect=1)
    status = json.loads(done.run_dir.status.read_text())
    assert status["status"] == "failed"
    assert status["rank"] == 0
    assert "FileExistsError" in status["error"] or "NotADirectoryError" in status["error"]
    assert Path(status["log"]).is_file()
    assert "rank 0 failed" in done.output
    assert status["log"] in done.output
    assert "Traceback" not in done.output
    assert "torch/distributed" not in done.output
