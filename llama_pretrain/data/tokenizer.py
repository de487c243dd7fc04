"""Tokenizers: learnt from the corpus, or read from a directory; kept under their hash."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.tokenizer import Tokenizer as TokenizerConfig

PAD, BOS, EOS = "[PAD]", "<s>", "</s>"
FORMAT = 2
"""Raised whenever the same text and options would give another tokenizer."""


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """A tokenizer on disk, ready to encode."""

    folder: Path
    digest: str
    backend: Tokenizer
    eos_id: int

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, target: Path) -> None:
    """Learn a byte-level BPE and write it to `target` as AutoTokenizer reads it."""
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
    cache_dir: Path,
    report: Callable[[str], None],
) -> TrainedTokenizer:
    """The tokenizer that these texts give, learnt now or found in the cache.

    Args:
        recipe: whatever decides the texts.
    """
    named = [*recipe, str(config.vocab_size), str(config.sample_bytes), str(FORMAT)]
    key = hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]
    target = cache_dir / "tokenizers" / key
    if not target.is_dir():
        report(f"training a tokenizer of {config.vocab_size:,} tokens")
        train_tokenizer(texts(), vocab_size=config.vocab_size, target=target)
    return open_tokenizer(target)


def import_tokenizer(config: TokenizerConfig, *, cache_dir: Path) -> Path:
    """Copy a pretrained tokenizer into the cache, with [PAD] added where it has no padding token.

    Raises:
        UserError: if the directory holds no tokenizer.json, or names no end-of-text token.
    """
    assert config.path is not None
    folder = Path(config.path).expanduser().resolve()
    if not (folder / "tokenizer.json").is_file():
        message = f"no tokenizer.json in {folder}"
        hint = "give a directory that save_pretrained of a fast tokenizer wrote"
        raise UserError([Problem(path="tokenizer.path", message=message, hint=hint)])
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        message = f"{folder / 'tokenizer.json'} can't be read: {error}"
        raise UserError([Problem(path="tokenizer.path", message=message)]) from error
    # Settings of another use: they would cut documents, and train on padding.
    backend.no_truncation()
    backend.no_padding()
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= json.loads((folder / name).read_text(encoding="utf-8"))
    eos = _content(settings.get("eos_token"))
    if eos is None or backend.token_to_id(eos) is None:
        message = f"{folder} names no eos_token that its vocabulary has (got {eos})"
        raise UserError([Problem(path="tokenizer.path", message=message)])
    if _content(settings.get("pad_token")) is None:
        backend.add_special_tokens([PAD])
        settings["pad_token"] = PAD
    digest = hashlib.sha256(
        (backend.to_str() + json.dumps(settings, sort_keys=True)).encode()
    ).hexdigest()
    target = cache_dir / "tokenizers" / digest[:16]
    if not target.is_dir():
        _write(backend, settings, target)
    return target


@lru_cache(maxsize=1)  # a second copy in a process, its memory scattered, encodes slower
def open_tokenizer(folder: Path) -> TrainedTokenizer:
    """Open a tokenizer of the cache. Special tokens that stand in a text are encoded as text."""
    content = (folder / "tokenizer.json").read_bytes()
    backend = Tokenizer.from_str(content.decode("utf-8"))
    backend.encode_special_tokens = True
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    eos = _content(settings["eos_token"])
    assert eos is not None
    eos_id = backend.token_to_id(eos)
    assert eos_id is not None
    return TrainedTokenizer(
        folder=folder,
        digest=hashlib.sha256(content).hexdigest(),
        backend=backend,
        eos_id=eos_id,
    )


def _content(token: Any) -> str | None:
    """A token's text, from either way that transformers writes it."""
    return token.get("content") if isinstance(token, dict) else token


def _write(backend: Tokenizer, settings: dict[str, Any], target: Path) -> None:
    """Write a tokenizer directory under a temporary name and rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # not mkdtemp, whose folders others may not read
    backend.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": PAD, "clean_up_tokenization_spaces": False} | settings
    settings["padding_side"] = "right"
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    publish(folder, target)


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder to its place; whoever came first wins."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(folder)
