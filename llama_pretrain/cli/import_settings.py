"""The settings that a DeepSpeed JSON asks for, and those that our rules refuse."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama_pretrain.cli import import_keys as ds
from llama_pretrain.cli.overrides import build_run, default_settings
from llama_pretrain.config.ignored import find_ignored
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.validate import validate_run
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.resolve import REASONS
from llama_pretrain.tasks.validate import find_problems

BATCH_SIZES = ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")

MACHINES = [
    Machine(
        cores=64,
        memory_bytes=1 << 40,
        num_gpus=num_gpus,
        gpu_name=None,
        gpu_memory_bytes=80 << 30 if num_gpus else None,
        gpu_capability=(9, 0) if num_gpus else None,
        cpu_bf16=False,
        cpu_intel=False,
        cpu_fast_bf16=False,
        has_compiler=True,
        has_libaio=True,
    )
    for num_gpus in (0, 8)
]
"""The printed command must be valid whether `auto` becomes bf16 or fp32."""


class Import:
    """The settings that a file asks for, and what is not carried over."""

    def __init__(self) -> None:
        self.wanted: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        """The key and value behind each setting that was ever asked for, as they are shown."""
        self.open: set[str] = set()
        """Settings that the file leaves to the training script with "auto"."""
        self.lost: list[Problem] = []

    def want(
        self, setting: str, value: Any, path: str, *, given: bool = True, seen: Any = None
    ) -> None:
        """Ask for a setting. The first to ask has it; what is not `given` asks in silence.

        Args:
            seen: the value at `path`, where that is another.
        """
        seen = value if seen is None else seen
        if isinstance(value, str) and value == "auto":
            self.open.add(setting)
            chosen = f" ({REASONS[setting]})" if setting in REASONS else ""
            decides = f"is filled in by the training script; {setting} decides here{chosen}"
            self.lose(path, value, ds.AUTO.get(setting, decides))
            return
        try:
            value = ds.parse_setting(setting, value, path)
        except ValueError as error:
            self.lose(path, seen, str(error))
            return
        if setting not in self.wanted:
            self.wanted[setting] = value
            self.origins[setting] = ds.show_key(path, seen, given=given)
        elif given and (self.wanted[setting] != value or path in ds.FORMER):
            self.lose(path, seen, f"is overridden by {self.origins[setting]}")

    def lose(
        self, path: str, value: Any, message: str, hint: str = "", *, given: bool = True
    ) -> None:
        """Note what is not carried over."""
        where = ds.show_key(path, value, given=given)
        problem = Problem(path=where, message=message, hint=hint)
        self.lost += [problem] if problem not in self.lost else []

    def drop_refused(self) -> None:
        """Take settings back until our rules accept the run."""
        defaults = default_settings()
        while self.wanted and (problems := _check(defaults | self.wanted)):
            # An optimizer that is not supported asks in vain for other settings: it goes first.
            problem = next((item for item in problems if item.path == "optim.name"), problems[0])
            about = [name for name in self.wanted if _is_about(problem.path, name)]
            for setting in about or [self._find_cause(problem, defaults)]:
                self._drop(setting, problem, defaults)

    def _find_cause(self, problem: Problem, defaults: dict[str, Any]) -> str:
        """The newest setting without which a problem of another setting is gone."""
        for name in reversed(self.wanted):
            others = {key: value for key, value in self.wanted.items() if key != name}
            if problem not in _check(defaults | others):
                return name
        return next(reversed(self.wanted))

    def _drop(self, setting: str, problem: Problem, defaults: Mapping[str, Any]) -> None:
        """Take a setting back that our rules refuse; with an optimizer its parameters."""
        about = "" if _is_about(problem.path, setting) else f"{problem.path} "
        message = about + problem.message
        if message.startswith("ignored because"):  # the value is shown already
            message = message.rpartition(" (got ")[0]
        if self.wanted.pop(setting) != defaults.get(setting):
            self.lost.append(Problem(path=self.origins[setting], message=message))
        if setting == "optim.name":
            params = [n for n in self.wanted if self.origins[n].startswith("optimizer.params")]
            for name in params:
                value, origin = self.wanted.pop(name), self.origins[name]
                if value != defaults[name] and "(absent: " not in origin:
                    message = f"requires {self.origins[setting]}"
                    self.lost.append(Problem(path=origin, message=message))


def _is_about(path: str, setting: str) -> bool:
    return f"{path}.".startswith(f"{setting}.") or f"{setting}.".startswith(f"{path}.")


def _check(settings: Mapping[str, Any]) -> list[Problem]:
    """The problems of a run, here and on the machines of `MACHINES`."""
    sizes = [settings[f"batch.{name}"] for name in BATCH_SIZES]
    ranks = sizes[0] // (sizes[1] * sizes[2]) if all(sizes) else 1
    try:
        run = build_run(settings)
    except UserError as error:
        return error.problems
    problems = [*validate_run(run), *find_ignored(run, {})]
    planned = replace(run, task=Task.plan, launch=replace(run.launch, num_processes=ranks or 1))
    for machine in MACHINES:
        problems += find_problems(planned, machine)[1]
    return problems
