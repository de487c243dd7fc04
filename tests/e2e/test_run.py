"""The whole run, as a user starts it."""

import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shlex import split

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pretrain.data.dataset import create_pretrain_dataset
from llama_pretrain.plan.plan import load_plan
from tests.conftest import ROOT, Command, Runner
from tests.e2e.test_parity import SHARDED, at_stage, train_shape
from tests.machines import list_options


@pytest.fixture(scope="module")
def full(shared_runner: Runner) -> Command:
    """Every station once: two ranks, checkpoints, TensorBoard, export, sample, report."""
    words = (
        "launch.num_processes=2 train.max_steps=6 train.eval_every_steps=3 train.sample_tokens=8"
        " checkpoint.every_steps=3 checkpoint.at_end=true checkpoint.export=true"
        " monitor=tensorboard"
    )
    return shared_runner(*split(words))


def test_run_directory_is_complete(full: Command) -> None:
    names = {path.name for path in full.run_dir.path.iterdir()}
    files = "plan.json ds_config.json provenance.json checkpoints export report.html"
    assert names >= {*split(files)}
    ranks = {path.name for path in full.run_dir.ranks.iterdir()}
    assert ranks == {"rank0.log", "rank1.log", "heartbeats", "start.json"}
    assert "without, as planned" in full.run_dir.rank_log(0).read_text()  # groups of weight decay
    status = json.loads(full.run_dir.status.read_text())
    assert status["status"] == "completed"
    assert status["objective"] == full.rows("eval_loss")[-1]["eval_loss"]
    assert json.loads(full.run_dir.provenance.read_text())["packages"]["deepspeed"]
    assert (full.run_dir.path / "sample.txt").read_text().startswith("The")
    text = full.run_dir.snapshot.read_text()
    assert "${" not in text
    assert "???" not in text
    values = yaml.safe_load(text)
    assert (values["launch"]["num_processes"], values["optim"]["name"]) == (2, "torch_adamw")
    assert values["precision"]["name"] in ("bf16", "fp32")


def test_metrics_have_a_line_a_step_and_an_evaluation(full: Command) -> None:
    steps = full.rows("loss")
    assert [(row["step"], row["tokens"]) for row in steps] == [(n, 256 * n) for n in range(1, 7)]
    keys = split("loss learning_rate grad_norm tokens_per_s mfu memory_bytes")
    assert [key for key in keys if not all(row[key] > 0 for row in steps)] == []
    assert len({row["sample_hash"] for row in steps}) == 6
    assert [row["step"] for row in full.rows("eval_loss")] == [0, 3, 6]
    saved = [row["checkpoint"] for row in full.rows("checkpoint")]
    assert saved == ["step-00000003", "step-00000006"]
    events = EventAccumulator(str(full.run_dir.tensorboard))
    events.Reload()
    tags = events.Tags()
    for axis in ("by_step", "by_tokens"):
        wanted = {f"{axis}/{name}" for name in (*keys, "eval_loss", "skipped_steps")}
        assert wanted <= {*tags["scalars"]}
    tokens = [event.step for event in events.Scalars("by_tokens/loss")]
    assert tokens == [256 * step for step in range(1, 7)]
    assert "config/text_summary" in tags["tensors"]


def test_output_says_what_is_needed_and_nothing_else(full: Command) -> None:
    for text in (
        *("config ", "4 sequences = 2 micro x 1 accumulated x 2 ranks", "tensorboard --logdir"),
        *("step 0: eval loss ", "step 6/6 loss ", f"python run.py reproduce={full.run_dir.path}"),
    ):
        assert text in full.output
    said = full.output.replace("log_trace_cache_warnings", "")  # a setting of the tree
    for noise in ("Warning", "warning", "[INFO]", "W1", "rank0]", "Traceback", "DeepSpeed info"):
        assert noise not in said


