"""The whole run, as a user starts it."""

import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hydra
import omegaconf
import pytest
import yaml

from llama_pretrain.runs.layout import RunDir
from tests.conftest import ROOT, SMALL, Command, Runner
from tests.e2e.test_parity import SHARD_ALL, at_stage
from tests.machines import list_options


@pytest.fixture(scope="module")
def full(shared_runner: Runner) -> Command:
    """Every station once: two ranks, checkpoints, TensorBoard, export, sample, report."""
    return shared_runner(
        "launch.num_processes=2",
        "train.max_steps=6",
        "train.eval_every_steps=3",
        "checkpoint.every_steps=3",
        "checkpoint.at_end=true",
        "checkpoint.export=true",
        "monitor=tensorboard",
        "train.sample_tokens=8",
    )


def test_run_directory_is_complete(full: Command) -> None:
    names = {path.name for path in full.run_dir.path.iterdir()}
    assert names >= {
        "snapshot.yaml",
        "plan.json",
        "ds_config.json",
        "provenance.json",
        "status.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "export",
        "ranks",
        "report.html",
        "sample.txt",
    }
    ranks = {path.name for path in full.run_dir.ranks.iterdir()}
    assert ranks == {"rank0.log", "rank1.log", "heartbeats", "start.json"}
    status = json.loads(full.run_dir.status.read_text())
    assert status["status"] == "completed"
    assert status["objective"] == full.rows("eval_loss")[-1]["eval_loss"]
    provenance = json.loads(full.run_dir.provenance.read_text())
    assert provenance["packages"]["deepspeed"]


def test_groups_are_audited(full: Command) -> None:
    """The worker's count of the real model, here once more from what was exported."""
    from safetensors.torch import load_file

    weights = load_file(full.run_dir.export / "model.safetensors")
    plain = [value for name, value in weights.items() if "norm" in name]
    decayed = [value for name, value in weights.items() if "norm" not in name]
    line = (
        f"weight decay: {sum(value.numel() for value in decayed):,} parameters in"
        f" {len(decayed)} tensors with, {sum(value.numel() for value in plain):,} in"
        f" {len(plain)} without, as planned"
    )
    assert line in full.run_dir.rank_log(0).read_text().splitlines()


def test_a_rank_refuses_a_plan_of_another_model(full: Command, tmp_path: Path) -> None:
    shutil.copytree(full.run_dir.path, tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    plan = json.loads(run_dir.plan.read_text())
    plan["parameters"]["not_decayed"] += 64
    run_dir.plan.write_text(json.dumps(plan))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone["MASTER_PORT"] = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "llama_pretrain.train.worker", str(run_dir.path)],
        cwd=ROOT,
        env=os.environ | alone | {"DS_ACCELERATOR": "cpu"},
        timeout=120,
    )
    assert done.returncode != 0
    size = plan["parameters"]
    assert (
        f"ValueError: weight decay: the plan has {size['decayed']:,} parameters with and"
        f" {size['not_decayed']:,} without (got {size['decayed']:,} and"
        f" {size['not_decayed'] - 64:,})" in run_dir.rank_log(0).read_text()
    )


def test_metrics_have_a_line_a_step_and_an_evaluation(full: Command) -> None:
    steps = full.rows("loss")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in steps] == [256 * step for step in range(1, 7)]
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "memory_bytes"):
        assert all(row[key] > 0 for row in steps), key
    assert len({row["sample_hash"] for row in steps}) == 6
    assert [row["step"] for row in full.rows("eval_loss")] == [0, 3, 6]
    assert [row["checkpoint"] for row in full.rows("checkpoint")] == [
        "step-00000003",
        "step-00000006",
    ]


def test_output_says_what_is_needed_and_nothing_else(full: Command) -> None:
    for text in (
        "config ",
        "4 sequences = 2 micro x 1 accumulated x 2 ranks",
        f"python run.py reproduce={full.run_dir.path}",
        "step 0: eval loss ",
        "step 6/6 loss ",
        "tensorboard --logdir",
    ):
        assert text in full.output
    said = full.output.replace("log_trace_cache_warnings", "")  # a setting of the tree
    for noise in ("Warning", "warning", "[INFO]", "W1", "rank0]", "Traceback", "DeepSpeed info"):
        assert noise not in said


