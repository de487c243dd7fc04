"""Mistakes that people make, each refused in the parent by its own message, and the way out of it.

The table is wrong_configs.yaml: what was asked for, what is said, and for some the public thread in
which somebody made that mistake and learnt of it late.
"""

import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from llama_pretrain.config.compose import COMPOSE_ERRORS, explain, read_config, register
from llama_pretrain.config.optim import Optim, OptimName
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.validate import validate_deepspeed
from llama_pretrain.plan.machine import Machine
from llama_pretrain.tasks.run import check_everything
from tests.conftest import ROOT, Runner
from tests.test_conf import CLUSTER

LAPTOP = Machine(
    cores=8,
    memory_bytes=16 << 30,
    num_gpus=0,
    gpu_name=None,
    gpu_memory_bytes=None,
    gpu_capability=None,
    cpu_bf16=False,
    cpu_intel=False,
    cpu_fast_bf16=True,
    has_compiler=False,
    has_libaio=False,
)
MACHINES = {
    "laptop": LAPTOP,
    "builder": replace(LAPTOP, has_compiler=True, has_libaio=True),
    "cluster": CLUSTER,
    "v100": replace(CLUSTER, gpu_name="Tesla V100-SXM2-32GB", gpu_capability=(7, 0)),
    "no_aio": replace(CLUSTER, has_libaio=False),
}
TABLE: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "wrong_configs.yaml").read_text(encoding="utf-8")
)


def texts_of(case: dict[str, Any]) -> list[str]:
    """What is said of a case."""
    says = case["says"]
    return [says] if isinstance(says, str) else list(says)


CASES = [
    pytest.param(
        shlex.split(case["run"]),
        case.get("machine", "laptop"),
        texts_of(case),
        id=case["id"],
    )
    for case in TABLE
]


def find_problems(words: list[str], machine: str) -> list[Problem]:
    """Everything that run.py would say of these words on this machine."""
    return list(_find_problems(tuple(words), machine))


@cache
def _find_problems(words: tuple[str, ...], machine: str) -> tuple[Problem, ...]:
    register()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", overrides=list(words))
    except COMPOSE_ERRORS as error:
        found, run = explain(words, error)
    else:
        try:
            found, run = [], read_config(config)
        except UserError as error:
            return tuple(error.problems)
    more = [] if run is None else check_everything(run, MACHINES[machine])[1]
    return tuple(found + more)


@pytest.mark.parametrize(("words", "machine", "says"), CASES)
def test_refused(words: list[str], machine: str, says: list[str]) -> None:
    problems = find_problems(words, machine)
    assert [str(problem) for problem in problems] == says
    assert all(problem.path for problem in problems)


def test_each_mistake_has_its_own_message() -> None:
    texts = [text for case in TABLE for text in texts_of(case)]
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
    nearest = re.search(r"nearest that (?:do|are): (\d+)(?:, (\d+))?", hint)
    if nearest is not None:
        return [_change(words, {path: number}) for number in nearest.groups() if number]
    quoted = re.findall(r"'(\+[^']+)'", hint)
    if quoted:
        return [[*words, *quoted]]
    ways = []
    for way in re.split(r",? or |; ", hint):
        meant = re.search(r"(?:did you mean|set|use) ([\w.]+)(?: instead|\?|, say|$)", way)
        value = re.search(r"(?:set it to|write it as|write) ([\w.]+)(?:,|:|$| at most)", way)
        settings = {
            key: setting
            for key, setting in SETTING.findall(way)
            if not setting.startswith(PLACEHOLDERS)
        }
        if way == "leave it out":
            ways.append(_without(words, path))
        elif way.startswith("did you mean") and settings:
            ways.append(_change(words, settings))
        elif meant is not None and meant[1] != "it":
            ways.append(_without(words, path))  # and the setting that was meant
        elif value is not None and value[1] != "the":
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


