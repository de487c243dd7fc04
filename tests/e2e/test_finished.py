"""What follows a run: its export, evaluations, text, and runs that go on from it."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pretrain.runs.layout import RunDir
from tests.conftest import ROOT, Command, Runner
from tests.e2e.test_parity import SHARDED, at_stage, train_shape
from tests.rows import json_rows

TRAINED = split(
    "launch.num_processes=2 batch.micro_batch_size=1 precision=fp32 optim.learning_rate=3e-3"
    " train.max_steps=4 train.eval_every_steps=2 train.eval_sequences=null train.sample_tokens=8"
    " checkpoint.every_steps=2 checkpoint.export=true"
)
SECOND = "export.checkpoint=step-00000002"
"""The last checkpoint is made for the export only: checkpoint.at_end is false here."""


@pytest.fixture(scope="module")
def trained(shared_runner: Runner) -> Command:
    return shared_runner(*TRAINED, *at_stage(3))


def proof_of(folder: Path) -> dict[str, Any]:
    proof: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return proof


def evaluate(runner: Runner, trained: Command, *words: str, **options: Any) -> dict[str, Any]:
    """The row of an evaluation of the checkpoint of step 2."""
    done = runner.bare("task=evaluate", f"run={trained.run_dir.path}", SECOND, *words, **options)
    folder = RunDir(Path(done.output.split("written to")[1].split()[0]))
    assert folder.path.parent == trained.run_dir.path / "evaluations"
    (row,) = json_rows(folder.metrics)
    assert f"{row['eval_loss']:.6f}" in done.output
    assert f"{row['eval_tokens']:,}" in done.output
    return row


def test_a_run_ends_with_an_export_that_proves_itself(trained: Command) -> None:
    run_dir = trained.run_dir
    proof = proof_of(run_dir.export)
    assert (proof["checkpoint"], proof["precision"]) == ("step-00000004", "fp32")
    assert proof["logit_difference"] <= proof["logit_tolerance"] == 1e-5
    assert (
        "export: step-00000004 in fp32, largest difference of logits"
        f" {proof['logit_difference']:.1e} (tolerance 1e-05): {run_dir.export}" in trained.output
    )
    assert (run_dir.path / "sample.txt").read_text().startswith("The")
    names = sorted(path.name for path in run_dir.checkpoints.iterdir())
    assert names == ["latest", "step-00000002"]
    assert (run_dir.checkpoints / "latest").read_text() == "step-00000002\n"
    assert not [path for path in run_dir.path.iterdir() if path.name.startswith(".tmp")]


def test_an_evaluation_is_the_runs_own(shared_runner: Runner, trained: Command) -> None:
    before = next(row for row in trained.rows("eval_loss") if row["step"] == 2)
    snapshot = trained.run_dir.snapshot.read_bytes()
    row = evaluate(shared_runner, trained)
    assert (row["checkpoint"], row["step"]) == ("step-00000002", 2)
    for key in ("eval_loss", "perplexity", "bits_per_byte"):
        assert row[key] == pytest.approx(before[key], rel=1e-9), key
    plan = json.loads(trained.run_dir.plan.read_text())
    assert row["eval_tokens"] == 64 * sum(s["heldout_sequences"] for s in plan["corpus"]["sources"])
    assert trained.run_dir.snapshot.read_bytes() == snapshot
    # On other ranks, with other micro batches and another stage.
    words = split("launch.num_processes=1 batch.micro_batch_size=3 zero=stage0")
    other = evaluate(shared_runner, trained, *words)
    assert other["eval_tokens"] == row["eval_tokens"]
    for key in ("eval_loss", "bits_per_byte"):
        assert other[key] == pytest.approx(row[key], abs=1e-6)


@pytest.mark.slow
def test_given_files_are_evaluated_whole(
    shared_runner: Runner, trained: Command, tmp_path: Path
) -> None:
    """The loss is that of transformers on the same sequences."""
    text = (ROOT / "LICENSE").read_text()
    (tmp_path / "text.txt").write_text(text)
    words = ("data=text", f"data.paths=[{tmp_path}/text.txt]", f"data.cache_dir={tmp_path}/cache")
    row = evaluate(shared_runner, trained, *words)
    target = tmp_path / "exported"
    words = (f"run={trained.run_dir.path}", SECOND, f"export.target={target}")
    shared_runner.bare("task=export", *words)
    assert proof_of(target)["checkpoint"] == "step-00000002"
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    num_sequences = (len(ids) - 1) // 64
    assert row["eval_tokens"] == 64 * num_sequences > 2000
    inputs, labels = (
        torch.tensor(ids[first : 64 * num_sequences + first]).view(num_sequences, 64)
        for first in (0, 1)
    )
    with torch.no_grad():
        logits = model(inputs, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert row["eval_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.slow
def test_an_evaluation_says_when_the_data_has_changed(
    shared_runner: Runner, trained: Command, tmp_path: Path
) -> None:
    shutil.copytree(trained.run_dir.path, tmp_path / "run")
    snapshot = tmp_path / "run" / "snapshot.yaml"
    values = yaml.safe_load(snapshot.read_text())
    values["data"]["hash"] = "0" * 64
    snapshot.write_text(yaml.safe_dump(values))
    done = shared_runner.bare("task=evaluate", f"run={tmp_path}/run", expect=1)
    assert "To evaluate on them anyway, set data.hash=null" in done.output


@pytest.mark.slow
def test_sources_of_a_mixture_are_evaluated_apart(runner: Runner) -> None:
    sources = "+data.sources={mail:{name:text,paths:['%s/*.py']},more:{name:text,paths:['%s']}}"
    more = Path(runner.corpus).parent / "json" / "*.py"
    words = ("data=mixture", "data.paths=[]", sources % (runner.corpus, more))
    done = runner(*TRAINED, *words, "checkpoint.export=false", "data.heldout_fraction=0.3")
    row = evaluate(runner, done)
    before = next(row for row in done.rows("eval_loss") if row["step"] == 2)
    keys = ("eval_loss", "eval_loss/mail", "eval_loss/more")
    assert [row[key] for key in keys] == pytest.approx([before[key] for key in keys])


TIED, FP32 = "model.tie_word_embeddings=true", "precision=fp32"
EXPORTED = (
    *(f"zero=stage0 {FP32}", f"zero=stage1 {FP32} {TIED}", f"zero=stage2 {FP32}"),
    *(f"zero=stage3 {FP32}", f"{SHARDED} {FP32}", f"{SHARDED} {FP32} {TIED}"),
    *("zero=stage0 precision=bf16", f"{SHARDED} precision=bf16"),
    "zero=stage1 precision=bf16_autocast",
    f"{SHARDED} {FP32} model.vocab_size=300 model.resize_embeddings=true",
)


@pytest.mark.slow
@pytest.mark.parametrize("words", EXPORTED)
def test_every_stage_exports_what_it_trained(runner: Runner, words: str) -> None:
    more = ("tokenizer.vocab_size=509", "checkpoint.at_end=true")
    done = runner(*TRAINED, *more, *split(words))
    proof = proof_of(done.run_dir.export)
    assert proof["checkpoint"] == "step-00000004"
    assert proof["logit_difference"] <= (1e-5 if FP32 in words else 0.02)
    config = json.loads((done.run_dir.export / "config.json").read_text())
    assert config["vocab_size"] == (509 if "resize" in words else 512)


@pytest.mark.slow
def test_text_alone_is_written_to_a_pipe(
    shared_runner: Runner, trained: Command, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    shutil.copytree(trained.run_dir.path, run_dir.path)
    shutil.rmtree(run_dir.export)
    words = (f"run={run_dir.path}", "generate.prompt=import os", "generate.num_tokens=12")
    command = [sys.executable, str(ROOT / "run.py"), "task=generate", *words]
    first, again = (
        subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        for _ in range(2)
    )
    assert first.stdout.startswith("import os")
    assert "export: step-00000002 in fp32" in first.stderr  # it exports first
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert shared_runner.bare("task=generate", *words, "seed=5").output != first.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("task=export zero=stage1", "zero.stage: is not read by task=export (got 1). Remove it."),
        (
            "task=evaluate export.checkpoint=../checkpoints/step-00000002",
            "export.checkpoint: does not exist (got ../checkpoints/step-00000002). Checkpoints: ",
        ),
    ],
)
def test_what_a_task_cannot_do_is_refused(
    shared_runner: Runner, trained: Command, words: str, text: str
) -> None:
    done = shared_runner.bare(*split(words), f"run={trained.run_dir.path}", expect=1)
    assert text in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_is_where_another_run_starts(
    shared_runner: Runner, trained: Command, stage: int
) -> None:
    before = next(row for row in trained.rows("eval_loss") if row["step"] == 2)
    words = (
        f"model=pretrained model.path={trained.run_dir.checkpoints}/step-00000002"
        f" tokenizer=pretrained tokenizer.path={trained.run_dir.tokenizer} precision=fp32"
        " launch.num_processes=2 train.max_steps=1 train.eval_sequences=null"
    )
    first = train_shape(shared_runner, *split(words), *at_stage(stage)).rows("eval_loss")[0]
    assert first["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)


@pytest.mark.slow
def test_lm_evaluation_harness_reads_an_export(trained: Command, tmp_path: Path) -> None:
    """A text whose bits per byte are computed here by hand."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.tasks import TaskManager

    text = "def add(a, b):\n    return a + b\n" * 3
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task = {
        "task": "own_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(task))
    export = trained.run_dir.export
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(export), "dtype": "float32"},
        tasks=["own_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=1,
    )["results"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])[None]
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    nats = cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    wanted = nats / math.log(2) / len(text.encode())
    assert results["own_text"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-4)
