"""A cache that cannot be written serves what it has, or is named."""

import errno
import subprocess
from pathlib import Path

import pytest

from llama_pretrain.config.problems import UserError
from llama_pretrain.data.cache import disk_problems
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


@pytest.mark.parametrize("failed", ["home", "home/.cache/llama_pretrain/tokens"])
def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, failed: str) -> None:
    with (
        pytest.raises(UserError) as caught,
        disk_problems(f"{tmp_path}/home/.cache/llama_pretrain"),
    ):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / failed))
    problem = caught.value.problems[0]
    assert problem.path == "data.cache_dir"
    assert problem.message == f"Read-only file system: {tmp_path / failed}"


def test_a_file_elsewhere_is_no_fault_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, disk_problems(f"{tmp_path}/cache"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "texts" / "a.txt"))
    assert caught.value.problems[0].path == "data"
