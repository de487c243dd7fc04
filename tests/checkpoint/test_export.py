"""Exports of checkpoints, read by transformers. The checkpoints are written without ranks."""

import hashlib
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_pretrain.checkpoint import export as export_module
from llama_pretrain.checkpoint.export import export_checkpoint
from llama_pretrain.checkpoint.manifest import METRICS, STATE, rank_file, write_manifest
from llama_pretrain.checkpoint.tensors import (
    LOGITS,
    StoredState,
    fragment_key,
    write_and_hash,
    write_tensors,
)
from llama_pretrain.config.precision import Precision, PrecisionName
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.tasks import Export, Generate
from llama_pretrain.data.tokenizer import train_tokenizer
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks.generation import continue_prompt
from llama_pretrain.train.model import build_model
from tests.checkpoint.damage import EXAMPLE
from tests.machines import plan_for_cluster
from tests.rows import evaluation_row, step_row, write_rows

STEP = "step-00000003"
PROBE = torch.arange(40, 48)[None]
TOKENS = 300
"""Size of the tokenizer."""


def config_of(vocab_size: int, **changes: Any) -> LlamaConfig:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids: Any = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(vocab_size=vocab_size, **sizes, **ids, **changes)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    text = "the lazy dog jumps over the quick brown fox and the fox jumps back " * 9
    train_tokenizer([text, text.upper()], vocab_size=TOKENS, target=target)
    assert len(AutoTokenizer.from_pretrained(target)) == TOKENS
    return target


Trained = Callable[..., tuple[LlamaForCausalLM, RunDir, ResolvedRun]]


@pytest.fixture
def trained(tmp_path: Path, tokenizer_dir: Path) -> Trained:
    """A run directory with a checkpoint of a random model, saved by three ranks."""

    def write(
        vocab_size: int = TOKENS, *, own_vocab: int = 0, precision: str = "fp32", **changes: Any
    ) -> tuple[LlamaForCausalLM, RunDir, ResolvedRun]:
        torch.manual_seed(5)
        model: Any = LlamaForCausalLM(config_of(vocab_size, initializer_range=0.5, **changes))
        model.eval()
        run_dir = RunDir(tmp_path / "run")
        run_dir.path.mkdir()
        run_dir.tokenizer.symlink_to(tokenizer_dir)
        size = own_vocab or vocab_size
        run = plan_for_cluster(f"precision={precision}", f"model.vocab_size={size}")
        write_checkpoint(model, run_dir.checkpoints / STEP, run)
        return model, run_dir, run

    return write


