"""A snapshot from elsewhere is data: 300 hostile ones, and none runs code or reads a secret."""

import copy
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from llama_pretrain.config.command_line import parse_command_line
from llama_pretrain.config.compose import read_config, register
from llama_pretrain.config.from_snapshot import words_for_hydra
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.snapshot import DEFAULTS, load_snapshot, to_plain
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.resolve import resolve
from tests.conftest import compose_run

NUMBER = 300
VARIABLE, SECRET = "CANARY_VALUE", "c4nary-0f-the-envir0nment"
MODULE = "canary_module"
PAYLOADS = yaml.safe_load((Path(__file__).parent / "hostile.yaml").read_text())
PROCESSES = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
Values = dict[str, Any]
Attack = Callable[[random.Random, Values, Path], str | bytes]


class Canaries:
    """What code that is run would touch: a file, a module, a process, a variable."""

    def __init__(self, folder: Path):
        self.file = folder / "touched"
        self.seen: list[str] = []
        self.armed = False
        text = f"open({str(self.file)!r}, 'w')\nclass Fire:\n    def __init__(self, *a, **k): ...\n"
        (folder / f"{MODULE}.py").write_text(text)
        sys.addaudithook(self._notice)

    def _notice(self, event: str, args: tuple[Any, ...]) -> None:
        if self.armed and event in PROCESSES:
            self.seen.append(f"{event} {args[:2]}")

    def touched(self) -> list[str]:
        """What has been touched since the last call."""
        seen, self.seen = self.seen, []
        if self.file.exists():
            seen.append("file")
            self.file.unlink()
        sys.modules.pop(MODULE, None)
        return seen


