"""Exports of checkpoints that are written here without a rank, read by transformers."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_pretrain.checkpoint.export import export_checkpoint, split_shards, write_weights
from llama_pretrain.checkpoint.manifest import METRICS, Manifest, write_manifest
from llama_pretrain.checkpoint.pretrained import validate_pretrained
from llama_pretrain.checkpoint.tensors import (
    LOGITS,
    STATE,
    StoredState,
    piece_key,
    rank_file,
    write_tensors,
)
from llama_pretrain.config.model import Model
from llama_pretrain.config.precision import Precision, PrecisionName, TorchAutocast
from llama_pretrain.config.problems import UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.tasks import Export, Generate
from llama_pretrain.data.tokenizer import train_tokenizer
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.resolve import resolve_choices
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks.generation import continue_prompt
from llama_pretrain.train.model import build_model
from tests.conftest import compose_run

STEP = "step-00000003"
TOKENS = 300
"""Of the tokenizer that the runs here have."""


def config_of(vocab_size: int, **changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **changes,
    )


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    text = "the lazy dog jumps over the quick brown fox and the fox jumps back " * 9
    train_tokenizer([text, text.upper()], vocab_size=TOKENS, target=target)
    assert len(AutoTokenizer.from_pretrained(target)) == TOKENS
    return target


Trained = Callable[..., tuple[LlamaForCausalLM, RunDir, Run]]


@pytest.fixture
def trained(tmp_path: Path, tokenizer_dir: Path) -> Trained:
    """A run directory with a checkpoint of a random model, in pieces of three ranks."""

    def write(
        vocab_size: int = TOKENS,
        *,
        own_vocab: int | None = None,
        precision: PrecisionName = PrecisionName.fp32,
        autocast: bool = False,
        **changes: Any,
    ) -> tuple[LlamaForCausalLM, RunDir, Run]:
        torch.manual_seed(5)
        model: Any = LlamaForCausalLM(config_of(vocab_size, initializer_range=0.5, **changes))
        model.eval()
        run_dir = RunDir(tmp_path / "run")
        run_dir.path.mkdir()
        run_dir.tokenizer.symlink_to(tokenizer_dir)
        write_checkpoint(model, run_dir.checkpoints / STEP, precision=precision, autocast=autocast)
        cast = Precision(name=precision, torch_autocast=TorchAutocast(enabled=autocast))
        shape = Model(vocab_size=vocab_size if own_vocab is None else own_vocab)
        return model, run_dir, Run(model=shape, precision=cast)

    return write


def manifest_of(precision: str, files: dict[str, list[int | str]]) -> Manifest:
    return Manifest(
        step=3,
        consumed_samples=12,
        global_batch_size=4,
        world_size=3,
        zero_stage=3,
        precision=precision,
        config_hash="",
        data={},
        sample_hash="",
        files=files,
    )


def write_checkpoint(
    model: LlamaForCausalLM, folder: Path, *, precision: PrecisionName, autocast: bool
) -> None:
    """What three ranks would write of a model, and what an engine would say to 8 tokens."""
    folder.mkdir(parents=True)
    ranks: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name, parameter in model.named_parameters():
        flat = parameter.detach().float().reshape(-1)
        cuts = [0, flat.numel() // 3 + 1, flat.numel() // 2 + 1, flat.numel()]
        for rank, tensors in enumerate(ranks):
            tensors[piece_key(name, "weight", cuts[rank])] = flat[cuts[rank] : cuts[rank + 1]]
            tensors[piece_key(name, "exp_avg", cuts[rank])] = -flat[cuts[rank] : cuts[rank + 1]]
    for rank, tensors in enumerate(ranks):
        write_tensors(folder / rank_file(rank), tensors)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    (folder / STATE).write_text(json.dumps({"parameters": shapes}))
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    rows = [
        {"step": 2, "tokens": 512, "eval_loss": 5.5, "perplexity": 244.69, "bits_per_byte": 3.25},
        {"step": 3, "tokens": 768, "loss": 5.25},
    ]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = torch.arange(40, 48)[None]
    dtype = torch.bfloat16 if precision is PrecisionName.bf16 else torch.float32
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        rounded: Any = LlamaForCausalLM(model.config)
        rounded.load_state_dict(model.state_dict())
        for parameter in rounded.eval().parameters():  # as the engine: rotary frequencies stay fp32
            parameter.data = parameter.data.to(dtype)
        logits = rounded(input_ids=tokens, use_cache=False).logits.float()
    write_tensors(folder / LOGITS, {"input_ids": tokens, "logits": logits})
    write_manifest(folder, manifest_of(precision.value, {}))


def export(run_dir: RunDir, run: Run, **settings: Any) -> Any:
    """The model as transformers reads it."""
    run = replace(run, export=Export(**settings))
    export_checkpoint(run_dir.checkpoints / STEP, run_dir.export, run=run, run_dir=run_dir)
    return AutoModelForCausalLM.from_pretrained(run_dir.export, dtype="auto")


def assert_equal(loaded: Any, model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> None:
    wanted = model.state_dict()
    got = loaded.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.dtype == dtype
        assert torch.equal(value, wanted[name].to(dtype)), name


@pytest.mark.parametrize("shards", [False, True])
def test_transformers_reads_the_very_weights(trained: Trained, shards: bool) -> None:
    model, run_dir, run = trained()
    loaded = export(run_dir, run, max_shard_size="20KB" if shards else "1GiB")
    assert_equal(loaded, model)
    files = sorted(run_dir.export.glob("*.safetensors"))
    if not shards:
        assert [file.name for file in files] == ["model.safetensors"]
        return
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


def test_shards_by_hand() -> None:
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 7}
    assert split_shards(sizes, max_bytes=8) == [["a", "b"], ["c"], ["d", "e"]]
    assert split_shards(sizes, max_bytes=100) == [["a", "b", "c", "d", "e"]]


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_weights_are_the_rounded_ones(trained: Trained, tied: bool) -> None:
    model, run_dir, run = trained(precision=PrecisionName.bf16, tie_word_embeddings=tied)
    loaded = export(run_dir, run)
    assert_equal(loaded, model, torch.bfloat16)
    config = json.loads((run_dir.export / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(run_dir.export / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118  # no mapping
    proof = json.loads((run_dir.export / "export.json").read_text())
    assert proof["logit_difference"] < 1e-5  # the same weights in the same arithmetic


def test_autocast_keeps_fp32_weights(trained: Trained) -> None:
    model, run_dir, run = trained(autocast=True)
    loaded = export(run_dir, run)
    assert_equal(loaded, model)
    proof = json.loads((run_dir.export / "export.json").read_text())
    assert proof["precision"] == "fp32 with autocast to bfloat16"
    assert proof["logit_difference"] < 1e-5  # it is multiplied as it was trained
    assert proof["logit_tolerance"] == 0.02


def test_rows_that_pad_a_grown_vocabulary_are_cut(trained: Trained) -> None:
    model, run_dir, run = trained(304, own_vocab=256)
    loaded = export(run_dir, run)
    assert loaded.config.vocab_size == TOKENS
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name][:TOKENS])
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        got, wanted = (m(tokens).logits for m in (loaded, model))
    assert torch.allclose(got, wanted[..., :TOKENS], atol=1e-5)
    assert "suppress_tokens" not in (run_dir.export / "generation_config.json").read_text()


def test_ids_that_the_tokenizer_lacks_are_kept_and_never_generated(trained: Trained) -> None:
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


def test_another_model_is_not_put_in_place(trained: Trained) -> None:
    """One weight that differs shows in the logits; what was there before stays."""
    model, run_dir, run = trained()
    export(run_dir, run)
    before = {path.name: path.read_bytes() for path in run_dir.export.iterdir()}
    checkpoint = run_dir.checkpoints / STEP
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.01
    flat = {"input_ids": torch.arange(40, 48)[None]}
    with torch.no_grad():
        flat["logits"] = model(input_ids=flat["input_ids"], use_cache=False).logits
    write_tensors(checkpoint / LOGITS, flat)
    with pytest.raises(UserError) as caught:
        export(run_dir, run)
    (problem,) = caught.value.problems
    assert problem.path == "export.logit_tolerance"
    assert f"the logits of the exported {STEP} differ from the training" in problem.message
    assert "(got 1e-05)" in problem.message
    assert f"{run_dir.export} was not written" in problem.message
    assert problem.hint.startswith("if that is close enough, set export.logit_tolerance=")
    assert {path.name: path.read_bytes() for path in run_dir.export.iterdir()} == before
    assert {path.name for path in run_dir.path.iterdir()} == {"checkpoints", "export", "tokenizer"}
    export(run_dir, run, logit_tolerance=float(problem.hint.rpartition("=")[2]))


def test_no_number_is_no_small_difference(trained: Trained) -> None:
    _, run_dir, run = trained()
    tokens = torch.arange(40, 48)[None]
    logits = torch.full((1, 8, TOKENS), torch.nan)
    write_tensors(run_dir.checkpoints / STEP / LOGITS, {"input_ids": tokens, "logits": logits})
    with pytest.raises(UserError, match="by nan of the largest"):
        export(run_dir, run)
    assert not run_dir.export.exists()


def test_what_is_no_export_is_not_replaced(trained: Trained) -> None:
    _, run_dir, run = trained()
    run_dir.export.mkdir()
    (run_dir.export / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"export\.target: .* is there already, and no export"):
        export(run_dir, run)
    assert (run_dir.export / "thesis.txt").read_text() == "mine"


def test_the_card_and_the_proof_say_what_was_trained(trained: Trained) -> None:
    _, run_dir, run = trained()
    packages = {"torch": "2.9", "rich": "13.1"}
    run_dir.provenance.write_text(json.dumps({"python": "3.11", "packages": packages}))
    export(run_dir, run)
    card = (run_dir.export / "README.md").read_text()
    assert "rich" not in card  # of all that is installed, what it was trained with
    for fact in (
        "| step | 3 |",
        "| tokens seen | 6,144 in rows of 512 |",  # 12 rows
        "| precision | fp32 |",
        "| ranks | 3, ZeRO stage 3 |",
        "| training loss | 5.2500 at this step |",
        "| held-out loss | 5.5000 at step 2 (perplexity 244.7, 3.2500 bits per byte) |",
        "| versions | python 3.11, torch 2.9 |",
        f"python run.py reproduce={run_dir.path}",
    ):
        assert fact in card
    proof = json.loads((run_dir.export / "export.json").read_text())
    assert (proof["checkpoint"], proof["step"], proof["precision"]) == (STEP, 3, "fp32")
    assert proof["logit_tolerance"] == 1e-5
    names = {path.name for path in run_dir.export.iterdir()}
    assert proof["files"].keys() == names - {"export.json"}
    for name, digest in proof["files"].items():
        assert hashlib.sha256((run_dir.export / name).read_bytes()).hexdigest() == digest


def anonymous_memory() -> int:
    """Bytes that this process holds itself: mapped files, which the system may drop, aside."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_weights_are_streamed(tmp_path: Path) -> None:
    """512 MiB in shards of 128 MiB take less memory than one of them."""
    width, rows, layers = 1024, 32_768, 4
    shapes = {f"layer{number}": [rows, width] for number in range(layers)}
    (tmp_path / STATE).write_text(json.dumps({"parameters": shapes}))
    piece = torch.arange(rows * width, dtype=torch.float32)
    for number in range(layers):
        write_tensors(tmp_path / rank_file(number), {f"layer{number}:weight:0": piece})
    del piece
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_memory())
            time.sleep(0.001)

    (tmp_path / "export").mkdir()
    with StoredState(tmp_path) as stored:
        before = anonymous_memory()
        thread = threading.Thread(target=watch)
        thread.start()
        files = write_weights(
            stored,
            tmp_path / "export",
            dtype=torch.float32,
            vocab_size=1,
            max_shard_bytes=128 << 20,
        )
        done.set()
        thread.join()
    assert len(files) == 4
    print(f"{(peak[0] - before) / 2**20:.0f} MiB")
    assert peak[0] - before < 128 << 20
    with safe_open(tmp_path / "export" / "model-00002-of-00004.safetensors", "pt") as file:
        assert torch.equal(file.get_slice("layer1")[rows - 1], torch.arange(width) + 33_553_408.0)