def test_snapshot_is_resolved(full: Command) -> None:
    text = full.run_dir.snapshot.read_text()
    assert "${" not in text
    assert "???" not in text
    values = yaml.safe_load(text)
    assert values["launch"]["num_processes"] == 2
    assert values["optim"]["name"] == "torch_adamw"
    assert values["precision"]["name"] in ("bf16", "fp32")


def test_tensorboard_has_curves_against_steps_and_tokens(full: Command) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(full.run_dir.tensorboard))
    events.Reload()
    tags = events.Tags()
    for name in (
        "loss",
        "eval_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_s",
        "mfu",
        "memory_bytes",
        "skipped_steps",
    ):
        assert f"by_step/{name}" in tags["scalars"]
        assert f"by_tokens/{name}" in tags["scalars"]
    assert [event.step for event in events.Scalars("by_tokens/loss")] == [
        256 * step for step in range(1, 7)
    ]
    assert "config/text_summary" in tags["tensors"]


def test_export_is_the_model_that_was_evaluated(full: Command) -> None:
    """transformers loads it, and has the run's last evaluation loss on the same rows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llama_pretrain.data.dataset import create_pretrain_dataset
    from llama_pretrain.plan.plan import load_plan

    plan = load_plan(full.run_dir.plan)
    assert plan.corpus is not None
    tokenizer = AutoTokenizer.from_pretrained(full.run_dir.export)
    model = AutoModelForCausalLM.from_pretrained(full.run_dir.export)
    assert tokenizer.pad_token == "[PAD]"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert str(model.dtype) == "torch.bfloat16" or model.dtype == torch.float32
    dataset = create_pretrain_dataset(plan.corpus, "heldout", sequence_length=64, limits=[4])
    losses = []
    for row in range(4):
        item = dataset[row]
        with torch.no_grad():
            logits = model(torch.from_numpy(item["input_ids"])[None], use_cache=False).logits
        labels = torch.from_numpy(item["shift_labels"])
        losses.append(torch.nn.functional.cross_entropy(logits[0].float(), labels).item())
    assert sum(losses) / 4 == pytest.approx(full.rows("eval_loss")[-1]["eval_loss"], abs=2e-3)


def test_sample_continues_the_prompt(full: Command) -> None:
    assert (full.run_dir.path / "sample.txt").read_text().startswith("The")


def test_reproduce_gives_the_same_losses(shared_runner: Runner, full: Command) -> None:
    folder = shared_runner.folder / "again"
    words = (f"reproduce={full.run_dir.path}", f"hydra.run.dir={folder}", "checkpoint.export=false")
    again = shared_runner.bare(*words, run_dir=RunDir(folder))
    assert again.losses == full.losses
    assert again.rows("eval_loss") == full.rows("eval_loss")


COVER = [
    pytest.param(["zero=stage0", "optim=torch_adamw", "schedule=linear", "monitor=csv"], id="a"),
    pytest.param(["zero=stage3", "schedule=wsd", "precision=fp32", "monitor=tensorboard"], id="b"),
    pytest.param(
        ["zero=stage2", "schedule=constant", "precision=bf16", "train.gradient_checkpointing=true"],
        id="c",
    ),
    pytest.param(["debug=profile", "data=stdlib", "tokenizer.vocab_size=512"], id="profile"),
    pytest.param(["zero=stage0", "precision=bf16", "model.tie_word_embeddings=true"], id="tied"),
    pytest.param(["zero=stage0", "precision=bf16_autocast"], id="autocast"),
]


@pytest.mark.parametrize("overrides", COVER)
def test_options_train(runner: Runner, overrides: list[str]) -> None:
    """What is shipped also trains; every option is in some point here or in the slow ones."""
    if "data=stdlib" in overrides:
        overrides = [*overrides, "data.paths=[]"]
    done = runner(*overrides, "launch.num_processes=2", "batch.micro_batch_size=1")
    assert len(done.losses) >= 3
    if "debug=profile" in overrides:
        assert list((done.run_dir.path / "profile").glob("*.json"))
    if "monitor=csv" in overrides:
        lines = (done.run_dir.path / "metrics.csv").read_text().splitlines()
        assert lines[0].startswith("step,tokens,loss,learning_rate")
        assert len(lines) == 4


def at_precision(precision: str) -> tuple[str, ...]:
    return f"precision={precision}", "launch.num_processes=2", "optim.learning_rate=3e-3"


@pytest.fixture(scope="module")
def plain_losses(shared_runner: Runner) -> Callable[[str], list[float]]:
    """Those of torch's AdamW by precision, trained once each."""

    @cache
    def train(precision: str) -> list[float]:
        return shared_runner("optim=torch_adamw", "zero=stage1", *at_precision(precision)).losses

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["optim=cpu_adam", "zero=stage3"], id="cpu_adam"),
        pytest.param(["optim=fused_adam", "zero=stage1"], id="fused_adam"),
        pytest.param(["optim=fused_adam", "zero=stage0"], id="fused_adam_0"),
        pytest.param(["zero=stage2_offload"], id="stage2_offload"),
        pytest.param(["zero=stage3_offload"], id="stage3_offload"),
    ],
)
def test_compiled_optimizers_train(
    runner: Runner, plain_losses: Callable[[str], list[float]], overrides: list[str]
) -> None:
    for precision, tolerance in (("fp32", 2e-5), ("bf16", 2e-3)):
        done = runner(*overrides, *at_precision(precision))
        assert done.losses == pytest.approx(plain_losses(precision), abs=tolerance)