def test_export_is_the_model_that_was_evaluated(full: Command) -> None:
    """transformers loads it, and has the run's last evaluation loss on the same sequences."""
    plan = load_plan(full.run_dir.plan)
    assert plan.corpus is not None
    tokenizer = AutoTokenizer.from_pretrained(full.run_dir.export)
    model = AutoModelForCausalLM.from_pretrained(full.run_dir.export)
    assert tokenizer.pad_token == "[PAD]"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype in (torch.bfloat16, torch.float32)
    dataset = create_pretrain_dataset(plan.corpus, "heldout", sequence_length=64, limits=[4])
    losses = []
    for item in (dataset[number] for number in range(4)):
        with torch.no_grad():
            logits = model(torch.from_numpy(item["input_ids"])[None], use_cache=False).logits
        labels = torch.from_numpy(item["shift_labels"])
        losses.append(torch.nn.functional.cross_entropy(logits[0].float(), labels).item())
    assert sum(losses) / 4 == pytest.approx(full.rows("eval_loss")[-1]["eval_loss"], abs=2e-3)


COVER = {
    "a": "zero=stage0 optim=torch_adamw schedule=linear monitor=csv",
    "b": "zero=stage3 schedule=wsd precision=fp32 monitor=tensorboard",
    "c": "zero=stage2 schedule=constant precision=bf16 train.gradient_checkpointing=true",
    "profile": "debug=profile data=stdlib tokenizer.vocab_size=512 data.paths=[]",
    "tied": "zero=stage0 precision=bf16 model.tie_word_embeddings=true",
    "autocast": "zero=stage0 precision=bf16_autocast",
}


@pytest.mark.parametrize("words", COVER.values(), ids=COVER)
def test_options_train(runner: Runner, words: str) -> None:
    """What is shipped also trains; every option is in some point here or in the slow ones."""
    done = runner(*split(words), "launch.num_processes=2", "batch.micro_batch_size=1")
    assert len(done.losses) >= 3
    if "debug=profile" in words:
        assert list((done.run_dir.path / "profile").glob("*.json"))
    if "monitor=csv" in words:
        lines = (done.run_dir.path / "metrics.csv").read_text().splitlines()
        assert lines[0].startswith("step,tokens,loss,learning_rate")
        assert len(lines) == 4


@pytest.fixture(scope="module")
def losses_of(shared_runner: Runner) -> Callable[[str], list[float]]:
    """The losses of two ranks, trained once for each command line."""

    @cache
    def train(words: str) -> list[float]:
        more = ("launch.num_processes=2", "optim.learning_rate=3e-3")
        return shared_runner(*split(words), *more).losses

    return train


ALIKE = {
    "optim=torch_adamw zero=stage1": (
        *("optim=cpu_adam zero=stage3", "optim=fused_adam zero=stage1"),
        *("optim=fused_adam zero=stage0", "zero=stage2_offload", "zero=stage3_offload"),
    ),
    "optim=muon zero=stage1": ("optim=muon zero=stage2", f"optim=muon {SHARDED}"),
    **{
        f"optim={name} zero=stage1": tuple(
            f"optim={name} {zero}"
            for zero in ("zero=stage0", "zero=stage2_offload", f"{SHARDED} zero=stage3_offload")
        )
        for name in ("cpu_lion", "cpu_adagrad")
    },
}
"""Command lines that train as another does."""


@pytest.mark.slow
@pytest.mark.parametrize(("words", "same"), [(w, key) for key, some in ALIKE.items() for w in some])
def test_optimizers_train_alike(
    losses_of: Callable[[str], list[float]], words: str, same: str
) -> None:
    adam = "torch_adamw" in same
    for precision, tolerance in (("fp32", 2e-5 if adam else 1e-6), ("bf16", 2e-3))[: 1 + adam]:
        losses = losses_of(f"{same} precision={precision}")
        assert len(losses) == 3
        assert losses_of(f"{words} precision={precision}") == pytest.approx(losses, abs=tolerance)


