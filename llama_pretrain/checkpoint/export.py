"""A checkpoint as a model in Hugging Face format, proved to be the model that was trained.

Weights are streamed from the checkpoint's pieces into shards, a few million elements at a time; no
DeepSpeed, no process group. Letters: T tokens, V vocabulary.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from llama_pretrain.checkpoint.manifest import read_manifest
from llama_pretrain.checkpoint.model_card import render_card
from llama_pretrain.checkpoint.tensors import LOGITS, WEIGHT, StoredState, write_bytes
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.precision import Precision, PrecisionName
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.files import write_text
from llama_pretrain.runs.layout import RunDir

PROOF = "export.json"


INDEX = "model.safetensors.index.json"


VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Parameters with a row a token."""


DTYPES = {
    PrecisionName.fp32: torch.float32,
    PrecisionName.bf16: torch.bfloat16,
    PrecisionName.fp16: torch.float16,
}


NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


TOLERANCES = {"fp32": 1e-5, "16 bits": 0.02}


CHUNK = 1 << 20
"""Elements read, cast and written at a time."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What export.json says: from which checkpoint, and how near to what was trained."""

    checkpoint: str
    step: int
    precision: str
    logit_difference: float
    """Largest difference to the training engine's logits, over the largest logit or 1."""
    logit_tolerance: float
    files: dict[str, str]
    """Name -> SHA-256."""


def export_checkpoint(checkpoint: Path, target: Path, *, run: Run, run_dir: RunDir) -> Proof:
    """Write a checkpoint's model to `target`, and compare its logits with the training engine's.

    The weights keep the precision that they were trained in. Rows that only pad a grown vocabulary
    are left out; ids of a model's own vocabulary that the tokenizer lacks are never generated.
    What is at `target` stays until the new export has proved itself.

    Args:
        run: what was trained, with the settings of this export.
        run_dir: where it was trained: its tokenizer, and the facts of the model card.

    Raises:
        UserError: if the logits differ by more than the tolerance, or `target` is something else.
        OSError: if a file can't be read or written.
    """
    _check_target(target)
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = _write_model(checkpoint, temporary, run=run, tokenizer_dir=run_dir.tokenizer)
        difference = compare_logits(temporary, checkpoint, precision=run.precision)
        tolerance = tolerance_of(run)
        if not difference <= tolerance:  # NaN is no small difference either
            raise UserError([_refusal(difference, tolerance, run, checkpoint, target)])
        manifest = read_manifest(checkpoint)
        card = render_card(run, run_dir, checkpoint, manifest, difference=difference)
        write_text(temporary / "README.md", card)
        others = [path for path in temporary.iterdir() if path.name not in files]
        proof = Proof(
            checkpoint=checkpoint.name,
            step=manifest.step,
            precision=precision_text(run.precision),
            logit_difference=difference,
            logit_tolerance=tolerance,
            files=files | {path.name: hash_file(path) for path in sorted(others)},
        )
        write_text(temporary / PROOF, json.dumps(asdict(proof), indent=2) + "\n")
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return proof


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def precision_text(precision: Precision) -> str:
    """`bf16`, or `fp32 with autocast to bfloat16`."""
    autocast = precision.torch_autocast
    casts = f" with autocast to {autocast.dtype.value}" if autocast.enabled else ""
    return f"{precision.name.value}{casts}"


def tolerance_of(run: Run) -> float:
    """How far logits may differ, over the largest or 1."""
    if run.export.logit_tolerance is not None:
        return run.export.logit_tolerance
    full = run.precision.name is PrecisionName.fp32 and not run.precision.torch_autocast.enabled
    return TOLERANCES["fp32" if full else "16 bits"]


def _check_target(target: Path) -> None:
    """Refuse to replace a folder that is no model.

    Raises:
        UserError: naming it.
    """
    if target.exists() and not (target.is_dir() and (target / "config.json").is_file()):
        message = f"{target} is there already, and no export"
        hint = "name a folder that isn't there: it is made"
        raise UserError([Problem(path="export.target", message=message, hint=hint)])


