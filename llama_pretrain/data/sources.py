"""Open the sources of text that a config names."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from llama_pretrain.config.data import DataName, Source
from llama_pretrain.config.problems import Problem, refuse
from llama_pretrain.data.builtin import collect_docstrings, list_stdlib_files
from llama_pretrain.data.cache import Cache
from llama_pretrain.data.hashing import hash_files
from llama_pretrain.data.huggingface import open_dataset
from llama_pretrain.data.read import LINE_SUFFIXES, TEXT_SUFFIXES, suffix_of
from llama_pretrain.data.text import TextSource
from llama_pretrain.files import hash_text

SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")


def open_source(config: Source, *, path: str, cache: Cache, heldout: bool = False) -> TextSource:
    """Find and hash the files of a source.

    Args:
        path: of the source's options.
        heldout: read `heldout_paths` instead of `paths`.

    Raises:
        UserError: if there is no file, or one of an unsupported type.
    """
    if config.name is DataName.huggingface:
        return open_dataset(config, path=path, cache=cache)
    if config.name is DataName.stdlib:
        paths = list_stdlib_files()
    elif config.name is DataName.stdlib_small:
        paths = list_stdlib_files("email")
    elif config.name is DataName.docstrings:
        paths = [collect_docstrings(cache)]
    else:
        name = "heldout_paths" if heldout else "paths"
        paths = list_files(getattr(config, name), path=f"{path}.{name}", suffixes=SUFFIXES)
    files = hash_files(paths, cache)
    kinds = "\n".join(f"{suffix_of(f.path)} {f.path.suffix} {f.digest}" for f in files)
    return TextSource(
        path=path,
        config=config,
        files=files,
        fingerprint=hash_text(f"{config.text_field}\n{config.delimiter!r}\n{kinds}"),
        num_bytes=sum(file.size for file in files),
    )


def list_files(
    patterns: Sequence[str], *, path: str, suffixes: Sequence[str] | None = None
) -> list[Path]:
    """The files that paths and globs match: sorted per pattern, each once.

    A link is judged by its own name: in a hub's cache it names a file without a suffix.

    Args:
        path: the option that has the patterns.
        suffixes: supported ones; `None` = any.

    Raises:
        UserError: for each pattern without a file, each dead link, and each file of another type.
    """
    problems: list[Problem] = []
    found: dict[str, Path] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        names = sorted(glob.glob(expanded, recursive=True))
        if os.path.isfile(expanded):  # a file name may contain brackets
            names = [expanded]
        names = [name for name in names if not os.path.isdir(name)]
        for name in names:
            if not os.path.isfile(name):
                dead = os.path.islink(name) and not os.path.exists(name)
                kind = f"a dead link to {os.readlink(name)}" if dead else "not a regular file"
                problems.append(Problem(path=path, message=f"{name} is {kind}"))
        files = [Path(os.path.abspath(name)) for name in names if os.path.isfile(name)]
        if not names:
            is_folder = os.path.isdir(expanded)
            message = f"{'is a directory' if is_folder else 'matches no file'} (got {pattern})"
            hint = f"Use {pattern.rstrip('/')}/**/*.txt" if is_folder else ""
            problems.append(Problem(path=path, message=message, hint=hint))
        for file in files:
            if suffixes is not None and suffix_of(file) not in suffixes:
                message = f"must be .txt, .jsonl (plain, .gz or .zst) or .parquet (got {file})"
                problems.append(Problem(path=path, message=message))
            found.setdefault(os.path.realpath(file), file)
    refuse(problems)
    return list(found.values())
