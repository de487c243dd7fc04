"""Whatever is in a run directory: no traceback, no hang, and nothing is written elsewhere."""

import contextlib
import io
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.__main__ import main
from llama_pretrain.files import hash_file
from llama_pretrain.launch.watch import RankError
from llama_pretrain.runs.layout import RunDir
from tests.conftest import Runner

NUM_MUTATIONS = 200
LIMIT_S = 10
DEEP = b"[" * 200_000


@pytest.fixture(scope="module")
def good(shared_runner: Runner) -> Path:
    """A complete run with everything that a run can have."""
    done = shared_runner(
        "train.max_steps=3",
        "checkpoint.every_steps=1",
        "checkpoint.at_end=true",
        "checkpoint.export=true",
        "train.sample_prompt=a",
        "monitor=tensorboard",
    )
    return done.run_dir.path


def replace_number(content: bytes, generator: random.Random, *, by: bytes) -> bytes:
    """One of the numbers of a text becomes something else."""
    found = list(re.finditer(rb"(?<=[ :\[])-?\d+(?:\.\d+)?(?:e-?\d+)?", content))
    if not found:
        return by
    chosen = generator.choice(found)
    return content[: chosen.start()] + by + content[chosen.end() :]


CONTENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda content, generator: b"",
    "truncated": lambda content, generator: content[: generator.randrange(len(content) + 1)],
    "flipped": lambda content, generator: bytes(
        byte ^ (generator.random() < 0.002) << generator.randrange(8) for byte in content[:50_000]
    ),
    "nested": lambda content, generator: DEEP,
    "nested value": lambda content, generator: replace_number(content, generator, by=DEEP[:5000]),
    "binary": lambda content, generator: generator.randbytes(500),
    "text": lambda content, generator: replace_number(content, generator, by=b'"wide"'),
    "negative": lambda content, generator: replace_number(content, generator, by=b"-7"),
    "zero": lambda content, generator: replace_number(content, generator, by=b"0"),
    "400 digits": lambda content, generator: replace_number(content, generator, by=b"9" * 400),
    "15 digits": lambda content, generator: replace_number(content, generator, by=b"9" * 15),
    "null": lambda content, generator: replace_number(content, generator, by=b"null"),
    "not a number": lambda content, generator: replace_number(content, generator, by=b"NaN"),
    "list": lambda content, generator: b"[1, 2]\n",
    "doubled": lambda content, generator: content + content,
    "aliases": lambda content, generator: b"a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "date": lambda content, generator: re.sub(rb"20\d\d-", b"9999-", content),
    "escapes": lambda content, generator: re.sub(rb'"(\w+)"', rb'"\1\\u001b[2J"', content, count=3),
}
KINDS = [*CONTENTS, "missing", "pipe", "folder", "link out", "dead link", "loop"]


def mutate(file: Path, kind: str, generator: random.Random, *, outside: Path) -> None:
    if kind in CONTENTS:
        file.write_bytes(CONTENTS[kind](file.read_bytes(), generator))
        return
    file.unlink()
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "link out":
            file.symlink_to(outside)
        case "dead link":
            file.symlink_to(file.parent / "nothing")
        case "loop":
            file.symlink_to(file)


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def look(*words: str) -> str:
    """`python -m llama_pretrain` in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        main(words)
    return output.getvalue()


def start(runner: Runner, *words: str) -> str:
    """`python run.py` in this process."""
    return runner.bare(*words, expect=None).output


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_mutated_run_directory(
    runner: Runner, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    def refuse_to_launch(spec: Any, **_: object) -> int:
        raise RankError(rank=0, error="not launched", log=spec.run_dir.rank_log(0))

    monkeypatch.setattr("llama_pretrain.tasks.pretrain.launch", refuse_to_launch)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    outside = tmp_path / "outside" / "precious.txt"
    outside.parent.mkdir()
    outside.write_text("precious")
    before = snapshot(outside.parent)
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    failures: list[str] = []
    generator = random.Random(20261130 + part)
    for number in range(part, NUM_MUTATIONS, 4):
        file = files[number % len(files)]
        kind = KINDS[(number * 7 + number // len(KINDS)) % len(KINDS)]
        root = tmp_path / str(number)
        run = root / "run"
        commands = {
            "list": partial(look, "list", str(root)),
            "compare": partial(look, "compare", str(run), str(good)),
            "verify": partial(look, "verify", str(run)),
            "export": partial(start, runner, "task=export", f"run={run}"),
            "resume": partial(start, runner, f"resume={run}", "train.max_steps=4"),
        }
        for name, command in commands.items():
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(good, run)
            state = generator.getstate()
            mutate(run / file, kind, generator, outside=outside)
            generator.setstate(state)
            began = time.monotonic()
            try:
                output = command()
            except BaseException as error:
                output = f"Traceback {type(error).__name__}: {error}"
            what = f"{number}: {name} with {file} {kind}"
            if "Traceback" in output:
                failures.append(f"{what}: {output[output.index('Traceback') :][-500:]}")
            if time.monotonic() - began > LIMIT_S:
                failures.append(f"{what}: took {time.monotonic() - began:.0f} s")
            if "\x1b" in output:
                failures.append(f"{what}: an escape was printed")
            if snapshot(outside.parent) != before:
                failures.append(f"{what}: wrote outside")
                outside.write_text("precious")
        generator.random()
        shutil.rmtree(root, ignore_errors=True)
    assert failures == []
    assert RunDir(good).snapshot.is_file()
