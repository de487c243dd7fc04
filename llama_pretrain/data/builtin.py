"""Text that every installation has: the standard library's sources, and packages' docstrings."""

import ast
import importlib.metadata
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from llama_pretrain.data.cache import Cache
from llama_pretrain.files import hash_text, replacing

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def list_stdlib_files(package: str = "") -> list[Path]:
    """The modules of the standard library, or of one of its packages, that are valid UTF-8."""
    files = []
    for folder, folders, names in os.walk(Path(sysconfig.get_path("stdlib"), package)):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return [path for path in files if _is_utf8(path)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def collect_docstrings(cache: Cache) -> Path:
    """The docstrings of the installed packages as .jsonl, collected once per set of packages."""
    installed = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    key = hash_text("\n".join([sys.version, *installed]))[:16]
    target = cache.folder / "docstrings" / f"{key}.jsonl"
    if target.is_file():
        return target
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    seen: set[str] = set()
    with (
        replacing(target) as temporary,
        temporary.open("w", encoding="utf-8") as out,
        cache.report.progress("collecting docstrings", sum(sizes)) as show,
    ):
        for path, done in zip(paths, accumulate(sizes), strict=True):
            text = "\n\n".join(_read_docstrings(path))
            show(done, 0)
            if text and text not in seen:
                seen.add(text)
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return target


def _read_docstrings(path: Path) -> Iterator[str]:
    """The docstrings of several lines in a module; none if it does not parse."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # grows; unlike ast.walk it skips expressions
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes += getattr(node, name, ())
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None and "\n" in text:
            yield text.encode("utf-8", "ignore").decode("utf-8")