def test_the_norm_is_that_of_the_gradient_without_its_scale(runner: Runner) -> None:
    same = ("zero=stage0", "launch.num_processes=1")
    plain = runner(*same, "precision=fp32")
    done = runner(*same, "precision=bf16_autocast", "precision.torch_autocast.dtype=float16")
    norms = [row["grad_norm"] for row in plain.rows("loss")]
    assert [row["grad_norm"] for row in done.rows("loss")] == pytest.approx(norms, rel=1e-3)


def test_muon_trains_without_a_compiler(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    steps = runner("optim=muon", "launch.num_processes=2", "monitor=csv").rows("loss")
    # The rate is AdamW's; the norm that DeepSpeed keeps is the update's.
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    assert [row["grad_norm"] for row in steps] == [None, None, None]


def test_deepspeed_says_what_it_is_asked_to_say(runner: Runner) -> None:
    """Its logs, profile and monitors are where the settings say, and change no loss."""
    same = split("precision=fp32 launch.num_processes=2 train.gradient_checkpointing=true")
    plain = runner(*same, *at_stage(3))
    more = (
        "steps_per_print=2 wall_clock_breakdown=true memory_breakdown=true dump_state=true"
        " comms_logger.enabled=true comms_logger.verbose=true flops_profiler.enabled=true"
        " flops_profiler.profile_step=1 tensorboard.enabled=true tensorboard.job_name=theirs"
        " activation_checkpointing.profile=true"
        " activation_checkpointing.synchronize_checkpoint_boundary=true"
    )
    monitor = "+deepspeed.extra.csv_monitor={enabled: true, output_path: csv, job_name: deepspeed}"
    done = runner(*same, *at_stage(3), *(f"deepspeed.{word}" for word in split(more)), monitor)
    assert done.losses == plain.losses
    log = done.run_dir.rank_log(0).read_text()
    for text in (
        *("step=2, skipped=0, lr=[", "time (ms) | fwd_microstep: ", "Engine before backward"),
        *("DeepSpeedEngine:\n", "comm op: all_reduce | time (ms): ", "Profile Summary at step 2:"),
        *("Comm. Op            Message Size        Count ", "DeepSpeed Flops Profiler -----"),
    ):
        assert text in log, text
    assert "step=1, skipped=0, lr=[" not in log
    recomputed = "[Rank 0] time (ms) | backward: "
    assert log.count(recomputed) == 3 * 2  # steps, layers
    assert recomputed not in plain.run_dir.rank_log(0).read_text()
    rates = (runner.folder / "csv/deepspeed/Train_Samples_lr.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rates] == ["step", "4", "8", "12"]
    assert list(done.run_dir.tensorboard.glob("theirs/events.*"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["60m", "130m", "350m"])
def test_published_shapes_train(runner: Runner, model: str) -> None:
    """Whole, as far as they and their optimizer fit a small machine: 1b wants 21 GB."""
    # bf16 whatever the CPU: in fp32 350m wants 21 GB too.
    words = (
        f"model={model} precision=bf16 tokenizer.vocab_size=512 batch.global_batch_size=2"
        " train.max_steps=3 train.eval_sequences=2 train.sample_tokens=2"
    )
    done = train_shape(runner, *split(words))
    assert len(done.losses) == 3
    assert done.losses[0] == pytest.approx(math.log(32_000), abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["1b", "llama2_70b", "llama3_8b", "llama32_1b", "llama32_3b"])
def test_large_shapes_train_when_made_narrow(runner: Runner, model: str) -> None:
    """The rest of a shape (rotary scaling, ties, biases) at debug=smoke's width."""
    done = runner(f"model={model}", "model.max_position_embeddings=1024")
    assert len(done.losses) == 3


def test_overfit_learns_one_batch_by_heart(runner: Runner) -> None:
    words = "debug=overfit model.vocab_size=512 model.hidden_size=128 optim.learning_rate=3e-3"
    done = train_shape(runner, *split(words), "batch.global_batch_size=8")
    assert done.losses[-1] < 0.5
    assert len({row["sample_hash"] for row in done.rows("loss")}) == 1


def test_goes_on_from_an_export_with_a_larger_tokenizer(
    runner: Runner, full: Command, tmp_path: Path
) -> None:
    """model=pretrained: the same loss as the export had; rows are padded in training only."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(full.run_dir.export, tokenizer)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["pad_token"] = None  # as most published ones have it
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[PAD]"]
    content["model"]["vocab"]["<was-pad>"] = content["model"]["vocab"].pop("[PAD]")
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    words = (
        f"model=pretrained model.path={full.run_dir.export} tokenizer=pretrained zero=stage3"
        f" tokenizer.path={tokenizer} tokenizer.add_pad_token=true train.max_steps=2"
        " checkpoint.at_end=true train.eval_sequences=4 checkpoint.export=true"
    )
    done = train_shape(runner, *split(words))
    assert json.loads(done.run_dir.plan.read_text())["vocab_size"] == 520
    assert "513 tokens with [PAD]: embeddings grow from 512 to 520 rows" in done.output
    config = json.loads((done.run_dir.export / "config.json").read_text())
    assert config["vocab_size"] == 513  # the rows that only fill up a multiple of 8 are cut
    assert config["pad_token_id"] == 512
    # Eight new rows of near-zero logits aside, it is the model that was exported.
    before = full.rows("eval_loss")[-1]["eval_loss"]
    assert done.rows("eval_loss")[0]["eval_loss"] == pytest.approx(before, abs=0.02)


HYDRA_S = 0.22
"""What importing Hydra may take for the limits to hold as they stand; on a slower machine, or in a
slower moment, they are as much longer."""


def seconds_of(*words: str, cwd: Path) -> float:
    """Processor seconds of a Python process: what one waits for it where nothing else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, cwd=cwd, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("words", "limit_s"),
    [("--help", 1.0), ("--cfg job", 1.0), ("task=plan model=llama3_70b zero=stage3", 1.2)],
)
def test_quick_answers_import_no_torch(tmp_path: Path, words: str, limit_s: float) -> None:
    command = [str(ROOT / "run.py"), *split(words)]
    traced = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(traced, capture_output=True, text=True, cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "deepspeed", "datasets", "tokenizers"}
    assert "omegaconf" in imported
    rounds = []
    for _ in range(5):
        slower = max(1.0, seconds_of("-c", "import hydra.main", cwd=tmp_path) / HYDRA_S)
        rounds.append((seconds_of(*command, cwd=tmp_path), limit_s * slower))
    assert any(took <= limit for took, limit in rounds), rounds


def test_help_shows_groups_and_commands(runner: Runner) -> None:
    text = runner.bare("--help").output
    assert "zero: stage0, stage1, stage2, stage2_offload" in " ".join(text.split())
    for option in list_options():
        group, _, name = option.partition("=")
        assert f"  {group}: " in text
        assert name in text
    assert max(len(line) for line in text.splitlines()) <= 100
    commands = [line for line in text.splitlines() if line.startswith("  python run.py")]
    assert len(commands) == 10


def test_tab_completion(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shell function asks of run.py, for the line `python run.py zero=st`."""
    monkeypatch.setenv("COMP_LINE", "python run.py zero=st")
    monkeypatch.setenv("COMP_POINT", "21")
    stages = split("stage0 stage1 stage2 stage2_offload stage3 stage3_nvme stage3_offload")
    found = runner.bare("-sc", "query=bash").output.split()
    assert found == [f"zero={name}" for name in stages]


def test_plan_task_prints_the_deepspeed_json(runner: Runner) -> None:
    done = runner.bare("task=plan", "model=llama2_7b", "zero=stage3", "precision=bf16")
    config = json.loads(done.output[done.output.index("\n{") :])
    assert config["zero_optimization"]["stage"] == 3
    assert config["bf16"]["enabled"] is True
    assert not list(runner.folder.rglob("snapshot.yaml"))
