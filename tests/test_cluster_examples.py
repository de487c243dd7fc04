"""The YAML of docs/clusters is what the platforms take."""

import re
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from llama_pretrain.config.command_line import parse_command_line
from tests.conftest import ROOT


def examples() -> list[Any]:
    text = (ROOT / "docs/clusters/kubernetes.md").read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def test_the_trainjob_is_one_of_kubeflow() -> None:
    (job,) = (example for example in examples() if "apiVersion" in example)
    assert TrainerV1alpha1TrainJob.model_validate(job).to_dict() == job  # no key is unknown


@pytest.mark.parametrize("example", examples())
def test_commands_of_examples_are_ours(example: dict[str, Any]) -> None:
    words = example["run"].split() if "run" in example else [
        *example["spec"]["trainer"]["command"], *example["spec"]["trainer"]["args"]
    ]  # fmt: skip
    assert words[:2] == ["python", "run.py"]
    assert not parse_command_line(words[2:]).problems
