"""Tokenizers: trained, imported, and their encoding of long and special texts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.tokenizer import Tokenizer as TokenizerConfig
from llama_pretrain.config.tokenizer import TokenizerName
from llama_pretrain.data import encode
from llama_pretrain.data.cache import Cache
from llama_pretrain.data.encode import encode_texts
from llama_pretrain.data.prepare import sample_texts
from llama_pretrain.data.tokenizer import import_tokenizer, open_tokenizer, train_tokenizer
from tests.conftest import Quiet
from tests.data.corpora import source_of, write_lines


def train(folder: Path, text: str = "some text to learn from", *, vocab_size: int = 300) -> Path:
    train_tokenizer([text] * 5, vocab_size=vocab_size, target=folder / "t")
    return folder / "t"


def test_pieces_of_a_long_document_have_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(f"def f{n}(x):  return x + {n} # and  some   words" for n in range(3000))
    backend = open_tokenizer(train(tmp_path, text, vocab_size=600)).backend
    whole = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 5000)
    assert list(encode_texts(backend, ["short", text, "b"]))[1] == whole
    (ids,) = encode_texts(backend, ["x" * 20_000])  # no place to cut without a change
    assert backend.decode(ids) == "x" * 20_000


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(train(tmp_path))
    (ids,) = encode_texts(tokenizer.backend, ["a </s> and [PAD]"])
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == "a </s> and [PAD]"


def test_imported_tokenizers_neither_truncate_nor_pad(tmp_path: Path) -> None:
    backend = open_tokenizer(train(tmp_path)).backend
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    config = TokenizerConfig(name=TokenizerName.pretrained, path=str(tmp_path / "t"))
    cache = Cache(folder=tmp_path / "cache", report=Quiet())
    imported = open_tokenizer(import_tokenizer(config, cache))
    text = "some text to learn from " * 9
    (ids,) = encode_texts(imported.backend, [text])
    assert imported.backend.decode(ids) == text
    assert 0 not in ids  # [PAD]


def test_auto_tokenizer_loads_ours(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(train(tmp_path))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("[PAD]", "</s>")
    assert tokenizer.padding_side == "right"
    text = "def f(x):\n    return  x  # ünïcode 漢字"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_training_reads_a_bounded_sample_of_the_whole_corpus(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 4000)
    source = source_of(tmp_path, files="a.jsonl")
    texts = list(sample_texts([(source, 0.2)], num_bytes=500_000))
    assert 400_000 < sum(len(text.encode()) for text in texts) < 560_000
    assert int(texts[-1].split()[0]) > 3000
    assert len(list(sample_texts([(source, 0.2)], num_bytes=10**9))) > 3000


RESERVED = "<|reserved_special_token_0|>"


def without_pad(folder: Path, *special: str, **settings: object) -> Path:
    """A tokenizer as published ones are: 300 tokens, none declared for padding."""
    folder.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, and the dog on the cat"] * 9, trainer)
    while (size := backend.get_vocab_size()) < 300:
        backend.add_tokens([f"<filler-{size}>"])
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("special", "settings", "pad"),
    [
        ((), {"unk_token": "<unk>", "bos_token": "<s>"}, "<unk>"),  # LLaMA 1 and 2
        ((RESERVED, "<|reserved_1|>"), {}, RESERVED),
        ((RESERVED, "<|pad_id|>"), {}, "<|pad_id|>"),
        ((), {}, "</s>"),
        ((), {"pad_token": "<pad>"}, "</s>"),  # declared, but not in the vocabulary
        ((), {"pad_token": {"content": "<s>"}}, "<s>"),
        ((), {"eos_token": {"content": "</s>"}, "unk_token": {"content": "<unk>"}}, "<unk>"),
    ],
)  # fmt: skip
def test_a_tokenizer_without_a_padding_token_does_not_grow(
    tmp_path: Path, special: tuple[str, ...], settings: dict[str, object], pad: str
) -> None:
    folder = without_pad(tmp_path / "t", *special, **settings)
    config = TokenizerConfig(name=TokenizerName.pretrained, path=str(folder))
    cache = Cache(folder=tmp_path / "cache", report=Quiet())
    imported = import_tokenizer(config, cache)
    assert open_tokenizer(imported).size == 300
    theirs = AutoTokenizer.from_pretrained(imported)
    assert (len(theirs), theirs.pad_token) == (300, pad)
    grown = open_tokenizer(import_tokenizer(replace(config, add_pad_token=True), cache))
    assert grown.size == (300 if settings.get("pad_token") == {"content": "<s>"} else 301)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token": ', "tokenizer_config.json cannot be read: Expecting value"),
        ("[1, 2]", "tokenizer_config.json must be a JSON object (got a list)"),
        ('{"eos_token": ["</s>"]}', "has no eos_token in its vocabulary (got ['</s>'])"),
        ('{"eos_token": {"content": 2}}', "has no eos_token in its vocabulary"),
        ("[" * 100_000, "tokenizer_config.json cannot be read: maximum recursion"),
        ("\udcff", "tokenizer_config.json cannot be read: 'utf-8' codec"),
    ],
)
def test_damaged_settings_are_one_problem(tmp_path: Path, text: str, message: str) -> None:
    folder = without_pad(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text(text, errors="surrogateescape")
    config = TokenizerConfig(name=TokenizerName.pretrained, path=str(folder))
    with pytest.raises(UserError) as caught:
        import_tokenizer(config, Cache(folder=tmp_path / "cache", report=Quiet()))
    (problem,) = caught.value.problems
    assert problem.path == "tokenizer.path"
    assert message in problem.message