def test_a_checkpoint_is_a_pretrained_model(trained: Trained, tmp_path: Path) -> None:
    """Read whole, and with rows for a larger tokenizer."""
    model, run_dir, _ = trained()
    folder = run_dir.checkpoints / STEP
    words = ["model=pretrained", f"model.path={folder}", "tokenizer.vocab_size=300"]
    run = resolve_choices(compose_run([*words, "data.sequence_length=32"]), detect_machine())
    assert (run.model.vocab_size, run.model.num_key_value_heads) == (300, 2)
    for rows in (300, 304):
        ds_config = {"zero_optimization": {"stage": 0}}
        loaded = build_model(config_of(rows), seed=1, weights=folder, ds_config=ds_config)
        for name, value in loaded.state_dict().items():
            wanted = model.state_dict()[name]
            assert torch.equal(value[: len(wanted)], wanted), name
            if len(value) > len(wanted):
                assert 0 < value[len(wanted) :].std() < 0.03


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            (
                "has pickled weights, which are not opened: pytorch_model.bin; save it again with"
                " transformers' save_pretrained, which writes safetensors"
            ),
        ),
        (
            ["latest", "global_step9/mp_rank_00_model_states.pt"],
            (
                "is another program's DeepSpeed checkpoint, of pickles such as"
                " mp_rank_00_model_states.pt, which are not opened; write its weights with"
                " DeepSpeed's zero_to_fp32.py --safe_serialization"
            ),
        ),
        (["config.json", "rank00000.safetensors"], "has no manifest: its save was cut short"),
        (["config.json"], "no model.safetensors in "),
        (["model.safetensors"], "no config.json in "),
    ],
)
def test_weights_that_cannot_be_read_are_refused(
    tmp_path: Path, names: list[str], text: str
) -> None:
    touch(tmp_path, *names)
    run = compose_run(["model=pretrained", f"model.path={tmp_path}"])
    with pytest.raises(UserError) as caught:
        refuse(validate_pretrained(run))
    assert text in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_torn_checkpoint_is_refused(trained: Trained) -> None:
    _, run_dir, _ = trained()
    folder = run_dir.checkpoints / STEP
    write_manifest(folder, manifest_of("fp32", {"rank00001.safetensors": [17, ""]}))
    run = compose_run(["model=pretrained", f"model.path={folder}"])
    with pytest.raises(UserError, match=r"rank00001\.safetensors is missing, or not of 17 bytes"):
        refuse(validate_pretrained(run))


def test_continuations(trained: Trained) -> None:
    _, run_dir, run = trained()
    export(run_dir, run)

    def say(seed: int = 1, **settings: Any) -> str:
        chosen = Generate(**{"prompt": "the", "num_tokens": 12, **settings})
        return continue_prompt(run_dir.export, chosen, seed=seed)

    state = torch.get_rng_state()
    greedy = say(temperature=0)
    assert greedy.startswith("the")
    assert say(temperature=0, seed=2) == greedy
    assert say(top_k=1) == greedy
    assert say(top_p=1e-6, top_k=None) == greedy
    free = say(temperature=2.0, top_k=None)
    assert free == say(temperature=2.0, top_k=None)
    assert len({free, greedy, say(temperature=2.0, top_k=None, seed=2)}) == 3
    assert len(say(prompt="", temperature=0)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match=r"generate\.num_tokens: is too much after a prompt of"):
        say(num_tokens=64)
