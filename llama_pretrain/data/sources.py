"""Where text comes from: files in an order that doesn't change, and the documents in them."""

import ast
import glob
import hashlib
import importlib.metadata
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.schema import Data, DataName

SUFFIXES = (".txt", ".jsonl", ".parquet", ".py")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus: its files in order, and a hash of everything that decides its documents."""

    files: list[Path]
    text_field: str
    fingerprint: str
    num_bytes: int

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in order.

        Raises:
            UserError: naming the file and the place that can't be read.
        """
        for path in self.files:
            for text in _read_documents(path, self.text_field):
                if text.strip():
                    yield text


def open_source(data: Data) -> Source:
    """Find the files of a corpus and hash them.

    Raises:
        UserError: if there is none, or one is of a kind that isn't read.
    """
    if data.name is DataName.stdlib:
        files = _stdlib_files()
    elif data.name is DataName.docstrings:
        files = [_collect_docstrings(Path(data.cache_dir).expanduser())]
    else:
        files = list_files(data.paths)
    digest = hashlib.sha256(data.text_field.encode())
    num_bytes = 0
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
                num_bytes += len(block)
        digest.update(path.suffix.encode() + content.digest())
    return Source(
        files=files,
        text_field=data.text_field,
        fingerprint=digest.hexdigest(),
        num_bytes=num_bytes,
    )


def list_files(paths: list[str]) -> list[Path]:
    """The files that paths and globs name, sorted within each, none twice.

    Raises:
        UserError: for each path that names nothing, or no text.
    """
    problems: list[Problem] = []
    found: dict[Path, None] = {}
    for pattern in paths:
        expanded = os.path.expanduser(pattern)
        names = sorted(glob.glob(expanded, recursive=True))
        if os.path.isfile(expanded):  # a name with brackets is a name first, and then a pattern
            names = [expanded]
        files = [Path(name).resolve() for name in names if os.path.isfile(name)]
        if not files:
            what = "names a directory" if os.path.isdir(expanded) else "names no file"
            hint = f"add {pattern.rstrip('/')}/**/*.txt" if os.path.isdir(expanded) else ""
            message = f"{what} (got {pattern})"
            problems.append(Problem(path="data.paths", message=message, hint=hint))
        for file in files:
            if file.suffix not in SUFFIXES:
                message = f"{file} is none of {', '.join(SUFFIXES[:3])}"
                problems.append(Problem(path="data.paths", message=message))
            found[file] = None
    if problems:
        raise UserError(problems)
    return list(found)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return [path for path in files if _is_utf8(path)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def _collect_docstrings(cache_dir: Path) -> Path:
    """Docstrings of the installed packages as one .jsonl, made once for this set of packages."""
    installed = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    key = hashlib.sha256("\n".join([sys.version, *installed]).encode()).hexdigest()[:16]
    target = cache_dir / "docstrings" / f"{key}.jsonl"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with tempfile.NamedTemporaryFile(
        "w", dir=target.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as out:
        for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
            text = "\n\n".join(_docstrings(path))
            if text and text not in seen:
                seen.add(text)
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    os.replace(out.name, target)
    return target


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module of more than a line; none for a file that doesn't parse."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None and "\n" in text:
            yield text.encode("utf-8", "ignore").decode("utf-8")


def _read_documents(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, text_field)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, text_field)
    else:
        yield _decode(path.read_bytes(), path=path, offset=0)


def _decode(content: bytes, *, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 at byte {offset + error.start}: {error.reason}"
        hint = "convert it, say with iconv -t UTF-8"
        raise UserError([Problem(path="data.paths", message=message, hint=hint)]) from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _field_of(_decode(line, path=path, offset=offset), path, number, text_field)
            offset += len(line)


def _field_of(line: str, path: Path, number: int, text_field: str) -> str:
    place = f"{path}, line {number}"
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError([Problem(path="data.paths", message=f"{place}: {error}")]) from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        seen = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        message = f"{place}: no text under {text_field!r} (got {seen})"
        raise UserError([Problem(path="data.text_field", message=message)])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no text
        message = f"{place}: lone surrogate at character {error.start}"
        raise UserError([Problem(path="data.paths", message=message)]) from error
    return text


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import parquet  # an extra: only who reads .parquet needs it
    except ImportError as error:
        hint = "pip install 'llama-pretrain[parquet]'"
        message = f"{path} needs the package pyarrow"
        raise UserError([Problem(path="data.paths", message=message, hint=hint)]) from error
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors are both
        raise UserError([Problem(path="data.paths", message=f"{path}: {error}")]) from error
    if text_field not in file.schema_arrow.names:
        message = f"{path} has no column {text_field!r} (got {', '.join(file.schema_arrow.names)})"
        raise UserError([Problem(path="data.text_field", message=message)])
    for batch in file.iter_batches(columns=[text_field]):
        for text in batch.column(0).to_pylist():
            if text is not None and not isinstance(text, str):
                message = f"{path}: column {text_field!r} holds {type(text).__name__}, not text"
                raise UserError([Problem(path="data.text_field", message=message)])
            if text is not None:
                yield text