def test_the_norm_is_that_of_the_gradient_without_its_scale(runner: Runner) -> None:
    same = ("zero=stage0", "launch.num_processes=1")
    plain = runner(*same, "precision=fp32")
    done = runner(*same, "precision=bf16_autocast", "precision.torch_autocast.dtype=float16")
    norms = [row["grad_norm"] for row in plain.rows("loss")]
    assert [row["grad_norm"] for row in done.rows("loss")] == pytest.approx(norms, rel=1e-3)


def test_muon_trains_without_a_compiler(runner: Runner, tmp_path: Path) -> None:
    variables = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = runner("optim=muon", "launch.num_processes=2", "monitor=csv", variables=variables)
    steps = done.rows("loss")
    assert len(steps) == 3
    # The rate is AdamW's; the norm that DeepSpeed keeps is the update's.
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    assert [row["grad_norm"] for row in steps] == [None, None, None]


OFFLOADED = [("zero=stage2_offload",), ("zero=stage3_offload", *SHARD_ALL)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "others"),
    [
        pytest.param("muon", [at_stage(2), at_stage(3)], id="muon"),
        pytest.param("cpu_lion", [at_stage(0), *OFFLOADED], id="lion"),
        pytest.param("cpu_adagrad", [at_stage(0), *OFFLOADED], id="adagrad"),
    ],
)
def test_an_optimizer_is_the_same_at_every_stage(
    runner: Runner, optim: str, others: list[tuple[str, ...]]
) -> None:
    same = (f"optim={optim}", "precision=fp32", "launch.num_processes=2")
    first = runner(*same, *at_stage(1))
    assert len(first.losses) == 3
    for zero in others:
        assert runner(*same, *zero).losses == pytest.approx(first.losses, abs=1e-6), zero


def test_deepspeed_says_what_it_is_asked_to_say(runner: Runner) -> None:
    """Its logs, profile and monitors are where the settings say, and change no loss."""
    same = ("precision=fp32", "zero=stage1", "launch.num_processes=2")
    plain = runner(*same)
    done = runner(
        *same,
        "deepspeed.steps_per_print=2",
        "deepspeed.wall_clock_breakdown=true",
        "deepspeed.memory_breakdown=true",
        "deepspeed.dump_state=true",
        "deepspeed.comms_logger.enabled=true",
        "deepspeed.comms_logger.verbose=true",
        "deepspeed.flops_profiler.enabled=true",
        "deepspeed.flops_profiler.profile_step=1",
        "+deepspeed.extra.csv_monitor={enabled: true, output_path: csv, job_name: deepspeed}",
        "deepspeed.tensorboard.enabled=true",
        "deepspeed.tensorboard.job_name=theirs",
    )
    assert done.losses == plain.losses
    log = done.run_dir.rank_log(0).read_text()
    for text in (
        "step=2, skipped=0, lr=[",
        "time (ms) | fwd_microstep: ",
        "Engine before backward",
        "DeepSpeedEngine:\n",
        "comm op: all_reduce | time (ms): ",
        "Comm. Op            Message Size        Count ",
        "DeepSpeed Flops Profiler -----",
        "Profile Summary at step 2:",
    ):
        assert text in log, text
    assert "step=1, skipped=0, lr=[" not in log
    rates = (runner.folder / "csv/deepspeed/Train_Samples_lr.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rates] == ["step", "4", "8", "12"]
    assert list(done.run_dir.tensorboard.glob("theirs/events.*"))


def test_deepspeed_recomputes_activations(runner: Runner) -> None:
    same = ("precision=fp32", *at_stage(3), "launch.num_processes=2")
    plain = runner(*same, "train.gradient_checkpointing=true")
    section = "deepspeed.activation_checkpointing"
    more = (f"{section}.profile=true", f"{section}.synchronize_checkpoint_boundary=true")
    done = runner(*same, "train.gradient_checkpointing=true", *more)
    assert done.losses == plain.losses
    times = "[Rank 0] time (ms) | backward: "
    assert done.run_dir.rank_log(0).read_text().count(times) == 3 * 2  # steps, layers
    assert times not in plain.run_dir.rank_log(0).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["60m", "130m", "350m"])