@pytest.fixture
def canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Canaries]:
    found = Canaries(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(VARIABLE, SECRET)
    monkeypatch.chdir(tmp_path)
    found.armed = True
    yield found
    found.armed = False


def real_values() -> Values:
    """The values of a real snapshot."""
    return to_plain(resolve(compose_run(["debug=smoke"]), detect_machine()))


def mappings(values: Values) -> list[Values]:
    """Every mapping in nested values."""
    inner = [item for item in values.values() if isinstance(item, dict)]
    return [values, *(found for item in inner for found in mappings(item))]


def dump(values: Any) -> str:
    return yaml.safe_dump({"defaults": DEFAULTS, **values}, sort_keys=False)


def put(chance: random.Random, values: Values, item: Any, *, key: str = "") -> str:
    """The snapshot with an item at a random place: new, or in place of a value."""
    place = chance.choice(mappings(values))
    names = [key or "extra", *place] if not key else [key]
    place[chance.choice(names)] = item
    return dump(values)


def put_open(chance: random.Random, values: Values, item: Any) -> str:
    """The snapshot with an item in one of the mappings that take any key."""
    section = chance.choice(["zero", "deepspeed"])
    values[section]["extra"] = chance.choice([item, {"log_level": item}, {"leaf_module": [item]}])
    return dump(values)


def payload(chance: random.Random, kind: str, canary: Path, item: Any = None) -> Any:
    """One of a kind in hostile.yaml; `item` takes the place of @TARGET@."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {fill(key): fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        if value == "@TARGET@":
            return item
        for name, text in named.items():
            value = value.replace(name, text) if isinstance(value, str) else value
        return value

    named = {"@CANARY@": str(canary), "@FOLDER@": str(canary.parent)}
    named |= {"@MODULE@": MODULE, "@VARIABLE@": VARIABLE}
    return fill(chance.choice(PAYLOADS[kind]))


def target(chance: random.Random, canary: Path) -> Values:
    """A node that hydra.utils.instantiate would call."""
    found: Values = payload(chance, "targets", canary)
    return found


def attack_target(chance: random.Random, values: Values, canary: Path) -> str:
    item = target(chance, canary)
    return put_open(chance, values, item) if chance.random() < 0.4 else put(chance, values, item)


def attack_hidden_target(chance: random.Random, values: Values, canary: Path) -> str:
    """The same, its name written with YAML's escapes."""
    text = put_open(chance, values, target(chance, canary))
    hidden = chance.choice([r'"\x5ftarget_"', r'"\u005ftarget\x5f"', "? _target_\n   "])
    return text.replace("_target_", hidden, 1)


def attack_hydra(chance: random.Random, values: Values, canary: Path) -> str:
    item = target(chance, canary)
    block = payload(chance, "hydra_blocks", canary, item)
    if chance.random() < 0.3:
        return put(chance, values, block, key="hydra")
    text = dump(values) + "\n"
    name = chance.choice(["hydra", '"hydra"', r'"\x68ydra"', "? hydra\n", "hydra.callbacks"])
    body = yaml.safe_dump(block, default_flow_style=True, width=10_000).strip()
    return f"{text}{name}: {body}\n"


def attack_interpolation(chance: random.Random, values: Values, canary: Path) -> str:
    """Of the environment, or of whatever else a resolver gives; in many spellings."""
    inner = payload(chance, "interpolations", canary)
    form = chance.choice(["{}", "a {} b", r"\\{}", "\u2028{}", "{}/{}", "$${}"])
    text = form.replace("{}", "${" + inner + "}")
    if chance.random() < 0.3:
        return put_open(chance, values, chance.choice([text, {text: 1}, [text]]))
    written = put(chance, values, "PLACE")
    spellings = [("$", r"\x24"), ("{", r"\u007b"), ("${", "$\\\n    {"), ("", "")]
    spelt = text.replace(*chance.choice(spellings))
    return written.replace("PLACE", '"' + spelt.replace('\\"', "'") + '"', 1)


def attack_tag(chance: random.Random, values: Values, canary: Path) -> str:
    tag = payload(chance, "tags", canary)
    text = put(chance, values, "PLACE").replace("PLACE", tag, 1)
    return f"%TAG !e! tag:yaml.org,2002:python/\n---\n{text}" if chance.random() < 0.2 else text


def attack_defaults(chance: random.Random, values: Values, canary: Path) -> str:
    (canary.parent / "evil.yaml").write_text(f"hydra: {{callbacks: {target(chance, canary)}}}\n")
    defaults = payload(chance, "defaults", canary)
    return yaml.safe_dump({"defaults": defaults, **values})


def attack_bomb(chance: random.Random, values: Values, canary: Path) -> str:
    """Aliases that grow a billion times, or refer to themselves."""
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    own = ["zero: &z {extra: {log_level: *z}}", "l: &l [*l]", "m: {<<: &m {hydra: {}}}", "*x : 1"]
    return dump(values) + "\n" + chance.choice(["\n".join(laughs), *own]) + "\n"


def attack_depth(chance: random.Random, values: Values, canary: Path) -> str:
    depth = chance.choice([13, 200, 2000, 50_000])
    opened, closed = chance.choice([("[", "]"), ("{a: ", "}")])
    text = put_open(chance, values, "PLACE")
    return text.replace("PLACE", opened * depth + "1" + closed * depth, 1)


def attack_keys(chance: random.Random, values: Values, canary: Path) -> str:
    names = "plugins +seed ~model hydra.run.dir seed=1 a.b 1 null __class__ _target_ _args_ "
    names += "_recursive_ _convert_ << [a] a:b \u202eseed"
    key = chance.choice([*names.split(), "a: b", ""])
    item = chance.choice([MODULE, [f"{MODULE}.Fire"], 1, None, target(chance, canary)])
    return (
        put_open(chance, values, {key: item})
        if chance.random() < 0.5
        else put(chance, values, item, key=key or "?")
    )


def attack_spelling(chance: random.Random, values: Values, canary: Path) -> bytes:
    """Other documents, other encodings, keys that are there twice."""
    text = dump(values)
    evil = f"hydra: {{callbacks: {{x: {{_target_: {MODULE}.Fire}}}}}}\n"
    return chance.choice(
        [
            (text + "\n---\n" + evil).encode(),
            (evil + "---\n" + text).encode(),
            ("\ufeff" + text + evil).encode(),
            (text + evil).encode("utf-16"),
            (text + evil).encode("utf-32"),
            text.encode() + b"\x00" + evil.encode(),
            text.encode() + b"\xff\xfe",
            (text + "seed: 1\nseed: 2\n").encode(),
            (text + "\r\n" + evil.replace("\n", "\r\n")).encode(),
            (text + "\u2028" + evil).encode(),
            (text + "# " + "x" * (5 << 20)).encode(),
            b"",
            b"%YAML 9.9\n---\n" + text.encode(),
        ]
    )


def attack_numbers(chance: random.Random, values: Values, canary: Path) -> str:
    """Numbers and dates whose conversion fails, or takes for ever."""
    item = chance.choice(
        [
            *("9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 3000, "0x" + "f" * 300),
            *("1" + ":59" * 20_000, "2020-99-99", "2020-01-01", ".inf", ".nan", "1e999"),
            *('"\\ud800"', '"\\0"', "!!int x"),
        ]
    )
    where = put if chance.random() < 0.5 else put_open
    return where(chance, values, "PLACE").replace("PLACE", item, 1)


def attack_values(chance: random.Random, values: Values, canary: Path) -> str:
    """Texts that a shell, Hydra's grammar or a template would take for something else."""
    section, name = chance.choice(PAYLOADS["text_settings"]).split(".")
    values[section][name] = payload(chance, "texts", canary)
    return dump(values)


def attack_bytes(chance: random.Random, values: Values, canary: Path) -> bytes:
    """Pieces of the other attacks at random places of the text."""
    pieces = ["${oc.env:CANARY_VALUE}", "_target_: os.abort", "!!python/name:os.system ''", "\t"]
    pieces += ["&a ", "*a", "hydra: {}\n", "\n---\n", "{", "\x1b[2J", "? ", "<<: ", '"', "'", "| "]
    content = bytearray(dump(values).encode())
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(content))
        content[at : at + chance.choice([0, 0, 3])] = chance.choice(pieces).encode()
    return bytes(content)


ATTACKS: list[Attack] = [item for name, item in list(globals().items()) if name[:7] == "attack_"]


def run_hydra(words: list[str]) -> list[DictConfig]:
    """What hydra.main hands to run.py's function for these words; it does all that Hydra does."""
    given: list[DictConfig] = []
    before, sys.argv = sys.argv, ["run.py", *words]
    try:
        hydra.main(config_path=None, version_base="1.3")(given.append)()
    finally:
        sys.argv = before
    return given


def leaves(values: Any) -> Iterator[Any]:
    inner = values.values() if isinstance(values, dict) else values
    for item in inner:
        if isinstance(item, dict | list):
            yield from leaves(item)
        else:
            yield item


def outcome(folder: Path, scratch: Path) -> tuple[str, bool]:
    """All that is made of a snapshot by the command that reproduces it, and whether it is read.

    Anything but a UserError is an error of ours.
    """
    try:
        command = parse_command_line([f"reproduce={folder}"])
        (config,) = run_hydra(words_for_hydra(command, scratch=scratch))
        read_config(config)
    except UserError as error:
        return str(error), False
    resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    kinds = (str, int, float, bool, type(None))
    assert all(isinstance(leaf, kinds) for leaf in leaves(resolved))
    return repr(resolved), True


def test_300_hostile_snapshots_run_nothing(
    canaries: Canaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as run.py has it
    register()
    values, chance = real_values(), random.Random(20261125)
    canaries.touched()  # to know the machine, a process is started
    own = tmp_path / "own"
    own.mkdir()
    (own / "snapshot.yaml").write_text(dump(values))
    (tmp_path / "scratch").mkdir()
    assert outcome(own, tmp_path / "scratch")[1]  # without an attack it is read
    refused = plain = 0
    began = time.monotonic()
    for number in range(NUMBER):
        attack = ATTACKS[number % len(ATTACKS)]
        content = attack(chance, copy.deepcopy(values), canaries.file)
        folder, scratch = tmp_path / f"run{number}", tmp_path / f"scratch{number}"
        folder.mkdir()
        scratch.mkdir()
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / "snapshot.yaml").write_bytes(raw)
        told, is_plain = outcome(folder, scratch)
        plain += is_plain
        refused += not is_plain
        touched = canaries.touched()
        assert touched == [], f"{attack.__name__} {number}: {raw[-300:]!r}"
        assert SECRET not in told, f"{attack.__name__} {number}"
        for file in scratch.rglob("*"):
            assert SECRET not in file.read_text(), f"{attack.__name__} {number}"
    print(f"{refused} refused, {plain} plain, {time.monotonic() - began:.0f} s")
    assert refused >= 230
    assert plain >= 10  # texts that mean nothing to Hydra


@pytest.mark.filterwarnings("ignore:Callback Fire")  # it lacks most of a callback's methods
def test_the_canaries_see_what_hydra_would_run(canaries: Canaries, tmp_path: Path) -> None:
    """Hydra alone, given such a file, does run it: the test above looks at the right things."""
    register()
    values = {"defaults": DEFAULTS, "hydra": {"callbacks": {"x": {"_target_": f"{MODULE}.Fire"}}}}
    values |= {"model": {"name": f"${{oc.env:{VARIABLE}}}"}}
    (tmp_path / "snapshot.yaml").write_text(yaml.safe_dump(values))
    words = ["--config-path", str(tmp_path), "--config-name", "snapshot"]
    words += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    (config,) = run_hydra(words)
    assert canaries.touched() == ["file"]
    os.system("true")
    assert len(canaries.touched()) == 1
    with pytest.raises(UserError):
        read_config(OmegaConf.create({"model": config.model.name}))
    assert config.model.name == SECRET


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hydra: {run: {dir: x}}\n", "which a snapshot never does"),
        ('model: {name: "\\x24{oc.env:HOME}"}\n', "names hydra settings, interpolations or"),
        ('zero: {extra: {"\\x5ftarget_": os.system}}\n', "names hydra settings, interpolations or"),
        ("a: &a [1]\nb: *a\n", "is not a snapshot: it has an anchor or an alias"),
        ("seed: 1\nseed: 2\n", "is not a snapshot: it has a duplicate key"),
        ("1: 2\n", "is not a snapshot: it has a key that is not text"),
        ("? [a]\n: 2\n", "is not a snapshot: it has a key that is not text"),
        ("seed: 2020-01-01\n", "is not a snapshot: it has a value that is neither text nor number"),
        ("seed: 2020-99-99\n", "is not supported YAML"),
        (f"seed: {'9' * 5000}\n", "is not a snapshot: it has a number that is too long"),
        ("zero: {extra: {log_level: .inf}}\n", "is not a snapshot: it has a number out of range"),
        ("zero: " + "[" * 20, "is not a snapshot: it has several documents, or is nested"),
        ("---\nseed: 1\n", "is not a snapshot: it has several documents"),
        ("seed: [\n", "is not YAML (line 3)"),
        ("plugins: [evil]\n", "plugins: unknown key"),
        ("# " + "x" * (5 << 20) + "\n", "is not a snapshot: it has more than 4,194,304 bytes"),
    ],
)
def test_what_is_wrong_with_a_snapshot_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "snapshot.yaml"
    path.write_text(f"defaults: [run_schema, _self_]\n{text}")
    with pytest.raises(UserError) as caught:
        load_snapshot(path)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [run_schema, _self_, /hydra/launcher: evil]\n",
        "just text\n",
        "seed: 1\n",
        "!!python/object/apply:os.system [x]\n",
    ],
)
def test_what_is_no_snapshot_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "snapshot.yaml").write_text(text)
    with pytest.raises(UserError, match="is not"):
        load_snapshot(tmp_path / "snapshot.yaml")


def test_a_file_that_is_none_of_ours_is_not_quoted(tmp_path: Path) -> None:
    """A snapshot may be a link to something private."""
    private = tmp_path / "private"
    private.write_text("machine example.org login me password: [hunter2\n")
    (tmp_path / "snapshot.yaml").symlink_to(private)
    with pytest.raises(UserError) as caught:
        load_snapshot(tmp_path / "snapshot.yaml")
    assert "hunter2" not in str(caught.value)
