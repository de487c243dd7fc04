"""Make the tokens that a run reads, once: a cache addressed by what goes into it."""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.schema import Data, Run, TokenizerName
from llama_pretrain.data.packed import TokenReader, TokenWriter
from llama_pretrain.data.sources import Source, open_source
from llama_pretrain.data.tokenizer import (
    FORMAT,
    TrainedTokenizer,
    import_tokenizer,
    open_tokenizer,
    publish,
    train_tokenizer,
)
from llama_pretrain.plan.plan import Corpus

TRAIN, HELDOUT = "train", "heldout"
BATCH_CHARACTERS = 4_000_000
"""Text encoded at a time: enough for all cores, little enough for memory."""


def prepare_corpus(run: Run, *, report: Callable[[str], None]) -> Corpus:
    """The corpus of a run, prepared now or found in the cache.

    Args:
        report: is told in a line whatever takes more than a moment.

    Raises:
        UserError: if the corpus can't be read or is too short, or the tokenizer doesn't fit.
    """
    cache_dir = Path(run.data.cache_dir).expanduser().resolve()
    source = open_source(run.data)
    if next(source.documents(), None) is None:
        files = ", ".join(str(path) for path in source.files[:3])
        raise UserError([Problem(path="data", message=f"the corpus has no text (read {files})")])
    split = Split(source, run.data.heldout_fraction)
    tokenizer = _find_tokenizer(run, source, split, cache_dir, report)
    if tokenizer.size > run.model.vocab_size and not run.model.resize_embeddings:
        message = f"has {tokenizer.size} tokens, more than model.vocab_size={run.model.vocab_size}"
        hint = f"set model.vocab_size={tokenizer.size}, or model.resize_embeddings=true"
        raise UserError([Problem(path="tokenizer", message=message, hint=hint)])
    recipe = [source.fingerprint, tokenizer.digest, repr(run.data.heldout_fraction), str(FORMAT)]
    recipe.append(str(tokenizer.eos_id))  # tokenizer.json alone doesn't say which it is
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()
    target = cache_dir / "tokens" / digest[:16]
    if not (target / "meta.json").is_file():
        report(f"encoding {source.num_bytes / 1e6:.1f} MB of text")
        _encode(split, tokenizer, target)
    return _describe(run.data, tokenizer, target, digest)


class Split:
    """Training and held-out documents, told apart by a hash of each document's text.

    So a document stays on its side when the corpus grows, and so do its duplicates. Where all
    documents fall on one side (a corpus of one book, say), the end of the text is held out.
    """

    def __init__(self, source: Source, heldout_fraction: float):
        self.source = source
        self._threshold = int(heldout_fraction * (1 << 64))
        sizes = [0, 0]
        for text in source.documents():
            sizes[self._is_heldout(text)] += len(text)
        self.by_hash = all(sizes)
        self._train_characters = int(sum(sizes) * (1 - heldout_fraction))

    def documents(self, name: str) -> Iterator[str]:
        """Documents of `train` or `heldout`, in order."""
        if self.by_hash:
            wanted = name == HELDOUT
            yield from (t for t in self.source.documents() if self._is_heldout(t) == wanted)
            return
        left = self._train_characters
        for text in self.source.documents():
            cut = min(max(left, 0), len(text))
            if 0 < cut < len(text):  # at the end of a line where there is one
                cut = text.rfind("\n", 0, cut) + 1 or cut
            part = text[:cut] if name == TRAIN else text[cut:]
            left -= len(text)
            if part:
                yield part

    def _is_heldout(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return int.from_bytes(digest[:8], "big") < self._threshold


def _find_tokenizer(
    run: Run, source: Source, split: Split, cache_dir: Path, report: Callable[[str], None]
) -> TrainedTokenizer:
    if run.tokenizer.name is TokenizerName.pretrained:
        return open_tokenizer(import_tokenizer(run.tokenizer, cache_dir=cache_dir))
    size = run.tokenizer.vocab_size
    recipe = [source.fingerprint, str(size), repr(run.data.heldout_fraction), str(FORMAT)]
    key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    target = cache_dir / "tokenizers" / key
    if not target.is_dir():
        report(f"training a tokenizer of {size:,} tokens on {source.num_bytes / 1e6:.1f} MB")
        train_tokenizer(split.documents(TRAIN), vocab_size=size, target=target)
    return open_tokenizer(target)


def _encode(split: Split, tokenizer: TrainedTokenizer, target: Path) -> None:
    """Write both splits and, last, meta.json, under a temporary name; then rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".tmp-"))
    meta: dict[str, dict[str, int]] = {}
    for name in (TRAIN, HELDOUT):
        num_bytes = 0
        with TokenWriter(folder / name, vocab_size=tokenizer.size) as writer:
            for texts in _batches(split.documents(name)):
                num_bytes += sum(len(text.encode("utf-8")) for text in texts)
                for encoding in tokenizer.backend.encode_batch_fast(
                    texts, add_special_tokens=False
                ):
                    writer.add([*encoding.ids, tokenizer.eos_id])
        documents, tokens = len(writer.lengths), sum(writer.lengths)
        meta[name] = {"documents": documents, "tokens": tokens, "bytes": num_bytes}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    publish(folder, target)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in itertools.chain(texts):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _describe(data: Data, tokenizer: TrainedTokenizer, target: Path, digest: str) -> Corpus:
    meta = json.loads((target / "meta.json").read_text(encoding="utf-8"))
    rows = {}
    for name in (TRAIN, HELDOUT):
        rows[name] = TokenReader(target / name).num_rows(data.sequence_length)
        if rows[name] == 0:
            what = "training text" if name == TRAIN else "held-out text"
            message = (
                f"the {what} has {meta[name]['tokens']} tokens, too few for one row of"
                f" {data.sequence_length} and the token after it"
            )
            hint = "give more text, or shorten data.sequence_length"
            if name == HELDOUT:
                hint += f", or raise data.heldout_fraction={data.heldout_fraction}"
            raise UserError([Problem(path="data", message=message, hint=hint)])
    return Corpus(
        tokenizer_dir=str(tokenizer.folder),
        tokens_dir=str(target),
        tokenizer_hash=tokenizer.digest,
        data_hash=digest,
        tokenizer_size=tokenizer.size,
        train_rows=rows[TRAIN],
        train_tokens=meta[TRAIN]["tokens"],
        heldout_rows=rows[HELDOUT],
        heldout_bytes_per_token=meta[HELDOUT]["bytes"] / meta[HELDOUT]["tokens"],
    )