def test_published_shapes_train(runner: Runner, model: str) -> None:
    """Whole, as far as they and their optimizer fit a small machine: 1b wants 21 GB."""
    folder = runner.folder / model
    done = runner.bare(
        f"model={model}",
        "precision=bf16",  # whatever the CPU: in fp32 350m wants 21 GB too
        "tokenizer.vocab_size=512",
        "data=text",
        f"data.paths=['{runner.corpus}/*.py']",
        "data.heldout_fraction=0.1",
        "data.sequence_length=64",
        "batch.global_batch_size=2",
        "train.max_steps=3",
        "train.eval_sequences=2",
        "train.sample_tokens=2",
        "checkpoint.at_end=false",
        "checkpoint.export=false",
        "monitor=none",
        f"data.cache_dir={runner.cache_dir}",
        f"hydra.run.dir={folder}",
        run_dir=RunDir(folder),
    )
    assert len(done.losses) == 3
    assert done.losses[0] == pytest.approx(math.log(32_000), abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["1b", "llama2_70b", "llama3_8b", "llama32_1b", "llama32_3b"])
def test_large_shapes_train_when_made_narrow(runner: Runner, model: str) -> None:
    """The rest of a shape (rotary scaling, ties, biases) at debug=smoke's width."""
    done = runner(f"model={model}", "model.max_position_embeddings=1024")
    assert len(done.losses) == 3


FEW_PACKAGES = """
import pathlib, sysconfig

whole, folder = sysconfig.get_path, str(pathlib.Path(__file__).parent / "packages")
sysconfig.get_path = lambda name, *words, **named: (
    folder if name == "purelib" else whole(name, *words, **named)
)
"""


@pytest.mark.slow
def test_docstrings_train(runner: Runner) -> None:
    """On those of a few packages: all that are installed take minutes."""
    (runner.folder / "packages").mkdir()
    for module in (hydra, omegaconf):
        folder = Path(str(module.__file__)).parent
        shutil.copytree(folder, runner.folder / "packages" / folder.name)
    (runner.folder / "sitecustomize.py").write_text(FEW_PACKAGES)
    variables = {"PYTHONPATH": str(runner.folder)}
    done = runner("data=docstrings", "data.paths=[]", variables=variables)
    assert len(done.losses) == 3


def test_overfit_learns_one_batch_by_heart(runner: Runner) -> None:
    words = ["debug=overfit", "model.hidden_size=128", "optim.learning_rate=3e-3"]
    paths = f"data.paths=['{runner.corpus}/*.py']"
    folder = runner.folder / "overfit"
    done = runner.bare(
        *words,
        "data=text",
        paths,
        "model.vocab_size=512",
        "data.heldout_fraction=0.1",
        "data.sequence_length=64",
        "train.eval_sequences=4",
        "checkpoint.every_steps=null",
        "checkpoint.at_end=false",
        "checkpoint.export=false",
        "monitor=none",
        f"data.cache_dir={runner.cache_dir}",
        f"hydra.run.dir={folder}",
        run_dir=RunDir(folder),
    )
    assert done.losses[-1] < 0.5
    assert len({row["sample_hash"] for row in done.rows("loss")}) == 1