def _refusal(
    difference: float, tolerance: float, run: Run, checkpoint: Path, target: Path
) -> Problem:
    hint = f"if that is close enough, set export.logit_tolerance={difference * 1.1:.1g}"
    if run.precision.buffer_dtype is not None:
        hint = "precision.buffer_dtype rounds rotary frequencies, and transformers doesn't; " + hint
    return Problem(
        path="export.logit_tolerance",
        message=f"the logits of the exported {checkpoint.name} differ from the training engine's by"
        f" {difference:.2g} of the largest (got {tolerance:g}), so {target} was not written",
        hint=hint,
    )


def _replace(folder: Path, target: Path) -> None:
    """Put a finished folder in the place of one that may be there."""
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def _write_model(
    checkpoint: Path, target: Path, *, run: Run, tokenizer_dir: Path
) -> dict[str, str]:
    """Everything that transformers reads. Returns the SHA-256 of the weights' files."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    ids = set(tokenizer.get_vocab().values())
    dtype = DTYPES[run.precision.name]
    with StoredState(checkpoint) as stored:
        rows = stored.shapes[VOCABULARY[0]][0]
        grown = rows > run.model.vocab_size
        vocab_size = min(rows, max(ids) + 1) if grown else rows
        files = write_weights(
            stored,
            target,
            dtype=dtype,
            vocab_size=vocab_size,
            max_shard_bytes=parse_size(run.export.max_shard_size),
        )
    values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig.from_dict(values)
    config.vocab_size, config.dtype = vocab_size, dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(target)
    _write_generation_config(config, tokenizer, target, unknown=sorted({*range(vocab_size)} - ids))
    tokenizer.save_pretrained(target)
    return files


def _write_generation_config(
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    unknown: Sequence[int],
) -> None:
    """Defaults for generate: ids that the tokenizer doesn't have are never chosen."""
    settings: dict[str, Any] = {"suppress_tokens": list(unknown)} if unknown else {}
    config_class: Any = GenerationConfig  # its __init__ has no types
    config_class(
        bos_token_id=config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    ).save_pretrained(target)


def write_weights(
    stored: StoredState,
    target: Path,
    *,
    dtype: torch.dtype,
    vocab_size: int,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write model.safetensors, or its shards and their index. Returns their SHA-256.

    A tied head is no parameter of its own, and is written with the embeddings alone.
    """
    shapes = {
        name: [vocab_size, *shape[1:]] if name in VOCABULARY else shape
        for name, shape in stored.shapes.items()
    }
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = split_shards(sizes, max_bytes=max_shard_bytes)
    count = len(shards)
    files: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        file = file if count > 1 else "model.safetensors"
        parts = _shard_parts(stored, {name: shapes[name] for name in names}, dtype)
        _, files[file] = write_bytes(target / file, parts)
        places |= dict.fromkeys(names, file)
    if count > 1:
        total = sum(sizes.values())
        metadata = {"total_parameters": total // dtype.itemsize, "total_size": total}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        write_text(target / INDEX, json.dumps(index, indent=2) + "\n")
    return files


def split_shards(sizes: Mapping[str, int], *, max_bytes: int) -> list[list[str]]:
    """Names in their order, a new shard where one would pass the limit; a larger one alone."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _shard_parts(
    stored: StoredState, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> Iterator[bytes | memoryview]:
    """The bytes of one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, shape in shapes.items():
        total = torch.Size(shape).numel()
        for start in range(0, total, CHUNK):
            piece = stored.read(name, WEIGHT, start, min(CHUNK, total - start)).to(dtype)
            yield memoryview(piece.view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer


@torch.no_grad()
def compare_logits(folder: Path, checkpoint: Path, *, precision: Precision) -> float:
    """Largest difference between an export's logits and those of the engine that trained it.

    Over the largest logit or 1, on the tokens of the checkpoint's logits.safetensors: `input_ids`
    (1, T), `logits` (1, T, V), of which an export with fewer rows has the first.
    """
    stored = load_file(checkpoint / LOGITS)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="sdpa", local_files_only=True
    )
    with _autocast(precision):
        logits = model(input_ids=stored["input_ids"], use_cache=False).logits.float()
    trained = stored["logits"][..., : logits.shape[-1]]
    return float((logits - trained).abs().max() / trained.abs().max().clamp(min=1.0))


def _autocast(precision: Precision) -> AbstractContextManager[Any]:
    """What the run multiplied in."""
    autocast = precision.torch_autocast
    if not autocast.enabled:
        return nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, autocast.dtype.value))
