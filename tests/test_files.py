"""Files are complete or absent, and damaged JSON reads as nothing."""

import errno
import hashlib
from pathlib import Path

import pytest

from llama_pretrain.files import (
    hash_file,
    hash_text,
    locking,
    read_json,
    replacing,
    write_json,
    write_text,
)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old ä")
    with pytest.raises(RuntimeError), replacing(path) as temporary:  # noqa: PT012  # the block is the test
        temporary.write_text("half")
        assert path.read_text(encoding="utf-8") == "old ä"
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old ä"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with locking(tmp_path), pytest.raises(BlockingIOError), locking(tmp_path, wait=False):
        pass
    monkeypatch.setattr("fcntl.flock", refuse)
    with locking(tmp_path), locking(tmp_path, wait=False):
        pass


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_damaged_json_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path) is None


def test_json_and_hashes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert hash_file(tmp_path / "a.json") == hash_text('{\n  "a": 1\n}\n')
    assert hash_text("ä") == hashlib.sha256("ä".encode()).hexdigest()
