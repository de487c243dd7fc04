"""A cache that cannot be written serves what it has."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import small_disk
from tests.data.corpora import prepare, tokens_of


def test_a_read_only_cache_serves_what_it_has(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"text {number} that is long enough " * 20)
    with small_disk(tmp_path / "cache", "8m") as cache:
        words = (f"data.cache_dir={cache}",)
        before = prepare(texts, *words)
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
        assert prepare(texts, *words) == before
        assert tokens_of(prepare(texts, *words)) == tokens_of(before)
        (texts / "new.txt").write_text("other text " * 100)
        with pytest.raises(OSError, match="Read-only file system"):
            prepare(texts, *words)
        subprocess.run(["mount", "-o", "remount,rw", str(cache)], check=True)
        (cache / "hashes.sqlite").unlink()
        (texts / "new.txt").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
        assert prepare(texts, *words) == before
