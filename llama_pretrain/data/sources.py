"""Where text comes from: files in an order that doesn't change, and the spans to read of them."""

import ast
import glob
import hashlib
import importlib.metadata
import json
import os
import sqlite3
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from llama_pretrain.config.data import DataName
from llama_pretrain.config.data import Source as SourceConfig
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.data.pool import Report
from llama_pretrain.data.read import (
    LINE_SUFFIXES,
    TEXT_SUFFIXES,
    Document,
    Record,
    open_parquet,
    read_lines,
    read_parquet,
    read_rows,
    read_text,
    suffix_of,
)

SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")
SHOWN_SUFFIXES = ".txt, .jsonl (plain, .gz or .zst), .parquet"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MIN_TASK, MAX_TASK = 1 << 20, 1 << 26
"""Bytes of one task; in between a 64th of the corpus, so that all cores have work."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file as it was when it was hashed."""

    path: Path
    size: int
    time: int
    """Of its last change, in ns."""
    digest: str


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a file: bytes, row groups or rows [start, stop); `None` = to the end."""

    file: int
    start: int = 0
    stop: int | None = None
    size: int
    """Bytes to read, for progress."""


Task = list[Span]


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A source of documents."""

    path: str
    """Of its settings, for messages: `data` or `data.sources.NAME`."""
    config: SourceConfig
    files: list[File]
    fingerprint: str
    """Of everything that decides its documents."""
    num_bytes: int

    def tasks(self) -> list[Task]:
        """The source in parts, the same whatever reads them."""
        target = min(max(self.num_bytes // 64, MIN_TASK), MAX_TASK)
        tasks: list[Task] = []
        filled = target
        for span in self._spans(target):
            if filled >= target:
                tasks.append([])
                filled = 0
            tasks[-1].append(span)
            filled += span.size
        return tasks

    def read(self, span: Span) -> Iterator[Record]:
        """The documents of a span, and what can't be read.

        Raises:
            UserError: if the file as a whole can't be read.
        """
        field = self.config.text_field
        if self.config.name is DataName.huggingface:
            yield from self._read_dataset(span)
            return
        path = self.files[span.file].path
        try:
            if suffix_of(path) in LINE_SUFFIXES:
                yield from read_lines(path, start=span.start, stop=span.stop, field=field)
            elif path.suffix == ".parquet":
                yield from read_parquet(path, start=span.start, stop=span.stop, field=field)
            else:
                mark = self.config.delimiter
                yield from read_text(path, start=span.start, stop=span.stop, delimiter=mark)
        except EOFError as error:
            message = f"{path} is cut short: {error}"
            raise UserError([Problem(path=f"{self.path}.paths", message=message)]) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("zstandard", "zlib", "gzip"):
                raise
            message = f"{path} can't be decompressed: {error}"
            raise UserError([Problem(path=f"{self.path}.paths", message=message)]) from error

    def place(self, span: Span, document: Document) -> str:
        """File and place of a document."""
        on_hub = self.config.name is DataName.huggingface
        name = self.config.dataset if on_hub else self.files[span.file].path
        return f"{name}, {document.place}"

    def _spans(self, target: int) -> Iterator[Span]:
        if self.config.name is DataName.huggingface:
            yield from self._dataset_spans(target)
            return
        for number, file in enumerate(self.files):
            if file.path.suffix == ".parquet":
                groups = open_parquet(file.path).metadata
                for group in range(groups.num_row_groups):
                    size = groups.row_group(group).total_byte_size
                    yield Span(file=number, start=group, stop=group + 1, size=size)
            elif file.path.suffix in TEXT_SUFFIXES and self.config.delimiter is None:
                yield Span(file=number, size=file.size)
            elif file.path.suffix in (*TEXT_SUFFIXES, *LINE_SUFFIXES):
                for start in range(0, file.size, target):
                    stop = min(start + target, file.size)
                    yield Span(file=number, start=start, stop=stop, size=stop - start)
            else:  # compressed: from its beginning only
                yield Span(file=number, size=file.size)

    def _dataset_spans(self, target: int) -> Iterator[Span]:
        dataset = load_dataset(self.config, self.path)
        if hasattr(dataset, "num_rows"):
            rows = dataset.num_rows
            each = max(1, rows * target // max(1, self.num_bytes))
            for start in range(0, rows, each):
                stop = min(start + each, rows)
                size = self.num_bytes * (stop - start) // rows
                yield Span(file=0, start=start, stop=stop, size=size)
            return
        shards = dataset.num_shards
        for shard in range(shards):
            size = self.num_bytes // shards
            yield Span(file=0, start=shard, stop=shard + 1, size=size)

    def _read_dataset(self, span: Span) -> Iterator[Record]:
        dataset = load_dataset(self.config, self.path)
        name, field = str(self.config.dataset), self.config.text_field
        if hasattr(dataset, "num_rows"):
            assert span.stop is not None
            part = dataset.select(range(span.start, span.stop))
            yield from read_rows(iter(part), name=name, first=span.start, field=field)
            return
        part = dataset.shard(num_shards=dataset.num_shards, index=span.start)
        where = f"{name}, shard {span.start}"
        yield from read_rows(iter(part), name=where, first=0, field=field)


def open_source(
    config: SourceConfig, *, path: str, cache_dir: Path, heldout: bool, report: Report
) -> TextSource:
    """Find the files of a source and hash them.

    Args:
        heldout: of `heldout_paths` instead of `paths`.

    Raises:
        UserError: if there is none, or one is of a kind that isn't read.
    """
    if config.name is DataName.huggingface:
        return _open_dataset(config, path=path, cache_dir=cache_dir, report=report)
    if config.name is DataName.stdlib:
        paths = _stdlib_files()
    elif config.name is DataName.docstrings:
        paths = [_collect_docstrings(cache_dir, report)]
    else:
        name = "heldout_paths" if heldout else "paths"
        paths = list_files(getattr(config, name), path=f"{path}.{name}", suffixes=SUFFIXES)
    files = hash_files(paths, cache_dir=cache_dir, report=report)
    kinds = "\n".join(f"{suffix_of(f.path)} {f.path.suffix} {f.digest}" for f in files)
    recipe = f"{config.text_field}\n{config.delimiter!r}\n{kinds}"
    return TextSource(
        path=path,
        config=config,
        files=files,
        fingerprint=hashlib.sha256(recipe.encode()).hexdigest(),
        num_bytes=sum(file.size for file in files),
    )


def list_files(
    patterns: Sequence[str], *, path: str, suffixes: Sequence[str] | None = None
) -> list[Path]:
    """The files that paths and globs name, sorted within each, none twice.

    Args:
        path: the setting that names them.
        suffixes: those that are read; `None` = any.

    Raises:
        UserError: for each path that names nothing, or no text.
    """
    problems: list[Problem] = []
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        names = sorted(glob.glob(expanded, recursive=True))
        if os.path.isfile(expanded):  # a name with brackets is a name first, and then a pattern
            names = [expanded]
        files = [Path(name).resolve() for name in names if os.path.isfile(name)]
        if not files:
            what = "names a directory" if os.path.isdir(expanded) else "names no file"
            hint = f"add {pattern.rstrip('/')}/**/*.txt" if os.path.isdir(expanded) else ""
            problems.append(Problem(path=path, message=f"{what} (got {pattern})", hint=hint))
        for file in files:
            if suffixes is not None and suffix_of(file) not in suffixes:
                message = f"{file} is none of {SHOWN_SUFFIXES}"
                problems.append(Problem(path=path, message=message))
            found[file] = None
    refuse(problems)
    return list(found)


def hash_files(paths: Sequence[Path], *, cache_dir: Path, report: Report) -> list[File]:
    """Sizes and SHA-256 of files, as many at a time as there are cores.

    What was hashed before and has the same size and time of change since is not read again.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    known = sqlite3.connect(cache_dir / "hashes.sqlite", timeout=60)
    with closing(known), known:
        known.execute(
            "CREATE TABLE IF NOT EXISTS hashes"
            " (path TEXT PRIMARY KEY, size INTEGER, time INTEGER, digest TEXT)"
        )
        stored = {}
        for path in paths:
            query = "SELECT size, time, digest FROM hashes WHERE path = ?"
            row = known.execute(query, (str(path),)).fetchone()
            stat = path.stat()
            if row is not None and row[:2] == (stat.st_size, stat.st_mtime_ns):
                stored[path] = File(path=path, size=row[0], time=row[1], digest=row[2])
        missing = [path for path in paths if path not in stored]
        total, done = sum(path.stat().st_size for path in missing), 0
        # hashlib lets go of the interpreter's lock.
        with ThreadPoolExecutor() as pool, report.progress("hashing files", total) as show:
            for path, file in zip(missing, pool.map(_hash, missing), strict=True):
                stored[path] = file
                done += file.size
                show(done, 0)
                row = (str(path), file.size, file.time, file.digest)
                known.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", row)
    return [stored[path] for path in paths]


def _hash(path: Path) -> File:
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path=path, size=stat.st_size, time=stat.st_mtime_ns, digest=digest)


def check_unchanged(files: Sequence[File], *, path: str) -> None:
    """Refuse files that were written to while they were read.

    Raises:
        UserError: naming them.
    """
    refuse(
        Problem(path=path, message=f"{file.path} has changed while it was read")
        for file in files
        if not file.path.is_file()
        or (file.path.stat().st_size, file.path.stat().st_mtime_ns) != (file.size, file.time)
    )


def load_dataset(config: SourceConfig, path: str) -> Any:
    """A Hugging Face dataset: on disk with `num_rows`, or streamed with `num_shards`.

    Raises:
        UserError: if it can't be loaded, saying what the library said.
    """
    try:
        import datasets  # an extra
    except ImportError as error:
        hint = "pip install 'llama-pretrain[huggingface]'"
        message = "needs the package datasets (got data=huggingface)"
        raise UserError([Problem(path=path, message=message, hint=hint)]) from error
    assert config.dataset is not None
    folder, split = Path(config.dataset).expanduser(), config.dataset_split
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    message = f"{folder} has no split {split!r} (got {', '.join(loaded)})"
                    raise UserError([Problem(path=f"{path}.dataset_split", message=message)])
                loaded = loaded[split]
            return loaded
        return datasets.load_dataset(
            str(folder) if folder.is_dir() else config.dataset,
            config.dataset_config,
            split=split,
            revision=None if folder.is_dir() else config.dataset_revision,
            streaming=True,
        )
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        said = str(error).splitlines()
        message = f"{config.dataset} can't be loaded: {said[0] if said else type(error).__name__}"
        raise UserError([Problem(path=f"{path}.dataset", message=message)]) from error


def _open_dataset(
    config: SourceConfig, *, path: str, cache_dir: Path, report: Report
) -> TextSource:
    assert config.dataset is not None
    folder = Path(config.dataset).expanduser()
    recipe = [config.text_field, config.dataset_config, config.dataset_split]
    files: list[File] = []
    if folder.is_dir():
        names = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        found = [name.resolve() for name in names]
        files = hash_files(found, cache_dir=cache_dir, report=report)
        num_bytes = sum(file.size for file in files)
        recipe += [file.digest for file in files]
        load_dataset(config, path)  # told now, if it can't be
    else:
        config = replace(config, dataset_revision=_newest_revision(config, path))
        recipe += [config.dataset, config.dataset_revision]
        size = load_dataset(config, path).info.size_in_bytes
        num_bytes = size or MAX_TASK
    return TextSource(
        path=path,
        config=config,
        files=files,
        fingerprint=hashlib.sha256(repr(recipe).encode()).hexdigest(),
        num_bytes=num_bytes,
    )


def _newest_revision(config: SourceConfig, path: str) -> str:
    """The commit that a dataset's name stands for now, so that the cache's name says it."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(str(config.dataset), revision=config.dataset_revision)
    except Exception as error:  # no network, no such dataset, no access: it says which
        said = str(error).splitlines()
        message = f"{config.dataset} is no folder, and the hub says: {said[0] if said else error}"
        raise UserError([Problem(path=f"{path}.dataset", message=message)]) from error
    return str(info.sha)


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


def _collect_docstrings(cache_dir: Path, report: Report) -> Path:
    """Docstrings of the installed packages as one .jsonl, made once for this set of packages."""
    installed = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    key = hashlib.sha256("\n".join([sys.version, *installed]).encode()).hexdigest()[:16]
    target = cache_dir / "docstrings" / f"{key}.jsonl"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    seen: set[str] = set()
    with (
        tempfile.NamedTemporaryFile(
            "w", dir=target.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as out,
        report.progress("collecting docstrings", sum(sizes)) as show,
    ):
        for path, done in zip(paths, accumulate(sizes), strict=True):
            text = "\n\n".join(_docstrings(path))
            show(done, 0)
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
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # it grows, by statements: as ast.walk, which goes into expressions as well
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes += getattr(node, name, ())
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None and "\n" in text:
            yield text.encode("utf-8", "ignore").decode("utf-8")
