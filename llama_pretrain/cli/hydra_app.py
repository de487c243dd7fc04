"""A run or a sweep as a Hydra application; every outcome becomes a few lines and an exit code."""

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from llama_pretrain.cli.exit_codes import finish
from llama_pretrain.cli.problems import list_problems
from llama_pretrain.config.command_line import parse_command_line
from llama_pretrain.config.compose import CONF, read_config, register
from llama_pretrain.config.from_snapshot import words_for_hydra
from llama_pretrain.config.origins import trace_settings
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.snapshot import SNAPSHOT_NAME
from llama_pretrain.launch.signals import Requests, catch_signals
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.phases import Phases, process_start
from llama_pretrain.sweep.callback import close_sweep, sweep_words
from llama_pretrain.sweep.job import run_sweep_job
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.run import run_task


def run_command(argv: Sequence[str]) -> int:
    """Compose and run what the words say. Returns the exit code."""
    gc.disable()  # until the config is composed: many objects are created and few freed
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of Hydra's report
    requests, words = Requests(), list(argv)
    failures: list[Exception] = []

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def run(config: DictConfig) -> float | None:
        try:
            return _run_job(config, words, requests)
        except Exception as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise
            failures.append(error)  # raised after Hydra, which would print a line of its own
            return None

    register()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            catch_signals(requests)  # here, where what it raises is caught
            command = parse_command_line(argv)
            if command.problems:
                raise UserError(list_problems(command, detect_machine()))
            sys.argv[1:] = [
                *words_for_hydra(command, scratch=Path(scratch)),
                *sweep_words(command),
            ]
            run()
            if failures:
                raise failures[0]
            return close_sweep(None)
        except BaseException as error:
            return finish(error, requests=requests, swept=close_sweep(error))
        finally:
            gc.enable()


def _run_job(config: DictConfig, argv: Sequence[str], requests: Requests) -> float | None:
    """One job of Hydra: a run, or one job of a sweep. Returns the objective."""
    own = HydraConfig.get()
    single = own.mode is not RunMode.MULTIRUN
    phases = Phases(process_start() if single else None)
    requests.check()
    words, folder = list(own.overrides.task), Path(own.runtime.output_dir)
    try:
        choices = {} if own.job.config_name == SNAPSHOT_NAME else own.runtime.choices
        origins = trace_settings(words, choices)
        run = read_config(config)
        requests.check()
        gc.enable()
        phases.end("compose")
        context = TaskContext(
            run_dir=RunDir(folder),
            argv=argv,
            origins=origins,
            machine=detect_machine(),
            phases=phases,
        )
        return run_task(run, context) if single else run_sweep_job(run, words, context)
    finally:
        with contextlib.suppress(OSError):  # Hydra creates it even if nothing is written
            folder.rmdir()
