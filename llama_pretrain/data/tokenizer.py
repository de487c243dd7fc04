"""Tokenizers: trained on the corpus or loaded from a directory, and cached under their hash."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_pretrain.config.problems import Problem, refuse
from llama_pretrain.config.tokenizer import Tokenizer as TokenizerConfig
from llama_pretrain.data.cache import Cache, data_error
from llama_pretrain.files import hash_bytes, hash_text
from llama_pretrain.plan.pretrained import NO_CODE, find_code

PAD, BOS, EOS = "[PAD]", "<s>", "</s>"
FORMAT = 2
"""Increase it when the same text and options give another tokenizer."""


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """A tokenizer on disk, ready to encode."""

    folder: Path
    digest: str
    backend: Tokenizer
    eos_id: int

    @property
    def size(self) -> int:
        """Number of tokens, including added ones."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, target: Path) -> None:
    """Train a byte-level BPE tokenizer and write a directory that AutoTokenizer loads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    _write(backend, config, target)


def find_tokenizer(
    config: TokenizerConfig,
    *,
    recipe: Sequence[str],
    texts: Callable[[], Iterable[str]],
    cache: Cache,
) -> TrainedTokenizer:
    """The tokenizer that is trained on these texts, from the cache if it is there.

    Args:
        recipe: what decides the texts.
    """
    key = "\n".join([*recipe, str(config.vocab_size), str(config.sample_bytes), str(FORMAT)])
    target = cache.folder / "tokenizers" / hash_text(key)[:16]
    if not target.is_dir():
        cache.report.say(f"training a tokenizer of {config.vocab_size:,} tokens")
        train_tokenizer(texts(), vocab_size=config.vocab_size, target=target)
    return open_tokenizer(target)


def import_tokenizer(config: TokenizerConfig, cache: Cache) -> Path:
    """Copy a pretrained tokenizer into the cache.

    Its padding token becomes one that it has, so that it does not grow, unless
    `tokenizer.add_pad_token` is set.

    Raises:
        UserError: if its files are damaged, or it has no end-of-text token.
    """
    option, folder = "tokenizer.path", Path(str(config.path)).expanduser().resolve()
    file = folder / "tokenizer.json"
    if not file.is_file():
        hint = "Use a directory that save_pretrained of a fast tokenizer wrote"
        raise data_error(option, f"must have a tokenizer.json (got {folder})", hint)
    refuse(Problem(path=option, message=text, hint=NO_CODE) for text in find_code(folder))
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise data_error(option, f"{file} cannot be read: {error}") from error
    # Settings for inference would cut documents and train on padding.
    backend.no_truncation()
    backend.no_padding()
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= _read_settings(folder / name)
    # transformers 5 refuses the objects of special_tokens_map.json; tokenizer.json has their flags.
    settings |= {
        key: text
        for key, value in settings.items()
        if key.endswith("_token") and (text := _content(value)) is not None
    }
    eos = _content(settings.get("eos_token"))
    if eos is None or backend.token_to_id(eos) is None:
        got = settings.get("eos_token")
        raise data_error(option, f"{folder} has no eos_token in its vocabulary (got {got})")
    pad = _content(settings.get("pad_token"))
    if pad is None or backend.token_to_id(pad) is None:
        if config.add_pad_token:
            backend.add_special_tokens([PAD])
            settings["pad_token"] = PAD
        else:
            settings["pad_token"] = _choose_pad(backend, settings, eos)
    digest = hash_text(backend.to_str() + json.dumps(settings, sort_keys=True))
    target = cache.folder / "tokenizers" / digest[:16]
    if not target.is_dir():
        _write(backend, settings, target)
    return target


def _read_settings(file: Path) -> dict[str, Any]:
    """The JSON object of an optional file.

    Raises:
        UserError: if it is damaged.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise data_error("tokenizer.path", f"{file} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        message = f"{file} must be a JSON object (got a {type(values).__name__})"
        raise data_error("tokenizer.path", message)
    return values


def _choose_pad(backend: Tokenizer, settings: dict[str, Any], eos: str) -> str:
    """A token of the vocabulary to pad with: made for it, else unk, else reserved, else eos."""
    special = [
        token.content
        for _, token in sorted(backend.get_added_tokens_decoder().items())
        if token.special
    ]
    made_for_it = [
        name for name in special if re.search(r"\bpad(ding)?\b", name.replace("_", " "), re.I)
    ]
    unk = _content(settings.get("unk_token"))
    known = [unk] if unk is not None and backend.token_to_id(unk) is not None else []
    reserved = [name for name in special if "reserved" in name.lower()]
    return next(iter([*made_for_it, *known, *reserved]), eos)


@lru_cache(maxsize=1)  # a second copy in the process has scattered memory and encodes slower
def open_tokenizer(folder: Path) -> TrainedTokenizer:
    """Open a tokenizer of the cache, which encodes special tokens in a text as plain text."""
    content = (folder / "tokenizer.json").read_bytes()
    backend = Tokenizer.from_str(content.decode("utf-8"))
    backend.encode_special_tokens = True
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return TrainedTokenizer(
        folder=folder,
        digest=hash_bytes(content),
        backend=backend,
        eos_id=backend.get_vocab()[_content(settings["eos_token"]) or EOS],
    )


def _content(token: Any) -> str | None:
    """A token's text, in either form that transformers writes; `None` for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _write(backend: Tokenizer, settings: dict[str, Any], target: Path) -> None:
    """Write a tokenizer directory under a temporary name and rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # mkdtemp would deny access to others
    backend.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": PAD, "clean_up_tokenization_spaces": False} | settings
    settings["padding_side"] = "right"
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    try:
        os.rename(folder, target)
    except OSError:  # another process was faster
        if not target.is_dir():
            raise
        shutil.rmtree(folder)
