"""Exports a checkpoint as a Hugging Face model and checks that it is the model that was trained.

Weights are read from the checkpoint and written one shard at a time, without DeepSpeed and without
a process group. Axes: T tokens, V vocabulary.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig
from transformers.utils import logging

from llama_pretrain.checkpoint.huggingface import load_model, load_tokenizer
from llama_pretrain.checkpoint.manifest import read_manifest
from llama_pretrain.checkpoint.model_card import describe_precision, render_card
from llama_pretrain.checkpoint.tensors import LOGITS, TRAINED_DTYPES, StoredState
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.precision import Precision, PrecisionName
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.files import hash_file, locking, write_json, write_text
from llama_pretrain.runs.layout import RunDir

PROOF = "export.json"
INDEX = "model.safetensors.index.json"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Parameters whose first axis is the vocabulary."""
TOLERANCE_FP32, TOLERANCE_16_BIT = 1e-5, 0.02


def quiet_transformers() -> None:
    """Turn off the progress bars and advice that transformers prints."""
    messages: Any = logging  # it has no types
    messages.disable_progress_bar()
    messages.set_verbosity_error()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Contents of export.json: the source checkpoint, and how close the export is to it."""

    checkpoint: str
    step: int
    precision: str
    logit_difference: float
    """Largest difference from the training engine's logits, over the largest logit or 1."""
    logit_tolerance: float
    files: dict[str, str]
    """Name -> SHA-256."""