def test_goes_on_from_an_export_with_a_larger_tokenizer(
    runner: Runner, full: Command, tmp_path: Path
) -> None:
    """model=pretrained: the same loss as the export had; rows are padded in training alone."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(full.run_dir.export, tokenizer)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["pad_token"] = None  # as most published ones have it
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[PAD]"]
    content["model"]["vocab"]["<was-pad>"] = content["model"]["vocab"].pop("[PAD]")
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = runner.folder / "on"
    done = runner.bare(
        "model=pretrained",
        f"model.path={full.run_dir.export}",
        "tokenizer=pretrained",
        f"tokenizer.path={tokenizer}",
        "tokenizer.add_pad_token=true",
        "data=text",
        f"data.paths=['{runner.corpus}/*.py']",
        "data.sequence_length=64",
        "data.heldout_fraction=0.1",
        "batch.global_batch_size=4",
        "train.max_steps=2",
        "train.eval_sequences=4",
        "monitor=none",
        "zero=stage3",
        f"data.cache_dir={runner.cache_dir}",
        f"hydra.run.dir={folder}",
        run_dir=RunDir(folder),
    )
    assert json.loads(done.run_dir.plan.read_text())["vocab_size"] == 520
    assert "513 tokens with [PAD]: embeddings grow from 512 to 520 rows" in done.output
    config = json.loads((done.run_dir.export / "config.json").read_text())
    assert config["vocab_size"] == 513  # the rows that only fill up a multiple of 8 are cut
    assert config["pad_token_id"] == 512
    # Eight new rows of near-zero logits aside, it is the model that was exported.
    before = full.rows("eval_loss")[-1]["eval_loss"]
    assert done.rows("eval_loss")[0]["eval_loss"] == pytest.approx(before, abs=0.02)


def test_multirun_goes_on_after_a_bad_point(runner: Runner, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = [word for word in SMALL if "global_batch" not in word]
    done = runner.bare(
        "-m",
        *words,
        f"data.paths=['{runner.corpus}/*.py']",
        f"data.cache_dir={runner.cache_dir}",
        "launch.num_processes=2",
        "batch.global_batch_size=3,4",
        f"hydra.sweep.dir={sweep}",
        expect=1,
    )
    assert "must be a multiple of 2 ranks (got 3)" in done.output
    states = [json.loads(path.read_text())["status"] for path in sweep.glob("*/status.json")]
    assert states == ["completed"]
    (point,) = sweep.glob("*/status.json")
    assert point.parent.name.startswith("01-batch.global_batch_size=4-")


LIGHT = [
    pytest.param(["--help"], 1.0, id="help"),
    pytest.param(["--cfg", "job"], 1.0, id="cfg-job"),
    pytest.param(["task=plan", "model=llama3_70b", "zero=stage3"], 1.2, id="plan"),
]


HYDRA_S = 0.22
"""What importing Hydra may take for the limits to hold as they stand; on a slower machine, or in a
slower moment, they are as much longer."""


def seconds_of(*words: str, cwd: Path) -> float:
    """Processor seconds of a Python process: what one waits for it where nothing else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("words", "limit_s"), LIGHT)
def test_quick_answers_import_no_torch(tmp_path: Path, words: list[str], limit_s: float) -> None:
    command = [str(ROOT / "run.py"), *words]
    rounds = []
    for _ in range(5):
        slower = max(1.0, seconds_of("-c", "import hydra.main", cwd=tmp_path) / HYDRA_S)
        rounds.append((seconds_of(*command, cwd=tmp_path), limit_s * slower))
    traced = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(traced, capture_output=True, text=True, cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "deepspeed", "datasets", "tokenizers"}
    assert "omegaconf" in imported
    print(", ".join(f"{took:.2f} s of {limit:.2f} s" for took, limit in rounds))
    assert any(took <= limit for took, limit in rounds), rounds


def test_help_shows_groups_and_commands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "zero: stage0, stage1, stage2, stage2_offload" in " ".join(done.stdout.split())
    for option in list_options():
        group, _, name = option.partition("=")
        assert f"  {group}: " in done.stdout
        assert name in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    commands = [line for line in done.stdout.splitlines() if line.startswith("  python run.py")]
    assert len(commands) == 10


def test_tab_completion(tmp_path: Path) -> None:
    """What the shell function asks of run.py, for the line `python run.py zero=st`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-sc", "query=bash"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"COMP_LINE": "python run.py zero=st", "COMP_POINT": "21"},
    )
    assert done.stdout.split() == [
        f"zero={name}" for name in ("stage0", "stage1", "stage2", "stage2_offload", "stage3")
    ] + ["zero=stage3_nvme", "zero=stage3_offload"]


def test_plan_task_prints_the_deepspeed_json(runner: Runner) -> None:
    done = runner.bare("task=plan", "model=llama2_7b", "zero=stage3", "precision=bf16")
    config = json.loads(done.output[done.output.index("\n{") :])
    assert config["zero_optimization"]["stage"] == 3
    assert config["bf16"]["enabled"] is True
    assert not list(runner.folder.rglob("snapshot.yaml"))
