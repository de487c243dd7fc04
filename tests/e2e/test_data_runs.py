"""Runs on data of every kind, from the command line."""

import json
import shutil
from pathlib import Path
from shlex import split

import datasets
import numpy as np
import pytest

from llama_pretrain.plan.plan import load_plan
from tests.conftest import Command, Runner
from tests.e2e.test_parity import at_stage

MIXED = split(
    "data=mixture data.paths=[] data.mixture_block=10 data.document_mask=true precision=fp32"
    " data.stages=[{from_tokens:0,sequence_length:16},{from_tokens:1500,weights:{mail:1,json:4}}]"
    " batch.global_batch_size=12 train.max_steps=4 train.eval_every_steps=2"
    " train.eval_sequences=10"
)


def mixed(runner: Runner, *more: str) -> Command:
    sources = [
        f"+data.sources={{{name}:{{name:text,paths:['{runner.corpus.parent / folder}/*.py'],"
        f"weight:{weight}}}}}"
        for name, folder, weight in (("mail", "email", 3), ("json", "json", 2))
    ]
    return runner(*MIXED, *sources, *more)


def compare(one: Command, other: Command) -> float:
    """Largest difference of the losses of two runs on the same samples."""
    for key in ("sample_hash", "tokens"):
        assert [r[key] for r in one.rows("loss")] == [r[key] for r in other.rows("loss")]
    apart = np.subtract(one.losses, other.losses)
    for key in ("eval_loss", "eval_loss/mail", "eval_loss/json", "bits_per_byte"):
        left, right = ([row[key] for row in done.rows(key)] for done in (one, other))
        assert len(left) == 3
        apart = np.append(apart, np.subtract(left, right))
    return float(np.abs(apart).max())


@pytest.fixture(scope="module")
def on_one_rank(shared_runner: Runner) -> Command:
    return mixed(shared_runner, "launch.num_processes=1", *at_stage(1))


def test_a_mixture_in_stages_is_told_before_it_is_trained(on_one_rank: Command) -> None:
    said = " ".join(on_one_rank.output.split())
    plan = load_plan(on_one_rank.run_dir.plan)
    assert plan.corpus is not None
    assert plan.steps.epochs is not None
    mail = plan.corpus.sources[0]
    # 48 rows: of the first 24 rows three fifths are mail, of the rest one fifth.
    assert plan.steps.epochs["mail"] == pytest.approx((14.4 + 4.8) / mail.train_sequences)
    epochs = f"mail {plan.steps.epochs['mail']:.2f} epochs of {mail.train_sequences:,} sequences"
    assert f"{epochs}, 60.0% at first" in said
    assert "from step 1 sequences of 16 tokens, mail 60.0%, json 40.0%" in said
    assert "from step 3 sequences of 64 tokens, mail 20.0%, json 80.0%" in said
    assert "eval loss" in said
    assert "(mail " in said
    log = on_one_rank.run_dir.rank_log(0).read_text()
    assert "document mask: logits change by " in log
    assert (on_one_rank.run_dir.tokenizer / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(2, 3), *(pytest.param(*point, marks=pytest.mark.slow) for point in ((3, 2), (4, 3)))],
)
def test_more_ranks_read_the_same_mixture(
    shared_runner: Runner, on_one_rank: Command, ranks: int, stage: int
) -> None:
    done = mixed(shared_runner, f"launch.num_processes={ranks}", *at_stage(stage))
    assert compare(on_one_rank, done) <= 2e-6


@pytest.mark.slow
def test_a_mixture_is_gone_on_with_exactly(shared_runner: Runner, on_one_rank: Command) -> None:
    cut = mixed(shared_runner, "launch.num_processes=1", *at_stage(1), "checkpoint.every_steps=2")
    manifest = json.loads((cut.run_dir.checkpoints / "step-00000002/manifest.json").read_text())
    rows = on_one_rank.rows("loss")
    assert manifest["sample_hash"] == rows[1]["sample_hash"]
    shutil.rmtree(cut.run_dir.checkpoints / "step-00000004", ignore_errors=True)
    again = shared_runner.bare(f"resume={cut.run_dir.path}", run_dir=cut.run_dir)
    assert compare(on_one_rank, again) == 0


def test_another_corpus_is_named_on_resume(runner: Runner, tmp_path: Path, cache_dir: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in sorted(runner.corpus.glob("*.py"))[:12]:
        shutil.copy(path, texts / f"{path.name}.txt")
    words = (
        f"data.paths=['{texts}/*.txt'] launch.num_processes=1 data.heldout_fraction=0.2"
        " checkpoint.every_steps=2 train.max_steps=2 checkpoint.at_end=true"
    )
    cut = runner(*split(words))
    before = json.loads((cut.run_dir.checkpoints / "step-00000002/manifest.json").read_text())
    (texts / "more.txt").write_text("one text more " * 50)
    resume = (f"resume={cut.run_dir.path}", "train.max_steps=4", "checkpoint.at_end=false")
    refused = runner.bare(*resume, run_dir=cut.run_dir, expect=1).output
    assert f"data: was {before['data']['data'][:16]} when step-00000002 was trained" in refused
    assert "or resume anyway with resume.allow_data_change=true" in refused
    # The tokenizer was learnt from the text; with another the embeddings mean other tokens.
    own = f"tokenizer.name=pretrained tokenizer.path={cut.run_dir.tokenizer}"
    assert f"tokenizer: was {before['data']['tokenizer'][:16]} when step-00000002" in refused
    assert f"Use the run's own: {own}" in refused
    free = (*resume, "resume.allow_data_change=true")
    assert "tokenizer: was" in runner.bare(*free, run_dir=cut.run_dir, expect=1).output
    done = runner.bare(*free, *own.split(), run_dir=cut.run_dir)
    assert "the data has changed: data was" in done.output
    assert [row["step"] for row in done.rows("loss")] == [1, 2, 3, 4]


def test_inspect_shows_sequences_and_writes_a_page(runner: Runner) -> None:
    done = runner("task=inspect", "data.document_mask=true", "data.sequence_length=128")
    page = done.run_dir.inspection
    for text in ("documents per sequence", "tokens, up to", "sequence ", f"page: {page}"):
        assert text in done.output
    assert page.read_text().count("<pre>") == 4
    assert {path.name for path in done.run_dir.path.iterdir()} == {"data.html"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepared", "megatron", "tokens", "huggingface"])
def test_other_kinds_train(runner: Runner, tmp_path: Path, kind: str) -> None:
    packing = "data.packing=best_fit" if kind == "prepared" else "data.packing=concatenate"
    made = runner("task=prepare", packing)
    assert not made.run_dir.path.exists()
    folder = Path(made.output.split()[-1])
    file = f"data.paths=['{folder}/train-00000.bin']"
    tokenizer = f"tokenizer=pretrained tokenizer.path={folder}/tokenizer"
    heldout = f"data.heldout_paths=['{folder}/heldout-00000.bin'] data.heldout_fraction=0.02"
    words = {
        "prepared": f"data.paths=['{folder}'] data.cache_dir={tmp_path}/other {packing}",
        "megatron": f"{file} {tokenizer}",
        "tokens": f"{file} {tokenizer} {heldout} data.dtype=uint16",
        "huggingface": f"data.paths=[] data.dataset={tmp_path}/disk",
    }[kind]
    texts = [path.read_text() for path in sorted(runner.corpus.glob("*.py"))]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "disk"))
    done = runner(f"data={kind}", *split(words), "launch.num_processes=1")
    assert len(done.losses) == 3
    assert done.rows("eval_loss")[-1]["bits_per_byte"] > 0