NO_COMMAND = {
    "batch-zero",  # a range
    "extra-auto",
    "extra-without-plus",
    "head-odd",
    "optimizer-removed",
    "out-of-range",
    "betas-too-large",
    "sweep-without-flag",  # --multirun is no override
    "text-for-integer",
    "value-missing",
    "wrong-choice",
    "nvme-without-path",
    "model-without-path",
    "tokenizer-without-path",
    "rope-factor-missing",
    "data-mixture-paths",
    "data-mixture-of-mixtures",
    "data-huggingface",
    "data-stages",
    "data-stage-weights",
}
"""Cases whose way out a person has to think of: a value that only they know."""


@pytest.mark.slow  # a minute of composing
@pytest.mark.parametrize(("words", "machine", "says"), CASES)
def test_hints_lead_out(
    words: list[str], machine: str, says: list[str], request: pytest.FixtureRequest
) -> None:
    """Each alternative of a hint ends that problem, and one hint after another leads to a run."""
    problems = find_problems(words, machine)
    ways = [(problem, way) for problem in problems for way in ways_out(words, problem)]
    assert bool(ways) is (request.node.callspec.id not in NO_COMMAND)
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


RIGHT = [
    pytest.param("task=plan experiment=llama2_7b optim=lion", "laptop", id="eps-of-a-recipe"),
    pytest.param(
        "task=plan experiment=chinchilla_60m zero=stage2_offload optim=cpu_adagrad",
        "laptop",
        id="betas-of-a-recipe",
    ),
    pytest.param("task=plan experiment=chinchilla_60m debug=overfit", "laptop", id="overlay"),
    pytest.param(
        "debug=smoke checkpoint.export=false train.sample_prompt=Once", "laptop", id="sample"
    ),
    pytest.param("zero=stage3_offload zero.offload_param.device=none", "cluster", id="pinned"),
    pytest.param(
        "zero=stage3_nvme zero.offload_param.nvme_path=/local zero.offload_optimizer.device=cpu",
        "cluster",
        id="path-of-one-offload",
    ),
    pytest.param(
        "zero=stage3_nvme zero.offload_param.nvme_path=/local zero.offload_param.device=cpu",
        "cluster",
        id="path-of-the-other-offload",
    ),
    pytest.param("launch.num_processes=3", "cluster", id="rows-for-three-ranks"),
    pytest.param("task=plan launch.nodes=3 zero=zeropp", "laptop", id="rows-for-three-machines"),
    pytest.param("optim=muon", "laptop", id="muon"),
    pytest.param("optim=muon zero=stage3", "cluster", id="muon-stage-3"),
    pytest.param("zero=stage2_offload optim=cpu_lion", "cluster", id="lion-offloaded"),
    pytest.param(
        "precision=bf16 precision.bf16_master_weights_and_grads=true"
        " precision.bf16_optimizer_states=true",
        "cluster",
        id="bf16-alone",
    ),
    pytest.param(
        "zero=stage0 precision=bf16_autocast precision.torch_autocast.dtype=float16",
        "cluster",
        id="autocast-fp16",
    ),
    pytest.param(
        "tokenizer=pretrained tokenizer.path=/tokenizer model.vocab_size=50000",
        "laptop",
        id="vocabulary-of-the-model",
    ),
    pytest.param(
        "data=text data.paths=[/corpus/*] data.text_field=content", "laptop", id="field-of-a-glob"
    ),
    pytest.param(
        "task=probe plan.price_per_device_hour=2 plan.probe_steps=12", "cluster", id="price"
    ),
]
"""What a rule must not trip over: settings that a YAML has left, and combinations that work."""


@pytest.mark.parametrize(("words", "machine"), RIGHT)
def test_not_refused(words: str, machine: str) -> None:
    assert find_problems(shlex.split(words), machine) == []


def test_what_recipes_leave_is_no_mistake() -> None:
    """Every eps and betas of a shipped YAML, for the optimizers that don't read them."""
    files = [*(ROOT / "conf" / "optim").glob("*.yaml"), *(ROOT / "conf").glob("experiment/*.yaml")]
    for file in files:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        values = values.get("optim", {}) if file.parent.name == "experiment" else values
        for key, unread in (("eps", OptimName.lion), ("betas", OptimName.cpu_adagrad)):
            if key in values:
                run = Run(optim=Optim(name=unread, **{key: values[key]}))
                problems = [p for p in validate_deepspeed(run) if p.path == f"optim.{key}"]
                assert problems == [], file


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