def write_checkpoint(model: LlamaForCausalLM, folder: Path, run: ResolvedRun) -> None:
    """What three ranks would write of a model, and the logits of an engine for 8 tokens."""
    folder.mkdir(parents=True)
    ranks: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name, parameter in model.named_parameters():
        flat = parameter.detach().float().reshape(-1)
        cuts = [0, flat.numel() // 3 + 1, flat.numel() // 2 + 1, flat.numel()]
        for rank, tensors in enumerate(ranks):
            values = flat[cuts[rank] : cuts[rank + 1]]
            tensors[fragment_key(name, "weight", cuts[rank])] = values
            tensors[fragment_key(name, "exp_avg", cuts[rank])] = -values
    files: dict[str, list[int | str]] = {}
    for rank, tensors in enumerate(ranks):
        files[rank_file(rank)] = list(write_tensors(folder / rank_file(rank), tensors))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    files[STATE] = list(
        write_and_hash(folder / STATE, [json.dumps({"parameters": shapes}).encode()])
    )
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    rows = [evaluation_row(2, 5.5, perplexity=244.69, bits_per_byte=3.25), step_row(3, loss=5.25)]
    write_rows(folder / METRICS, rows)
    dtype = torch.bfloat16 if run.precision.name is PrecisionName.bf16 else torch.float32
    with torch.no_grad(), torch.autocast("cpu", enabled=run.precision.torch_autocast.enabled):
        rounded: Any = LlamaForCausalLM(model.config)
        rounded.load_state_dict(model.state_dict())
        for parameter in rounded.eval().parameters():  # rotary frequencies stay fp32
            parameter.data = parameter.data.to(dtype)
        logits = rounded(input_ids=PROBE, use_cache=False).logits.float()
    write_tensors(folder / LOGITS, {"input_ids": PROBE, "logits": logits})
    manifest = replace(
        EXAMPLE, step=3, consumed_samples=12, world_size=3, zero_stage=3,
        precision=run.precision.name.value, files=files,
    )  # fmt: skip
    write_manifest(folder, manifest)


def export(run_dir: RunDir, run: ResolvedRun, **settings: Any) -> Any:
    """The exported model, read by transformers."""
    run = replace(run, export=Export(**settings))
    export_checkpoint(run_dir.checkpoints / STEP, run_dir.export, run=run, run_dir=run_dir)
    return AutoModelForCausalLM.from_pretrained(run_dir.export, dtype="auto")


def read_proof(run_dir: RunDir) -> Any:
    return json.loads((run_dir.export / "export.json").read_text())


def assert_equal(loaded: Any, model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> None:
    wanted = model.state_dict()
    got = loaded.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.dtype == dtype
        assert torch.equal(value, wanted[name].to(dtype)), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
def test_weights_have_the_precision_of_training(
    trained: Trained, precision: str, tied: bool
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, run_dir, run = trained(precision=precision, tie_word_embeddings=tied)
    assert_equal(export(run_dir, run), model, dtype)
    config = json.loads((run_dir.export / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(run_dir.export / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118  # not a mapping
    proof = read_proof(run_dir)
    assert proof["logit_difference"] < 1e-5  # the same weights in the same arithmetic
    assert proof["logit_tolerance"] == (1e-5 if precision == "fp32" else 0.02)
    autocast = precision == "bf16_autocast"
    assert proof["precision"] == ("fp32 with autocast to bfloat16" if autocast else precision)


def test_one_shard_is_in_memory_at_a_time(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    read = StoredState.weight

    def weight(stored: StoredState, name: str) -> torch.Tensor:
        assert not written  # freed before the next shard is read
        return read(stored, name)

    def save(tensors: dict[str, torch.Tensor], *args: Any, **more: Any) -> None:
        save_file(tensors, *args, **more)
        written.update(tensors.values())

    monkeypatch.setattr(StoredState, "weight", weight)
    monkeypatch.setattr("llama_pretrain.checkpoint.export.save_file", save)
    model, run_dir, run = trained()
    assert_equal(export(run_dir, run, max_shard_size="20KB"), model)
    files = sorted(run_dir.export.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        # The embeddings have 300 * 32 * 4 bytes, and a shard of their own.
        assert file.stat().st_size < 22_000 or len(names) == 1
    index = json.loads((run_dir.export / "model.safetensors.index.json").read_text())
    total = sum(value.numel() for value in model.state_dict().values())
    assert index["metadata"] == {"total_parameters": total, "total_size": 4 * total}


def test_padding_of_a_resized_vocabulary_is_removed(trained: Trained) -> None:
    model, run_dir, run = trained(304, own_vocab=280)
    loaded = export(run_dir, run)
    assert loaded.config.vocab_size == TOKENS
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name][:TOKENS])
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        got, wanted = (m(tokens).logits for m in (loaded, model))
    assert torch.allclose(got, wanted[..., :TOKENS], atol=1e-5)
    assert "suppress_tokens" not in (run_dir.export / "generation_config.json").read_text()


def test_ids_without_a_token_are_kept_and_never_generated(trained: Trained) -> None:
    _, run_dir, run = trained(320)
    loaded = export(run_dir, run)
    assert loaded.config.vocab_size == 320
    assert loaded.generation_config.suppress_tokens == list(range(TOKENS, 320))
    with torch.no_grad():
        loaded.lm_head.weight[TOKENS:] = 100 * loaded.lm_head.weight[:20]
    inputs = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 999}
    assert loaded.generate(inputs, **options).max() < TOKENS
    free = loaded.generate(inputs, suppress_tokens=None, **options)
    assert free.max() >= TOKENS


def test_a_different_model_is_not_exported(trained: Trained) -> None:
    """One weight that differs shows in the logits; the older export stays."""
    model, run_dir, run = trained()
    export(run_dir, run)
    before = {path.name: path.read_bytes() for path in run_dir.export.iterdir()}
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.01
        logits = model(input_ids=PROBE, use_cache=False).logits
    stored = {"input_ids": PROBE, "logits": logits}
    write_tensors(run_dir.checkpoints / STEP / LOGITS, stored)
    with pytest.raises(UserError) as caught:
        export(run_dir, run)
    (problem,) = caught.value.problems
    assert problem.path == "export.logit_tolerance"
    assert f"the logits of the exported {STEP} differ from the training" in problem.message
    assert problem.message.endswith("(got 1e-05). Nothing was written")
    assert problem.hint.startswith("If that is close enough, set export.logit_tolerance=")
    assert {path.name: path.read_bytes() for path in run_dir.export.iterdir()} == before
    assert {path.name for path in run_dir.path.iterdir()} == {"checkpoints", "export", "tokenizer"}
    export(run_dir, run, logit_tolerance=float(problem.hint.rpartition("=")[2]))
    stored["logits"].fill_(torch.nan)
    write_tensors(run_dir.checkpoints / STEP / LOGITS, stored)
    with pytest.raises(UserError, match="by nan of the largest"):
        export(run_dir, run)


def test_only_an_export_is_replaced(trained: Trained) -> None:
    _, run_dir, run = trained()
    run_dir.export.mkdir()
    (run_dir.export / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"export\.target: exists and is not an export \(got "):
        export(run_dir, run)
    assert (run_dir.export / "thesis.txt").read_text() == "mine"


def test_model_card_and_proof(trained: Trained) -> None:
    _, run_dir, run = trained()
    packages = {"torch": "2.9", "rich": "13.1"}
    run_dir.provenance.write_text(json.dumps({"python": "3.11", "packages": packages}))
    export(run_dir, run)
    card = (run_dir.export / "README.md").read_text()
    assert "rich" not in card  # only packages that decide numerics
    for fact in (
        "step | 3 |",
        "tokens seen | 3,072 in sequences of 256 |",  # 12 of them
        *("precision | fp32 |", "ranks | 3, ZeRO stage 3 |"),
        "training loss | 5.2500 at this step |",
        "held-out loss | 5.5000 at step 2 (perplexity 244.7, 3.2500 bits per byte) |",
        "versions | python 3.11, torch 2.9 |",
    ):
        assert f"| {fact}" in card
    assert f"python run.py reproduce={run_dir.path}" in card
    proof = read_proof(run_dir)
    assert (proof["checkpoint"], proof["step"], proof["precision"]) == (STEP, 3, "fp32")
    assert proof["logit_tolerance"] == 1e-5
    names = {path.name for path in run_dir.export.iterdir()}
    assert proof["files"].keys() == names - {"export.json"}
    for name, digest in proof["files"].items():
        assert hashlib.sha256((run_dir.export / name).read_bytes()).hexdigest() == digest


def test_a_checkpoint_is_a_pretrained_model(trained: Trained, tmp_path: Path) -> None:
    """Read as it is, and with more embeddings for a larger tokenizer."""
    model, run_dir, _ = trained()
    folder = run_dir.checkpoints / STEP
    words = ["model=pretrained", f"model.path={folder}", "tokenizer.vocab_size=300"]
    run = plan_for_cluster(*words, "data.sequence_length=32")
    assert (run.model.vocab_size, run.model.num_key_value_heads) == (300, 2)
    ds_config = {"zero_optimization": {"stage": 0}}
    for size in (300, 304):
        loaded = build_model(config_of(size), seed=1, weights=folder, ds_config=ds_config)
        for name, value in loaded.state_dict().items():
            wanted = model.state_dict()[name]
            assert torch.equal(value[: len(wanted)], wanted), name
            if len(value) > len(wanted):
                assert 0 < value[len(wanted) :].std() < 0.03


def test_generation_from_an_export(trained: Trained) -> None:
    _, run_dir, run = trained()
    export(run_dir, run)

    def generate(seed: int = 1, **settings: Any) -> str:
        chosen = Generate(**{"prompt": "the", "num_tokens": 12, **settings})
        return continue_prompt(run_dir.export, chosen, seed=seed)

    state = torch.get_rng_state()
    greedy = generate(temperature=0)
    assert greedy.startswith("the")
    assert generate(temperature=0, seed=2) == greedy
    assert generate(top_k=1) == greedy
    assert generate(top_p=1e-6, top_k=None) == greedy
    free = generate(temperature=2.0, top_k=None)
    assert free == generate(temperature=2.0, top_k=None)
    assert len({free, greedy, generate(temperature=2.0, top_k=None, seed=2)}) == 3
    assert len(generate(prompt="", temperature=0)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match=r"generate\.num_tokens: is too much after a prompt of"):
        generate(num_tokens=64)


def test_exports_at_the_same_time_do_not_disturb_each_other(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one begins and ends while the first compares; one that was killed leaves nothing."""
    _, run_dir, run = trained()
    killed = run_dir.path / ".tmp-export-0123"
    killed.mkdir()
    compare = export_module.compare_logits
    nested: list[Path] = []

    def compare_later(folder: Path, checkpoint: Path, *, precision: Precision) -> float:
        if not nested:
            nested.append(folder)
            export_checkpoint(checkpoint, run_dir.export, run=run, run_dir=run_dir)
        assert folder.is_dir()
        return compare(folder, checkpoint, precision=precision)

    monkeypatch.setattr(export_module, "compare_logits", compare_later)
    export_checkpoint(run_dir.checkpoints / STEP, run_dir.export, run=run, run_dir=run_dir)
    assert {path.name for path in run_dir.path.glob("*export*")} == {"export"}
    assert not list(run_dir.path.glob(".*export*"))
    assert AutoModelForCausalLM.from_pretrained(run_dir.export) is not None