def export_checkpoint(
    checkpoint: Path, target: Path, *, run: ResolvedRun, run_dir: RunDir
) -> Proof:
    """Write a checkpoint's model to `target` after comparing its logits with the engine's.

    Weights keep the precision of training. Embeddings that only pad a resized vocabulary are
    removed; ids of a model's own vocabulary that the tokenizer lacks are never generated. An older
    export at `target` is replaced only when the new one has passed.

    Args:
        run: the run that was trained, with the settings of this export.
        run_dir: its directory, for the tokenizer and the facts of the model card.

    Raises:
        UserError: if the logits differ by more than the tolerance, or `target` is not an export.
        OSError: if a file cannot be read or written.
    """
    if target.exists() and not (target.is_dir() and (target / "config.json").is_file()):
        message = f"exists and is not an export (got {target})"
        raise UserError(
            [Problem(path="export.target", message=message, hint="Name a folder that is not there")]
        )
    with _temporary_folder(target) as temporary:
        _write_model(checkpoint, temporary, run=run, tokenizer_dir=run_dir.tokenizer)
        difference = compare_logits(temporary, checkpoint, precision=run.precision)
        tolerance = _logit_tolerance(run)
        if not difference <= tolerance:  # NaN fails too
            raise UserError([_too_different(difference, tolerance, run, checkpoint)])
        manifest = read_manifest(checkpoint)
        card = render_card(run, run_dir, checkpoint, manifest, difference=difference)
        write_text(temporary / "README.md", card)
        proof = Proof(
            checkpoint=checkpoint.name,
            step=manifest.step,
            precision=describe_precision(run.precision),
            logit_difference=difference,
            logit_tolerance=tolerance,
            files={path.name: hash_file(path) for path in sorted(temporary.iterdir())},
        )
        write_json(temporary / PROOF, asdict(proof))
        _replace(temporary, target)
    return proof


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` for this export alone; those of killed exports are deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
    with ExitStack() as stack:
        with locking(target.parent):
            for stale in target.parent.glob(f".tmp-{target.name}-*"):
                with suppress(BlockingIOError), locking(stale, wait=False):
                    shutil.rmtree(stale)
            folder.mkdir()
            stack.enter_context(locking(folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _logit_tolerance(run: ResolvedRun) -> float:
    if run.export.logit_tolerance is not None:
        return run.export.logit_tolerance
    exact = run.precision.name is PrecisionName.fp32 and not run.precision.torch_autocast.enabled
    return TOLERANCE_FP32 if exact else TOLERANCE_16_BIT


def _too_different(
    difference: float, tolerance: float, run: ResolvedRun, checkpoint: Path
) -> Problem:
    hint = f"If that is close enough, set export.logit_tolerance={difference * 1.1:.1g}"
    if run.precision.buffer_dtype is not None:
        hint = "precision.buffer_dtype rounds rotary frequencies, transformers does not. " + hint
    return Problem(
        path="export.logit_tolerance",
        message=f"the logits of the exported {checkpoint.name} differ from the training engine's by"
        f" {difference:.2g} of the largest (got {tolerance:g}). Nothing was written",
        hint=hint,
    )


def _replace(folder: Path, target: Path) -> None:
    """Move a complete folder to `target`, which may exist; one export at a time does this."""
    old = target.with_name(f".old-{target.name}")
    with locking(target.parent):
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(folder, target)
        shutil.rmtree(old, ignore_errors=True)


def _write_model(checkpoint: Path, target: Path, *, run: ResolvedRun, tokenizer_dir: Path) -> None:
    """Write everything that transformers reads."""
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = set(tokenizer.get_vocab().values())
    dtype = TRAINED_DTYPES[run.precision.name.value]
    with StoredState(checkpoint) as stored:
        vocab_size = stored.shapes[VOCABULARY[0]][0]
        if vocab_size > run.model.vocab_size:  # resized
            vocab_size = min(vocab_size, max(ids) + 1)
        size = parse_size(run.export.max_shard_size)
        write_weights(stored, target, dtype=dtype, vocab_size=vocab_size, max_shard_bytes=size)
    values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig.from_dict(values)
    config.vocab_size, config.dtype = vocab_size, dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(target)
    unknown = sorted({*range(vocab_size)} - ids)
    config_class: Any = GenerationConfig  # its __init__ has no types
    config_class(
        bos_token_id=config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"suppress_tokens": unknown} if unknown else {}),
    ).save_pretrained(target)
    tokenizer.save_pretrained(target)


def write_weights(
    stored: StoredState, target: Path, *, dtype: torch.dtype, vocab_size: int, max_shard_bytes: int
) -> None:
    """Write model.safetensors, or its shards and their index; one shard is in memory at a time.

    A tied head is not a parameter of its own and is written once, with the embeddings.
    """
    shapes = {
        name: [vocab_size, *shape[1:]] if name in VOCABULARY else shape
        for name, shape in stored.shapes.items()
    }
    empty = {name: torch.empty(s, dtype=dtype, device="meta") for name, s in shapes.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file(
            # Copies: a slice would keep the whole fp32 tensor in memory.
            {n: stored.weight(n)[: shapes[n][0]].to(dtype, copy=True) for n in names},
            target / file,
            metadata={"format": "pt"},
        )
        with (target / file).open("rb") as written:
            os.fsync(written.fileno())
    if split.is_sharded:
        total = sum(tensor.numel() for tensor in empty.values())
        metadata = {"total_parameters": total, **split.metadata}
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        write_json(target / INDEX, {"metadata": metadata, "weight_map": weight_map})


@torch.no_grad()
def compare_logits(folder: Path, checkpoint: Path, *, precision: Precision) -> float:
    """Largest difference between an export's logits and those of the engine that trained it.

    It is relative to the largest logit or 1, on the tokens of the checkpoint's logits.safetensors:
    `input_ids` (1, T), `logits` (1, T, V). An export with a smaller vocabulary has the first ones.
    """
    stored = load_file(checkpoint / LOGITS)
    model = load_model(folder, dtype="auto", attn_implementation="sdpa")
    autocast = precision.torch_autocast
    dtype = getattr(torch, autocast.dtype.value)
    with torch.autocast("cpu", dtype=dtype) if autocast.enabled else nullcontext():
        logits = model(input_ids=stored["input_ids"], use_cache=False).logits.float()
    trained = stored["logits"][..., : logits.shape[-1]]
    return float((logits - trained).abs().max() / trained.abs().max().clamp(min=1.0))
