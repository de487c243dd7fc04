"""Drift: what differs, by group."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_pretrain.runs.drift import Drift, Group, Made, find_drift, list_unknown, unasked

SOURCE = {"name": "text", "data_hash": "a" * 64}
CORPUS = {"tokenizer_hash": "b" * 64, "content_hash": "c" * 64, "sources": [SOURCE]}
MADE = Made(
    config={"seed": 1, "optim.betas": [0.9, 0.95], "data.cache_dir": "/a", "train.spike": "none"},
    provenance={
        "git_commit": "1" * 40,
        "code": {"run.py": "d" * 64, "llama_pretrain/train/loop.py": "e" * 64},
        "python": "3.11.7",
        "libc": "glibc-2.36",
        "packages": {f"p{number}": "1" for number in range(20)} | {"torch": "2.13.0", "rich": "1"},
        "cpu": "A",
        "cpu_isa": ["avx2"],
        "gpus": [],
        "machine": {"cores": 2, "memory_bytes": 5, "cpu_bf16": True},
        "environment": {"NCCL_ALGO": "Ring", "SLURM_JOB_ID": "7"},
        "host": "here",
        "platform": "Linux",
        "paths": {"project": "/p"},
        "operators": {"cpu_adam": {"sha256": "f" * 64}},
    },
    plan={"corpus": CORPUS},
    files={"text": {"/x/a.txt": "1" * 64, "/x/b.txt": "2" * 64}},
)


def changed(**changes: Any) -> Made:
    """MADE with other provenance."""
    return replace(MADE, provenance={**MADE.provenance, **changes})


def options(**changes: Any) -> Made:
    """MADE with other options."""
    return replace(MADE, config={**MADE.config, **changes})


def other_data(files: dict[str, str]) -> Made:
    source = SOURCE | {"data_hash": "9" * 64}
    plan = {"corpus": CORPUS | {"sources": [source], "content_hash": "8" * 64}}
    return replace(MADE, plan=plan, files={"text": files})


def drift_to(now: Made, *, before: Made = MADE, asked: tuple[str, ...] = ()) -> list[Drift]:
    return find_drift(before, now, asked=lambda path: path in asked)


PACKAGES = MADE.provenance["packages"]
RECORDED = yaml.safe_load((Path(__file__).parent / "drifts.yaml").read_text())
NAMED: dict[str, tuple[Made, Group, str, str]] = {
    "data-byte": (
        other_data({"/x/a.txt": "1" * 64, "/x/b.txt": "3" * 64}), Group.results, "data",
        f"/x/b.txt: {'2' * 12} -> {'3' * 12}",
    ),
    "data-file-gone": (
        other_data({"/x/a.txt": "1" * 64}), Group.results, "data",
        f"/x/b.txt: {'2' * 12} -> nothing",
    ),
    "data-without-files": (
        other_data({}), Group.results, "data", f"data of text: {'a' * 12} -> {'9' * 12}"
    ),
    "tokenizer": (
        replace(MADE, plan={"corpus": CORPUS | {"tokenizer_hash": "7" * 64}}), Group.results,
        "data", f"tokenizer: {'b' * 12} -> {'7' * 12}",
    ),
    "package": (
        changed(packages={**PACKAGES, "torch": "2.14.0"}), Group.bits, "versions",
        "torch: 2.13.0 -> 2.14.0",
    ),
    "harmless-package": (
        changed(packages={**PACKAGES, "rich": "2"}), Group.harmless, "versions", "rich: 1 -> 2"
    ),
    **{
        name: (options(**case["config"]) if "config" in case else changed(**case["provenance"]),
        Group(case["drift"][0]), *case["drift"][1:])
        for name, case in RECORDED.items()
    },
}  # fmt: skip


@pytest.mark.parametrize(("now", "group", "kind", "text"), NAMED.values(), ids=NAMED)
def test_each_drift_is_named_in_its_group(now: Made, group: Group, kind: str, text: str) -> None:
    found = [(drift.group, drift.kind.value, str(drift)) for drift in drift_to(now)]
    assert found == [(group, kind, text)]


def test_nothing_has_drifted() -> None:
    assert drift_to(MADE) == []
    moved = replace(MADE, files={"text": {"/y/a.txt": "1" * 64, "/y/b.txt": "2" * 64}})
    assert drift_to(moved) == []


def test_a_moved_file_that_has_changed_is_named_where_it_was_and_is() -> None:
    now = other_data({"/y/a.txt": "1" * 64, "/y/b.txt": "3" * 64})
    assert [drift.path for drift in drift_to(now)] == ["/x/b.txt", "/y/b.txt"]


def test_checkpoints_matter_where_a_rollback_goes_back_to_them() -> None:
    def group(spike: str) -> Group:
        before = replace(MADE, config={"train.spike": spike, "checkpoint.every_steps": 1})
        now = replace(MADE, config={"train.spike": spike, "checkpoint.every_steps": 2})
        (found,) = drift_to(now, before=before)
        return found.group

    assert group("none") is Group.harmless
    assert group("rollback") is Group.results


def test_what_the_command_line_asked_for_is_marked() -> None:
    config = options(**{"seed": 2, "data.cache_dir": "/b"}).config
    now = replace(changed(cpu="B", host="x"), config=config)
    found = drift_to(now, asked=("seed",))
    assert [str(drift) for drift in found] == [
        "seed: 1 -> 2 (asked for on the command line)",
        "data.cache_dir: /a -> /b",
        "cpu: A -> B",
        "host: here -> x",
    ]
    assert [drift.path for drift in unasked(found)] == ["cpu"]
    data = other_data({})
    assert unasked(drift_to(data))
    assert not unasked(drift_to(data, asked=("data.cache_dir",)))  # data was set on purpose


def test_what_a_run_does_not_record_is_not_compared() -> None:
    sparse = Made(
        config=MADE.config,
        provenance={"git_commit": "0" * 40, "cpu": "A", "host": "here"},
        plan={"corpus": CORPUS},
    )
    found = [(drift.group, str(drift)) for drift in drift_to(MADE, before=sparse)]
    # Without hashes of the code another commit may matter.
    assert found == [(Group.results, f"git commit: {'0' * 12} -> {'1' * 12}")]
    missing = ("code", "packages", "cpu_isa", "environment")
    assert list_unknown(sparse) == [f"{key} in provenance.json" for key in missing]
    assert drift_to(MADE, before=Made()) == []
    assert list_unknown(Made()) == ["provenance.json", "plan.json"]


@pytest.mark.parametrize("junk", [[], "x", 5, None, {"a": []}, [{}], {"name": {"x": 1}}])
def test_files_from_elsewhere_may_hold_anything(junk: Any) -> None:
    provenance = dict.fromkeys(MADE.provenance, junk)
    plan = {"corpus": {"sources": junk, "tokenizer_hash": junk}}
    found = drift_to(MADE, before=Made(config={"seed": junk}, provenance=provenance, plan=plan))
    assert all(str(drift).isprintable() for drift in found)


def test_a_text_from_elsewhere_is_one_printable_line() -> None:
    (found,) = drift_to(changed(host="x"), before=changed(host="\x1b[2J\n" + "y" * 5000))
    assert found.before == "?[2J?" + "y" * 195 + "..."
