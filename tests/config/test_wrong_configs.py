"""Mistakes that people make, each refused in the parent by its own message, and the way out of it.

The table is wrong_configs.yaml: what was asked for, what is said, and for some the public thread in
which somebody made that mistake and learnt of it late.
"""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from llama_pretrain.cli.problems import list_problems
from llama_pretrain.config.command_line import parse_command_line
from llama_pretrain.config.compose import CONF
from llama_pretrain.config.ignored import find_ignored
from llama_pretrain.config.origins import trace_settings
from llama_pretrain.config.problems import Problem
from llama_pretrain.tasks.validate import resolve_valid
from tests.conftest import Runner, compose_run
from tests.machines import MACHINES

TABLE: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "wrong_configs.yaml").read_text(encoding="utf-8")
)


def texts_of(case: dict[str, Any], key: str) -> list[str]:
    """What is printed of a case: its problems (`says`) or its warnings (`warns`)."""
    texts = case.get(key, [])
    return [texts] if isinstance(texts, str) else list(texts)


CASES = [
    pytest.param(
        shlex.split(case["run"]),
        case.get("machine", "laptop"),
        texts_of(case, "says"),
        id=case["id"],
    )
    for case in TABLE
    if "says" in case
]
WARNINGS = [pytest.param(case, id=case["id"]) for case in TABLE if "warns" in case]


def find_problems(words: list[str], machine: str) -> list[Problem]:
    """Everything that run.py would refuse of these words on this machine."""
    return list(_find_problems(tuple(words), machine))


@cache
def _find_problems(words: tuple[str, ...], machine: str) -> tuple[Problem, ...]:
    return tuple(list_problems(parse_command_line(words), MACHINES[machine]))


def find_warnings(words: list[str], machine: str) -> list[Problem]:
    """The settings that would be ignored."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=words, return_hydra_config=True)
    origins = trace_settings(words, config.hydra.runtime.choices)
    return list(find_ignored(resolve_valid(compose_run(words), MACHINES[machine]), origins))


@pytest.mark.parametrize("case", WARNINGS)
def test_ignored(case: dict[str, Any]) -> None:
    words, machine = shlex.split(case["run"]), case.get("machine", "laptop")
    assert find_problems(words, machine) == []
    assert [str(problem) for problem in find_warnings(words, machine)] == texts_of(case, "warns")


@pytest.mark.parametrize(("words", "machine", "says"), CASES)
def test_refused(words: list[str], machine: str, says: list[str]) -> None:
    problems = find_problems(words, machine)
    assert [str(problem) for problem in problems] == says
    assert all(problem.path for problem in problems)


def test_each_mistake_has_its_own_message() -> None:
    texts = [text for case in TABLE for key in ("says", "warns") for text in texts_of(case, key)]
    assert sorted(set(texts)) == sorted(texts)
    assert len(TABLE) >= 64
    threads = {case["thread"].partition(":")[0] for case in TABLE if "thread" in case}
    assert len(threads) >= 10
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+ #\d+", thread) for thread in threads)


SETTING = re.compile(r"([\w.]+)=([^\s,;?]+)")
PLACEHOLDERS = ("DIR", "KEY", "VALUE", "...")


def ways_out(words: list[str], problem: Problem) -> list[list[str]]:
    """The command lines that a hint describes, as a person would change these words."""
    hint, path = problem.hint, problem.path
    if "global = micro x accumulation x ranks" in hint:
        names = ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")
        triples = re.findall(r"(\d+) = (\d+) x (\d+) x \d+", hint)
        cleared = _without(words, "batch.global_batch_tokens")
        return [
            _change(cleared, {f"batch.{name}": n for name, n in zip(names, triple, strict=True)})
            for triple in triples
        ]
    nearest = re.search(r"Nearest \w+: (\d+)(?:, (\d+))?", hint)
    if nearest is not None and path in [_key(word) for word in words]:
        return [_change(words, {path: number}) for number in nearest.groups() if number]
    quoted = re.findall(r"'(\+[^']+)'", hint)
    if quoted:
        return [[*words, *quoted]]
    ways = []
    for way in re.split(r",? or |; ", hint):
        meant = re.search(r"(?:[Dd]id you mean|[Ss]et) ([\w.]+)(?: instead|\?|, for|$)", way)
        value = re.search(
            r"(?:[Ss]et it to(?: at most)?|[Ww]rite(?: it as)?) ([\w.]+)(?:,|:|$)", way
        )
        settings = {
            key: setting
            for key, setting in SETTING.findall(way)
            if not setting.startswith(PLACEHOLDERS)
        }
        if way.lower() == "remove it":
            ways += [kept] if (kept := _without(words, path)) != words else []
        elif "id you mean" in way and settings:
            ways.append(_change(words, settings))
        elif meant is not None and meant[1] != "it":
            ways.append(_without(words, path))  # and the setting that was meant
        elif value is not None:
            ways.append(_change(words, {path: value[1]}))
        elif settings:
            ways.append(_change(words, settings))
    return ways


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _without(words: list[str], path: str) -> list[str]:
    """The words without a setting, or without all of a section."""
    return [word for word in words if not f"{_key(word)}.".startswith(f"{path}.")]


def _change(words: list[str], settings: dict[str, str]) -> list[str]:
    kept = [word for word in words if _key(word) not in settings]
    return [*kept, *(f"{key}={value}" for key, value in settings.items())]


@pytest.mark.slow  # a minute of composing
@pytest.mark.parametrize(("words", "machine", "says"), CASES)
def test_hints_lead_out(
    words: list[str], machine: str, says: list[str], request: pytest.FixtureRequest
) -> None:
    """Each alternative of a hint ends that problem, and one hint after another leads to a run."""
    problems = find_problems(words, machine)
    ways = [(problem, way) for problem in problems for way in ways_out(words, problem)]
    (case,) = (case for case in TABLE if case["id"] == request.node.callspec.id)
    assert bool(ways) is not case.get("no_command", False)
    for problem, way in ways:
        after = find_problems(way, machine)
        assert (problem.path, problem.message) not in [(p.path, p.message) for p in after], way
    for _ in range(4):
        if not problems or not ways_out(words, problems[0]):
            break
        words = ways_out(words, problems[0])[0]
        problems = find_problems(words, machine)
    if ways:  # what is left wants a folder that only they know
        assert [problem for problem in problems if not problem.hint.endswith("=DIR")] == []


RIGHT = yaml.safe_load((Path(__file__).parent / "right_configs.yaml").read_text())


@pytest.mark.parametrize(("machine", "words"), RIGHT.values(), ids=RIGHT)
def test_not_refused(machine: str, words: str) -> None:
    assert find_problems(shlex.split(words), machine) == []
    assert find_warnings(shlex.split(words), machine) == []


COMMANDS = ("key-misspelt-here", "integer-as-1e9", "batch-tokens", "key-removed", "endless")
"""One of each kind: Hydra's own refusal, a type, the batch, DeepSpeed's keys, a rule of ours."""


@pytest.mark.parametrize("name", COMMANDS)
def test_command(runner: Runner, name: str) -> None:
    """The real command says so too, ends with 1, and leaves nothing behind."""
    case = next(case for case in TABLE if case["id"] == name)
    done = runner.bare(*shlex.split(case["run"]), expect=1)
    assert "1 problem, nothing was started:" in done.output
    assert case["says"] in done.output
    assert "Traceback" not in done.output
    assert [path for path in runner.folder.rglob("*") if path.is_file()] == []
    assert list(runner.folder.glob("outputs/*/*")) == []
